"""Averages of LoRA adapters: the mean of their updates, which is not the product of their factors' means.

The update of a module in adapter k is s_k B_k A_k. Their combination Σ a_k s_k B_k A_k is, exactly, one product of
factors put side by side,

    [B_1 … B_n] [a_1 s_1 A_1; …; a_n s_n A_n],

of rank r_1 + … + r_n. Its best approximation of rank R is that of the singular value decomposition (Eckart and Young,
1936). The product itself is never formed: with [B_1 … B_n] = Q_B R_B and [a_k s_k A_k]ᵀ = Q_A R_A, the decomposition
of the small matrix R_B R_Aᵀ gives that of the whole.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyak._checks import Difference
from polyak.checkpoints import Checkpoint, Layout, TensorInfo, Writer
from polyak.checkpoints._base import on_host
from polyak.combine import _inputs
from polyak.combine._adapters import (
    CONFIG_NAME,
    DIFFUSERS_STEM,
    Adapter,
    Factors,
    common_entries_differ,
    config_in_metadata,
    factors_of,
    is_adapter,
    is_file_of_diffusers,
    metadata_of_average,
    read_config,
    refusal,
)
from polyak.combine._engine import Progress
from polyak.errors import NonFiniteError, OptionError, StructureError, name_list

__all__ = ["MODES", "MeanOfFactors", "MeanOfUpdates", "is_adapter", "planned"]

MODES = ("product", "factors")
# The name that PEFT gives to the weights in a folder, without the suffix.
_STEM = "adapter_model"


def planned(
    inputs: Sequence[Checkpoint],
    coefficients: Sequence[float],
    *,
    rank: int | None = None,
    mode: str = "product",
    dtype: torch.dtype | None = None,
) -> MeanOfUpdates | MeanOfFactors | None:
    """How adapters are averaged, checked in headers and configs; None where the inputs are whole models.

    Args:
        inputs: opened checkpoints.
        coefficients: how much each counts; they sum to 1.
        rank: of the updates written; by default, module by module, the largest of the inputs.
        mode: ``"product"`` for the mean of the updates, ``"factors"`` for the means of the factors.
        dtype: of the floating-point tensors written; by default the widest of the inputs.

    Raises ``OptionError`` for options that do not fit, and ``StructureError`` for what cannot be averaged as a sum
    of products, or is not alike in all inputs.
    """
    if mode not in MODES:
        raise OptionError(f"adapters are averaged as product or as factors, not as {mode!r}")
    if rank is not None and not (isinstance(rank, int) and rank >= 1):
        raise OptionError(f"the rank of an update must be at least 1, got {rank}")
    adapters = [is_adapter(checkpoint) for checkpoint in inputs]
    if not any(adapters):
        if rank is not None or mode != "product":
            raise OptionError(
                "there is no LoRA adapter among the inputs, and only those have a rank and factors: leave out ",
                "rank and lora",
                "--rank and --lora",
            )
        return None
    if not all(adapters):
        whole = [str(one.path) for one, is_one in zip(inputs, adapters, strict=True) if not is_one]
        raise StructureError(
            f"{name_list(whole)} hold no LoRA adapter, as the other inputs do: average adapters with adapters, or "
            "merge each into its model and average the models"
        )
    if mode == "factors":
        if rank is not None:
            raise OptionError("means of factors have the rank of the inputs: leave out ", "rank", "--rank")
        return MeanOfFactors(inputs, dtype)
    return MeanOfUpdates([Adapter(checkpoint) for checkpoint in inputs], coefficients, rank, dtype)


class MeanOfUpdates:
    """Σ a_k s_k B_k A_k of every module, cut back to a rank.

    Attributes:
        layout: of the output, with PEFT's config where the inputs have one.
        averaged: names of the tensors that are no factors, whose means are the ordinary ones.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        coefficients: Sequence[float],
        rank: int | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._adapters = adapters
        self._coefficients = coefficients
        self._first = first = adapters[0]
        _refuse_unlike(adapters)
        _refuse_needless_rank(adapters, rank)
        self.averaged = first.full
        self._ranks = {
            factors.a: rank or max(adapter.rank(factors) for adapter in adapters) for factors in first.modules
        }
        self._keeps_config = all(
            self._ranks[factors.a] == first.rank(factors) and first.scales[factors.a] > 0
            for factors in first.modules
        )
        _refuse_changed_base(adapters, self._keeps_config)
        self._alphas = {
            factors.alpha: self._alpha(factors, dtype)
            for factors in first.modules
            if factors.alpha in first.checkpoint.tensors
        }
        self.layout = self._layout(dtype)
        self._squares: dict[str, tuple[float, float]] = {}

    def _alpha(self, factors: Factors, dtype: torch.dtype | None) -> Tensor:
        """Alpha as it is written: that of the first input where the rank is the same, else one that scales by 1."""
        rank, scale = self._ranks[factors.a], self._first.scales[factors.a]
        info = self._first.checkpoint.tensors[factors.alpha]
        keeps = rank == self._first.rank(factors) and scale > 0
        alpha = scale * rank if keeps else rank
        return torch.full(info.shape, alpha, dtype=_output_dtype([info.dtype], dtype))

    def _scale(self, factors: Factors) -> float:
        """By how much the update is scaled where the output is loaded."""
        if factors.alpha in self._alphas:
            return self._alphas[factors.alpha].item() / self._ranks[factors.a]
        return self._first.scales[factors.a] if self._keeps_config and self._first.config else 1.0

    def _layout(self, dtype: torch.dtype | None) -> Layout:
        tensors = dict(self._first.checkpoint.tensors)
        tensors |= {name: TensorInfo.of(alpha) for name, alpha in self._alphas.items()}
        for name in self.averaged:
            if tensors[name].dtype.is_floating_point:
                tensors[name] = replace(tensors[name], dtype=dtype or tensors[name].dtype)
        for factors in self._first.modules:
            (_, *inputs), (outputs, _, *kernel) = tensors[factors.a].shape, tensors[factors.b].shape
            rank = self._ranks[factors.a]
            for name, shape in ((factors.a, (rank, *inputs)), (factors.b, (outputs, rank, *kernel))):
                dtypes = [adapter.checkpoint.tensors[name].dtype for adapter in self._adapters]
                tensors[name] = TensorInfo(shape, _output_dtype(dtypes, dtype))
        ties = {tied: name for tied, name in self._first.checkpoint.ties.items() if tied in self.averaged}
        config = self._config()
        is_of_diffusers = is_file_of_diffusers(self._first.checkpoint.path)
        of_diffusers: dict[str, Any] = {"stem": DIFFUSERS_STEM} if is_of_diffusers else {}
        return Layout(
            {name: info for name, info in tensors.items() if name not in ties},
            ties,
            **(_peft_folder(config) if config is not None else of_diffusers),
        )

    def metadata(self, agreed: Mapping[str, str]) -> dict[str, str]:
        """What all inputs say alike beside their tensors, where it is true of the average."""
        alphas = [alpha.item() for alpha in self._alphas.values()]
        is_changed = any(
            self._ranks[factors.a] != self._first.rank(factors)
            or self._scale(factors) != self._first.scales[factors.a]
            for factors in self._first.modules
        )
        return metadata_of_average(agreed, self._ranks.values(), alphas, is_changed)

    def _config(self) -> dict[str, Any] | None:
        """PEFT's config of the output: the first input's, or one by which every update is scaled by 1."""
        config = self._first.config
        if config is None or self._keeps_config:
            return config
        r = Counter(self._ranks.values()).most_common(1)[0][0]
        pattern = {
            f"^{re.escape(factors.base_module)}": self._ranks[factors.a]
            for factors in self._first.modules
            if self._ranks[factors.a] != r
        }
        return config | {
            "r": r,
            "lora_alpha": r,
            "use_rslora": False,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
        }

    def write(self, writer: Writer, progress: Progress | None = None) -> None:
        """Read, average, decompose and write the factors, one module at a time.

        Raises ``NonFiniteError`` for NaN and infinity in the inputs, and for results beyond the output's dtype.
        """
        counted = [
            (adapter, a) for adapter, a in zip(self._adapters, self._coefficients, strict=True) if a != 0
        ]
        nbytes = {
            name: sum(adapter.checkpoint.tensors[name].nbytes for adapter, _ in counted)
            for factors in self._first.modules
            for name in (factors.a, factors.b)
        }
        done = 0
        for factors in self._first.modules:
            a, b, self._squares[factors.module] = product_of_rank(
                self._ranks[factors.a],
                [adapter.read(factors.b) for adapter, _ in counted],
                [
                    coefficient * adapter.scales[factors.a] * adapter.read(factors.a)
                    for adapter, coefficient in counted
                ],
            )
            root = math.sqrt(self._scale(factors))
            self._put(writer, factors.a, a / root)
            self._put(writer, factors.b, b / root)
            done += nbytes[factors.a] + nbytes[factors.b]
            if progress is not None:
                progress(done, sum(nbytes.values()))
        for name, alpha in self._alphas.items():
            writer.write(name, 0, alpha.view(-1))

    def _put(self, writer: Writer, name: str, values: Tensor) -> None:
        dtype = self.layout.tensors[name].dtype
        written = on_host(values.to(dtype))
        if not written.isfinite().all():
            raise NonFiniteError(
                f"the average of tensor {name!r} is too large for {dtype}, it comes out as "
                f"{values.abs().max().item():.3g}: choose a wider dtype"
            )
        writer.write(name, 0, written)

    def notes(self, output_is_folder: bool) -> list[str]:
        """What was averaged, how much of it the rank keeps, and with which config it is to be loaded."""
        counted = sum(a != 0 for a in self._coefficients)
        updates = "1 update" if counted == 1 else f"{counted} updates"
        ranks = sorted(set(self._ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        notes = [f"LoRA: the mean of {updates}, {shown}{self._kept()}"]
        alphas = {str(one.config.get("lora_alpha")): None for one in self._adapters if one.config}
        if len(alphas) > 1:
            notes.append(
                f"the adapters' lora_alpha differ, {name_list(list(alphas))}: each update counts with its own"
            )
        bases = {str(one.config.get("base_model_name_or_path")) for one in self._adapters if one.config}
        if len(bases) > 1:
            notes.append(f"the adapters name different base models: {name_list(sorted(bases))}")
        if self._first.config is not None and not output_is_folder:
            notes.append(self._config_note())
        return notes

    def _kept(self) -> str:
        if not self._squares:
            return ""
        kept, whole = (math.fsum(squares) for squares in zip(*self._squares.values(), strict=True))
        worst = min(self._squares, key=lambda module: _share(*self._squares[module]))
        return f", keeps {_share(kept, whole):.1%} of its norm (worst {_share(*self._squares[worst]):.1%} in {worst})"

    def _config_note(self) -> str:
        if self._keeps_config:
            return f"PEFT loads the output with the {CONFIG_NAME} of {self._first.checkpoint.path.name} beside it"
        config = self._config() or {}
        entries = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        return (
            f"PEFT loads the output with an {CONFIG_NAME} beside it that says "
            f"{json.dumps({entry: config[entry] for entry in entries})}: an output without a suffix is a folder with it"
        )


def product_of_rank(
    rank: int, bs: Sequence[Tensor], scaled_as: Sequence[Tensor]
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Factors of the best approximation of rank ``rank`` to Σ B_k A_k, both with the same singular values.

    Args:
        rank: of what is returned, with zeros where the sum has a smaller one.
        bs: of shape (outputs, r_k) each.
        scaled_as: of shape (r_k, inputs) each.

    Returns:
        A of shape (rank, inputs), B of shape (outputs, rank), and the squared Frobenius norms of B A and of the sum.

    >>> a, b, (kept, whole) = product_of_rank(1, [torch.eye(2)], [torch.tensor([[3.0, 0.0], [0.0, 4.0]])])
    >>> (b @ a).round(decimals=3).tolist(), round(kept, 3), round(whole, 3)
    ([[0.0, 0.0], [0.0, 4.0]], 16.0, 25.0)
    """
    q_b, r_b = torch.linalg.qr(torch.cat(list(bs), dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat(list(scaled_as), dim=0).T)
    u, singular, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    k = min(rank, len(singular))
    root = singular[:k].sqrt()
    a = torch.zeros(rank, len(q_a), dtype=root.dtype)
    b = torch.zeros(len(q_b), rank, dtype=root.dtype)
    a[:k] = root[:, None] * (vh[:k] @ q_a.T)
    b[:, :k] = q_b @ u[:, :k] * root
    squares = singular.square()
    return a, b, (squares[:k].sum().item(), squares.sum().item())


def _share(kept: float, whole: float) -> float:
    """Of the Frobenius norm; an update that is zero is kept."""
    return math.sqrt(kept / whole) if whole else 1.0


def _output_dtype(dtypes: Sequence[torch.dtype], wanted: torch.dtype | None) -> torch.dtype:
    """The widest; an integer alpha stays one."""
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return wanted if wanted is not None and widest.is_floating_point else widest


def _peft_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a folder that PEFT loads."""
    content = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    return {"beside": {CONFIG_NAME: content}, "stem": _STEM}


# What must be alike in all inputs.


def _refuse_unlike(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    expected = first.signature()
    differences = [
        (other.checkpoint.path, Difference.of(expected, other.signature())) for other in adapters[1:]
    ]
    if problems := [f"{path} {difference}" for path, difference in differences if difference]:
        raise StructureError(
            f"the adapters do not change the same modules: compared with {first.checkpoint.path}, "
            f"{'; '.join(problems)}. Average adapters of one kind, or merge each into its model and average the models"
        )
    if entries := common_entries_differ([adapter.config for adapter in adapters]):
        raise StructureError(
            f"the adapters differ in {name_list(entries)} of their {CONFIG_NAME}: average others"
        )


def _refuse_needless_rank(adapters: Sequence[Adapter], rank: int | None) -> None:
    """A rank that no matrix of these shapes has fills the file with zeros, or the memory."""
    largest = max(adapter.largest_rank(factors) for adapter in adapters for factors in adapter.modules)
    if rank is not None and rank > largest:
        raise OptionError(f"no update of these adapters can have a rank above {largest}, got {rank}")


# These take something out of the model's weights when they begin, as much as their rank and config say.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")


def _refuse_changed_base(adapters: Sequence[Adapter], keeps_config: bool) -> None:
    inits = [str((adapter.config or {}).get("init_lora_weights")).lower() for adapter in adapters]
    changing = [init for init in inits if init.startswith(_INITS_THAT_CHANGE_THE_BASE)]
    first = adapters[0]
    same_ranks = all(
        adapter.rank(factors) == first.rank(factors) for adapter in adapters for factors in first.modules
    )
    if changing and not (keeps_config and same_ranks and len(set(inits)) == 1):
        raise refusal(
            f"adapters that began with {changing[0]} stand on a model without its leading part, which is another one "
            "for every rank: save them as plain LoRA first (path_initial_model_for_weight_conversion of PEFT's "
            "save_pretrained), or give all the same rank and keep it"
        )


# The means of the factors, where they are asked for.


class MeanOfFactors:
    """Averages of A and of B, each by itself, as of any other tensors.

    Attributes:
        layout: of the output, with the first input's PEFT config.
        averaged: names of all tensors.
    """

    def __init__(self, inputs: Sequence[Checkpoint], dtype: torch.dtype | None) -> None:
        self._n_inputs = len(inputs)
        configs = [read_config(checkpoint) for checkpoint in inputs]
        _refuse_unlike_scales(inputs, configs)
        self.layout = _inputs.common_layout(inputs, dtype)
        self.averaged = list(self.layout.tensors)
        if configs[0] is not None:
            self.layout = replace(self.layout, **_peft_folder(configs[0]))
        elif is_file_of_diffusers(inputs[0].path):
            self.layout = replace(self.layout, stem=DIFFUSERS_STEM)

    def metadata(self, agreed: Mapping[str, str]) -> dict[str, str]:
        """What all inputs say alike beside their tensors."""
        return dict(agreed)

    def write(self, writer: Writer, progress: Progress | None = None) -> None:
        """Nothing: all tensors are ordinary ones."""

    def notes(self, output_is_folder: bool) -> list[str]:
        """What the means of factors are."""
        return [
            f"LoRA: the means of {self._n_inputs} inputs' factors, each by itself: mean(B) mean(A), which is not the "
            "mean of the updates B A and may be far from it"
        ]


_SCALING_ENTRIES = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def _refuse_unlike_scales(inputs: Sequence[Checkpoint], configs: Sequence[Mapping[str, Any] | None]) -> None:
    scales = [_scaling(checkpoint, config) for checkpoint, config in zip(inputs, configs, strict=True)]
    for checkpoint, scaling in zip(inputs[1:], scales[1:], strict=True):
        for entry, expected in scales[0].items():
            # An empty pattern and none are the same.
            if entry in scaling and (expected or None) != (scaling[entry] or None):
                raise _unlike_scales(inputs[0], checkpoint, entry, expected, scaling[entry])


def _scaling(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> dict[str, object]:
    """What says by how much updates are scaled."""
    scaling: dict[str, object] = {entry: (config or {}).get(entry) for entry in _SCALING_ENTRIES}
    for name, info in checkpoint.tensors.items():
        if (factors := factors_of(name)) is not None:
            scaling[f"the rank of {factors.module!r}"] = info.shape[0]
            saved = config_in_metadata(checkpoint, factors) or {}
            scaling |= {f"{entry} of {factors.module!r}": saved.get(entry) for entry in _SCALING_ENTRIES}
        elif name.endswith(".alpha"):
            scaling[name] = checkpoint.read(name).tolist()
    return scaling


def _unlike_scales(
    first: Checkpoint, other: Checkpoint, entry: str, expected: object, found: object
) -> StructureError:
    return StructureError(
        f"means of factors need the same scale in all inputs, but {first.path} has {entry} {expected} and {other.path} "
        f"{found}: average the updates instead, ",
        'with lora="product"',
        "with --lora product",
    )
