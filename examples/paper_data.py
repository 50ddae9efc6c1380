"""Images as their authors publish them: the IDX files of MNIST and Fashion-MNIST, the Python files of CIFAR.

`load(folder)` finds out by the names of the files which of them it is. Nothing is downloaded, and reading a
CIFAR file, which is a pickle, runs no code that it might hold.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Images", "augmented", "load"]

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR_FILES = {
    b"labels": {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    b"fine_labels": {"train": ["train"], "test": ["test"]},
}
# What a pickled array of bytes is made of, under the names of old and new numpy.
PICKLED = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}


@dataclass(frozen=True)
class Images:
    """Pixels ``[N, C, H, W]`` (uint8) and their classes ``[N]`` (int64)."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


def load(folder: Path) -> dict[str, Images]:
    """The parts "train" and "test" of the data set in ``folder``.

    Raises:
        FileNotFoundError: no data set that is known here is in the folder.
        ValueError: a file is not what its name says.
    """
    if _idx_path(folder, IDX_FILES["train"][0]) is not None:
        return {part: _idx_images(folder, names) for part, names in IDX_FILES.items()}
    for label_key, parts in CIFAR_FILES.items():
        if all((folder / name).is_file() for names in parts.values() for name in names):
            return {part: _cifar_images(folder, names, label_key) for part, names in parts.items()}
    raise FileNotFoundError(
        f"{folder} holds neither the IDX files of MNIST or Fashion-MNIST ({IDX_FILES['train'][0]}, with or without "
        ".gz, …) nor the Python files of CIFAR-10 (data_batch_1, …, test_batch) or CIFAR-100 (train, test)"
    )


def augmented(inputs: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Images ``[N, C, H, W]`` moved by up to ``shift`` pixels each way, mirrored or not at random; -1 moves in."""
    count, _, height, width = inputs.shape
    down, right = (torch.randint(2 * shift + 1, (count, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.arange(width).expand(count, width)
    rows = down + torch.arange(height)
    columns = right + torch.where(mirrored, across.flip(1), across)
    padded = torch.nn.functional.pad(inputs, [shift] * 4, value=-1.0)
    every = torch.arange(count)[:, None, None]
    # [N, H, W, C], seen as [N, C, H, W]: the layout in which convolutions are fastest.
    return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx_images(folder: Path, names: tuple[str, str]) -> Images:
    pixels, labels = (read_idx(_idx_path(folder, name) or folder / name) for name in names)
    _refuse_unpaired(folder / names[0], pixels, labels)
    return Images(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels).long())


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an IDX file, gzipped or not: two zeros, type 8, rank, big-endian sizes, data."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    rank = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * rank:
        raise ValueError(f"{path} is no IDX file of bytes")
    shape = np.frombuffer(content, ">u4", rank, offset=4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != shape.prod():
        raise ValueError(f"{path} is cut short or too long: {values.size} bytes for {shape.tolist()}")
    return values.reshape(shape).copy()


def _cifar_images(folder: Path, names: Sequence[str], label_key: bytes) -> Images:
    pixels, labels = [], []
    for name in names:
        found = read_plain_pickle(folder / name)
        if not isinstance(found, dict) or not {b"data", label_key} <= found.keys():
            raise ValueError(f"{folder / name} holds no images with labels as CIFAR's files do")
        _refuse_unpaired(folder / name, found[b"data"], found[label_key])
        pixels.append(np.asarray(found[b"data"], np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(found[label_key]))
    return Images(torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels)).long())


def read_plain_pickle(path: Path) -> Any:
    """What a pickle of plain values and arrays holds; one that names anything else is refused, and nothing is run."""
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="bytes").load()
        except (EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of pixels needs")
        return super().find_class(module, name)


def _refuse_unpaired(path: Path, pixels: Sequence[Any], labels: Sequence[Any]) -> None:
    if len(pixels) != len(labels):
        raise ValueError(f"{path}: {len(pixels)} images and {len(labels)} labels")
