"""One checkpoint, described from its headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from polyak.checkpoints import Checkpoint

__all__ = ["CheckpointSummary", "DtypeShare", "Origin", "TensorSummary", "dtype_name", "summarise_checkpoint"]


@dataclass(frozen=True)
class Origin:
    """Where weights came from: path, format, nested key with its note, and training step."""

    path: str
    format: str
    key: str | None
    note: str
    step: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Origin:
        """The origin of an opened checkpoint's weights."""
        return cls(str(checkpoint.path), checkpoint.format, checkpoint.key, checkpoint.note, checkpoint.step)


@dataclass(frozen=True)
class TensorSummary:
    """One name in a checkpoint; ``tied_to`` is the first name of the same tensor, where this is a further one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    nbytes: int
    tied_to: str | None


@dataclass(frozen=True)
class DtypeShare:
    """How many tensors, elements and bytes are of one dtype."""

    tensors: int
    numel: int
    nbytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint holds.

    Attributes:
        origin: path, format, key, note and step.
        is_lazy: False if the format forces the whole file into memory.
        tensors: every name, in the checkpoint's order.
        found_keys: all the well-known keys with weights, the preferred one first.
        ignored: entries that are no weights, or belong to another key.
        metadata: text beside the weights, polyak's provenance among it.
    """

    origin: Origin
    is_lazy: bool
    tensors: tuple[TensorSummary, ...]
    found_keys: tuple[str, ...]
    ignored: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def stored(self) -> tuple[TensorSummary, ...]:
        """The tensors, tied ones once."""
        return tuple(tensor for tensor in self.tensors if tensor.tied_to is None)

    @property
    def numel(self) -> int:
        """Elements of all tensors, tied ones once."""
        return sum(tensor.numel for tensor in self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones once."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def dtypes(self) -> dict[str, DtypeShare]:
        """The share of each dtype, most bytes first; tied tensors count once."""
        members: dict[str, list[TensorSummary]] = {}
        for tensor in self.stored:
            members.setdefault(tensor.dtype, []).append(tensor)
        shares = {
            dtype: DtypeShare(len(those), sum(t.numel for t in those), sum(t.nbytes for t in those))
            for dtype, those in members.items()
        }
        return dict(sorted(shares.items(), key=lambda item: -item[1].nbytes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "kind": "checkpoint",
            **asdict(self.origin),
            "is_lazy": self.is_lazy,
            "numel": self.numel,
            "nbytes": self.nbytes,
            "dtypes": {dtype: asdict(share) for dtype, share in self.dtypes.items()},
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "found_keys": list(self.found_keys),
            "ignored": list(self.ignored),
            "metadata": self.metadata,
        }


def summarise_checkpoint(checkpoint: Checkpoint) -> CheckpointSummary:
    """Describe an opened checkpoint; no tensor is read.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from polyak import checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "model.safetensors"
    >>> weight = torch.zeros(2, 3, dtype=torch.bfloat16)
    >>> checkpoints.write(path, {"wte": weight, "head": weight})
    >>> summary = summarise_checkpoint(checkpoints.open(path))
    >>> summary.numel, summary.nbytes, summary.tensors[1]
    (6, 12, TensorSummary(name='head', dtype='bfloat16', shape=(2, 3), numel=6, nbytes=12, tied_to='wte'))
    >>> folder.cleanup()
    """
    return CheckpointSummary(
        origin=Origin.of(checkpoint),
        is_lazy=checkpoint.is_lazy,
        tensors=tuple(
            TensorSummary(
                name, dtype_name(info.dtype), info.shape, info.numel, info.nbytes, checkpoint.ties.get(name)
            )
            for name, info in checkpoint.tensors.items()
        ),
        found_keys=checkpoint.found_keys,
        ignored=checkpoint.ignored,
        metadata=checkpoint.metadata,
    )


def dtype_name(dtype: object) -> str:
    """A torch dtype as people say it.

    >>> import torch
    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")
