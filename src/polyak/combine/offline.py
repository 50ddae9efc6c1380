"""``average_checkpoints``: checkpoints of any tool in, one average out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike

import torch

from polyak.combine.engine import Progress
from polyak.combine.plan import AverageReport, Paths, plan_average
from polyak.errors import name_list
from polyak.profiles import Profile

__all__ = ["average_checkpoints"]


def average_checkpoints(
    inputs: Paths,
    output: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    profile: Profile | str | None = None,
    dtype: torch.dtype | str | None = None,
    max_memory: int | str = "256MB",
    key: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    hashes: bool = False,
) -> AverageReport:
    """Average checkpoints of any size and format in bounded memory: Σ_k a_k · input_k.

    Sums are kept in float32, in float64 for float64 tensors; identical inputs come back bit for bit. Integer and
    bool tensors are copied from the last input that counts, with a warning where they differ. Tied tensors stay
    tied. The output appears whole or not at all.

    Args:
        inputs: checkpoints, and folders of checkpoints, in any formats.
        output: the file or folder to write; its suffix says the format.
        weights: one number for each input, in the order given; they are divided by their sum. By default all
            count the same.
        profile: instead of ``weights``, a profile or its text. The inputs are then taken in the order of their
            training steps, read from the files, else from their names, else in the order given; a checkpoint
            stands for the steps since the one before it, or for one step each where steps are not known.
        dtype: of the floating-point tensors written, such as ``torch.bfloat16`` or ``"bf16"``; by default that
            of the inputs.
        max_memory: bytes, or text such as ``"512MB"``, beyond the interpreter with torch.
        key: the nested key that holds the weights, such as ``"state_dict_ema"``; by default the best known.
        overwrite: replace an output that is there.
        progress: called with bytes done and bytes in all.
        hashes: note the SHA-256 of the inputs in the output.

    Returns:
        What was averaged, copied and ignored, and the coefficient of each input.

    Raises:
        StructureError: the inputs do not hold the same tensors; all differences are named.
        CheckpointError: an input cannot be read, or the output not written.
        NonFiniteError: an input holds NaN, or an infinity that the others do not; file and tensor are named.
        OptionError: both ``weights`` and ``profile``, an output that is one of the inputs, too little memory.
        OutputExistsError: the output is there and may not be overwritten.

    >>> import tempfile
    >>> import polyak
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (100, 200, 300):
    ...         torch.save({"w": torch.full((2,), float(step))}, f"{folder}/step{step}.pt")
    ...     report = polyak.average_checkpoints(folder, f"{folder}/tail.pt", profile="tail:steps=200")
    ...     torch.load(f"{folder}/tail.pt")["w"], report.coefficients
    (tensor([250., 250.]), (0.0, 0.5, 0.5))
    """
    plan = plan_average(
        inputs,
        output,
        weights=weights,
        profile=profile,
        dtype=dtype,
        max_memory=max_memory,
        key=key,
        overwrite=overwrite,
        hashes=hashes,
    )
    report = plan.run(progress)
    if report.differing:
        warnings.warn(
            f"integer and bool tensors were copied from the last input, though the inputs differ in "
            f"{name_list([*report.differing])}",
            stacklevel=2,
        )
    return report
