"""LoRA adapters as files: which two factors make the update of a module, and by how much it is scaled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints import Checkpoint, TensorInfo
from polyak.checkpoints._huggingface import library_stem
from polyak.errors import CheckpointError, NonFiniteError, PolyakError, StructureError, name_list

__all__ = [
    "CONFIG_NAME",
    "DIFFUSERS_STEM",
    "Adapter",
    "Factors",
    "common_entries_differ",
    "config_in_metadata",
    "factors_of",
    "is_adapter",
    "is_file_of_diffusers",
    "metadata_of_average",
    "read_config",
    "refusal",
]

# What the tools call the factors. An update is s B A, with A of shape (rank, inputs) and B of shape (outputs, rank).

CONFIG_NAME = "adapter_config.json"
# The name of A, after that of its module, and that of B: of PEFT, of kohya and LyCORIS, of early diffusers.
_B_OF_A = {
    "lora_A": "lora_B",
    "lora_embedding_A": "lora_embedding_B",
    "lora_down": "lora_up",
    "lora.down": "lora.up",
}
# PEFT puts the name of an adapter between, except where it saves one alone.
_FACTOR_A = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_embedding_A|lora_down|lora\.down)(?P<end>(\.[\w-]+)??(\.weight)?)"
)
_PEFT_FACTORS = ("lora_A", "lora_embedding_A")
_PEFT_PREFIX = "base_model.model."
# Updates that are no product of two factors, by a part of a tensor's name.
_OTHER_UPDATES = {
    re.compile(r"\.(lora_magnitude_vector|dora_scale)(\.|$)"): "DoRA",
    re.compile(r"\.hada_(w|t)\d"): "LoHa",
    re.compile(r"\.lokr_(w|t)\d"): "LoKr",
    re.compile(r"\.lora_mid(\.|$)"): "LoCon with a third factor",
    re.compile(r"^lora_\w+\.scalar$"): "LyCORIS with a trained scale",
    re.compile(r"\.lora_(E|ranknum)(\.|$)"): "AdaLoRA",
    re.compile(r"\.lora_[ab]$"): "LoRA as MLX saves it",
    re.compile(r"\.lora_(A|B|down|up)(\.[\w-]+)?\.bias$"): "LoRA with biases of its own (lora_bias)",
}
# One of these is in the name of every factor of every kind.
_MARKS = ("lora", "dora", "hada", "lokr")
# kohya's names begin with lora_unet_ or lora_te_: the module is one word.
_UNKNOWN_PART = re.compile(r"^[^.]+(\.[^.]+)*\.lora[_.]")


@dataclass(frozen=True)
class Factors:
    """Names of the two factors of a module's update.

    Attributes:
        module: the name before theirs.
        a, b: the tensors; A has the rank as its first dimension.
        alpha: the tensor that holds alpha, whether or not the file has it.
        is_peft: whether alpha is in the config where there is no such tensor.
    """

    module: str
    a: str
    b: str

    @property
    def alpha(self) -> str:
        return f"{self.module}.alpha"

    @property
    def is_peft(self) -> bool:
        return self.a[len(self.module) + 1 :].startswith(_PEFT_FACTORS)

    @property
    def base_module(self) -> str:
        """The module's name in the model that is adapted, by which PEFT's config knows it."""
        return self.module.removeprefix(_PEFT_PREFIX)


def factors_of(name: str) -> Factors | None:
    """The pair of factors to which a tensor of this name is A; None if it is no such factor.

    >>> factors_of("base_model.model.q_proj.lora_A.weight").b
    'base_model.model.q_proj.lora_B.weight'
    >>> factors_of("lora_unet_mid_block.lora_down.weight").b
    'lora_unet_mid_block.lora_up.weight'
    """
    found = _FACTOR_A.fullmatch(name)
    if found is None:
        return None
    b = f"{found['module']}.{_B_OF_A[found['factor']]}{found['end']}"
    return Factors(found["module"], name, b)


def _other_update(name: str) -> str | None:
    return next((kind for pattern, kind in _OTHER_UPDATES.items() if pattern.search(name)), None)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether any tensor is, by its name, a factor of a low-rank update."""
    marked = (name for name in checkpoint.tensors if any(mark in name for mark in _MARKS))
    return any(factors_of(name) or _other_update(name) for name in marked)


# diffusers puts the name of the pipeline's component before that of the module; without a word about alpha it is the
# rank, so that updates are scaled by 1.
DIFFUSERS_STEM = "pytorch_lora_weights"
_COMPONENT = re.compile(
    r"(unet|transformer(_\d)?|text_encoder(_\d)?|prior|denoiser|controlnet|diffusion_model)\."
)
# Its newer files hold PEFT's config in their metadata, each entry after the name of the component.
_DIFFUSERS_CONFIG = "lora_adapter_metadata"
# What kohya's files say about the factors, and about the bytes of the file.
_KOHYA_RANK, _KOHYA_ALPHA, _KOHYA_OTHERS = "ss_network_dim", "ss_network_alpha", ("ss_network_args",)
_KOHYA_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


def is_file_of_diffusers(path: Path) -> bool:
    """Whether a file, or the weights' file of a folder, has the name that diffusers gives to adapters."""
    return (library_stem(path) if path.is_dir() else path.name.partition(".")[0]) == DIFFUSERS_STEM


def config_in_metadata(checkpoint: Checkpoint, factors: Factors) -> dict[str, Any] | None:
    """PEFT's config of a component in the metadata of diffusers; None where there is none.

    Raises ``CheckpointError`` if it cannot be read.
    """
    text = checkpoint.metadata.get(_DIFFUSERS_CONFIG)
    if text is None:
        return None
    component = _COMPONENT.match(factors.module)
    prefix = component[0] if component else ""
    try:
        entries = json.loads(text)
        config = {key[len(prefix) :]: value for key, value in entries.items() if key.startswith(prefix)}
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} is damaged: {_DIFFUSERS_CONFIG!r} in its metadata must be a JSON object"
        ) from error
    return config or None


def metadata_of_average(
    metadata: Mapping[str, str], ranks: Collection[int], alphas: Collection[float], is_changed: bool
) -> dict[str, str]:
    """The inputs' metadata without what is not true of their average, and with its ranks and alphas."""
    kept = {key: text for key, text in metadata.items() if key not in (_DIFFUSERS_CONFIG, *_KOHYA_HASHES)}
    if not is_changed:
        return kept
    for entry, values in ((_KOHYA_RANK, ranks), (_KOHYA_ALPHA, alphas)):
        if entry in kept and len(set(values)) == 1:
            kept[entry] = str(next(iter(values)))
        else:
            kept.pop(entry, None)
    return {key: text for key, text in kept.items() if key not in _KOHYA_OTHERS}


# PEFT's config, which lies beside the weights.

# Each of these changes what the factors stand for.
_OTHER_METHODS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "target_parameters",
)
# Without these two alike, the tensors that are averaged as they are do not mean the same.
_COMMON_ENTRIES = ("trainable_token_indices", "alora_invocation_tokens")


def read_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """PEFT's ``adapter_config.json`` in the folder of the weights; None where there is none.

    Raises ``CheckpointError`` if it cannot be read.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    file = folder / CONFIG_NAME
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError):
        config = None
    if isinstance(config, dict):
        return config
    raise CheckpointError(f"{file} is damaged: it must hold a JSON object")


def refusal(message: str) -> PolyakError:
    """The error for updates that cannot be averaged as products, with both ways out."""
    before = f"{message}. Merge each adapter into its model and average the merged models, or average the factors as "
    return StructureError(
        before,
        'they are with lora="factors", which gives another model',
        "they are with --lora factors, which does too",
    )


def _pattern_value(config: Mapping[str, Any], entry: str, default: str, module: str) -> Any:
    """What PEFT takes for a module: the value of the first pattern that matches the end of its name."""
    for pattern, value in (config.get(entry) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]


# An opened adapter: its modules and their scales.


class Adapter:
    """The low-rank updates in an opened checkpoint, whose factors are not read yet.

    Attributes:
        checkpoint: what was opened.
        config: PEFT's config; None where the file is of another tool.
        modules: the factors' names of each module that is adapted.
        scales: s of the update s B A, by the name of A.
        full: names of the tensors that are no part of an update, such as biases and whole modules.

    Raises ``StructureError`` for what is no sum of products of two factors, and where alpha is not known.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        names = checkpoint.tensors
        self._refuse_other_tensors()
        self.modules = [factors for name in names if (factors := factors_of(name)) is not None]
        for factors in self.modules:
            self._check_shapes(factors)
        parts = {part for factors in self.modules for part in (factors.a, factors.b, factors.alpha)}
        self.full = [name for name in names if name not in parts]
        self._refuse_unknown_parts()
        self.config = read_config(checkpoint) if any(factors.is_peft for factors in self.modules) else None
        if self.config is not None:
            self._refuse_other_methods(self.config)
        self.scales = {factors.a: self._scale(factors) for factors in self.modules}

    def rank(self, factors: Factors) -> int:
        """The inner dimension of the product."""
        return self.checkpoint.tensors[factors.a].shape[0]

    def largest_rank(self, factors: Factors) -> int:
        """The most that is of use: what a matrix of the update's shape can have, or its factors do have."""
        tensors = self.checkpoint.tensors
        (rank, *inputs), (outputs, *_) = tensors[factors.a].shape, tensors[factors.b].shape
        return max(rank, min(outputs, math.prod(inputs)))

    def signature(self) -> dict[str, TensorInfo]:
        """What must be the same in every input: all tensors, whatever the ranks, scales and dtypes of factors."""
        tensors = self.checkpoint.tensors
        signature = {name: tensors[name] for name in self.full}
        for factors in self.modules:
            (_, *inputs), (outputs, _, *kernel) = tensors[factors.a].shape, tensors[factors.b].shape
            signature[factors.a] = TensorInfo((1, *inputs), torch.float32)
            signature[factors.b] = TensorInfo((outputs, 1, *kernel), torch.float32)
        return signature

    def read(self, name: str) -> Tensor:
        """A factor as a float64 matrix, kernels of convolutions flattened. Raises ``NonFiniteError``."""
        values = self.checkpoint.read(name).double().flatten(1)
        if not values.isfinite().all():
            raise NonFiniteError(
                f"{self.checkpoint.path}: tensor {name!r} holds NaN or infinity; leave this checkpoint out"
            )
        return values

    def _refuse_other_tensors(self) -> None:
        kinds = {name: kind for name in self.checkpoint.tensors if (kind := _other_update(name))}
        if kinds:
            name, kind = next(iter(kinds.items()))
            raise refusal(
                f"{self.checkpoint.path} holds {kind} ({name!r}), whose updates are no products of two factors"
            )

    def _refuse_unknown_parts(self) -> None:
        unknown = [name for name in self.full if _UNKNOWN_PART.search(name)]
        if unknown:
            raise refusal(
                f"{self.checkpoint.path} holds parts of updates that are not known: {name_list(unknown)}"
            )

    def _refuse_other_methods(self, config: Mapping[str, Any]) -> None:
        kind = str(config.get("peft_type", "LORA"))
        if kind.upper() != "LORA":
            raise refusal(f"{self.checkpoint.path} is an adapter of type {kind}, not LORA")
        methods = [entry for entry in _OTHER_METHODS if config.get(entry)]
        if methods:
            raise refusal(
                f"the updates of {self.checkpoint.path} are no products of two factors: its {CONFIG_NAME} has "
                f"{name_list(methods)}"
            )

    def _check_shapes(self, factors: Factors) -> None:
        tensors = self.checkpoint.tensors
        if factors.b not in tensors:
            raise StructureError(f"{self.checkpoint.path} lacks {factors.b!r}, the factor of {factors.a!r}")
        a, b = tensors[factors.a], tensors[factors.b]
        is_product = (
            len(a.shape) >= 2
            and len(b.shape) >= 2
            and a.shape[0] == b.shape[1] == math.prod(b.shape[1:]) > 0
            and a.dtype.is_floating_point
            and b.dtype.is_floating_point
        )
        if not is_product:
            raise refusal(
                f"{self.checkpoint.path}: {factors.b!r}, {b}, and {factors.a!r}, {a}, are no factors of a product"
            )

    def _scale(self, factors: Factors) -> float:
        rank = self.rank(factors)
        if factors.alpha in self.checkpoint.tensors:
            return self._alpha(factors) / rank
        if not factors.is_peft:
            return 1.0
        config = self.config or config_in_metadata(self.checkpoint, factors)
        if config is not None:
            self._refuse_other_methods(config)
            return _configured_scale(config, factors, rank, self.checkpoint)
        if _COMPONENT.match(factors.module) or is_file_of_diffusers(self.checkpoint.path):
            return 1.0
        raise refusal(
            f"{self.checkpoint.path} has no {CONFIG_NAME} beside it, which says alpha, by which updates are scaled"
        )

    def _alpha(self, factors: Factors) -> float:
        info = self.checkpoint.tensors[factors.alpha]
        if info.numel != 1:
            raise refusal(f"{self.checkpoint.path}: {factors.alpha!r}, {info}, is not one number")
        alpha = self.checkpoint.read(factors.alpha).item()
        if not math.isfinite(alpha):
            raise NonFiniteError(
                f"{self.checkpoint.path}: {factors.alpha!r} is {alpha}; leave this checkpoint out"
            )
        return alpha


def _configured_scale(
    config: Mapping[str, Any], factors: Factors, rank: int, checkpoint: Checkpoint
) -> float:
    try:
        expected = int(_pattern_value(config, "rank_pattern", "r", factors.base_module))
        alpha = float(_pattern_value(config, "alpha_pattern", "lora_alpha", factors.base_module))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"the {CONFIG_NAME} of {checkpoint.path} does not say r and lora_alpha: {error}"
        ) from error
    if expected != rank or not math.isfinite(alpha):
        raise StructureError(
            f"the {CONFIG_NAME} of {checkpoint.path} is not of these weights: it gives {factors.base_module!r} rank "
            f"{expected} and alpha {alpha:g}, and its factors have rank {rank}"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def common_entries_differ(configs: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Entries that every config must have alike, and has not."""
    present = [config for config in configs if config is not None]
    return [
        entry
        for entry in _COMMON_ENTRIES
        if any(config.get(entry) != present[0].get(entry) for config in present)
    ]
