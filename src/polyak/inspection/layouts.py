"""Two checkpoints' headers, held against each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from polyak.checkpoints import Checkpoint
from polyak.inspection.contents import dtype_name

__all__ = ["Change", "LayoutDifference", "compare_layouts"]


@dataclass(frozen=True)
class Change:
    """A tensor whose shape or dtype is ``first`` in one checkpoint and ``second`` in the other."""

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class LayoutDifference:
    """How the names, shapes, dtypes and ties of two checkpoints differ; false where they agree.

    Attributes:
        missing: names that only the first has.
        extra: names that only the second has.
        reshaped, retyped: names that both have, with what changed.
        retied: names that both have, tied to other names in one than in the other.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[Change, ...]
    retyped: tuple[Change, ...]
    retied: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Every name that is not the same in both."""
        changed = {change.name for change in self.reshaped + self.retyped}
        return changed | {*self.missing, *self.extra, *self.retied}

    def __bool__(self) -> bool:
        return bool(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def compare_layouts(first: Checkpoint, second: Checkpoint) -> LayoutDifference:
    """Compare two opened checkpoints by name; no tensor is read.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from polyak import checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> a, b = Path(folder.name) / "a.safetensors", Path(folder.name) / "b.safetensors"
    >>> checkpoints.write(a, {"w": torch.zeros(2, 3), "old": torch.zeros(1)})
    >>> checkpoints.write(b, {"w": torch.zeros(3, 2)})
    >>> difference = compare_layouts(checkpoints.open(a), checkpoints.open(b))
    >>> difference.missing, difference.reshaped
    (('old',), (Change(name='w', first='2 x 3', second='3 x 2'),))
    >>> folder.cleanup()
    """
    ours, theirs = first.tensors, second.tensors
    common = [name for name in ours if name in theirs]
    shapes = ((name, shape_text(ours[name].shape), shape_text(theirs[name].shape)) for name in common)
    dtypes = ((name, dtype_name(ours[name].dtype), dtype_name(theirs[name].dtype)) for name in common)
    our_groups, their_groups = _tied_groups(first, set(common)), _tied_groups(second, set(common))
    return LayoutDifference(
        missing=tuple(name for name in ours if name not in theirs),
        extra=tuple(name for name in theirs if name not in ours),
        reshaped=tuple(Change(*change) for change in shapes if change[1] != change[2]),
        retyped=tuple(Change(*change) for change in dtypes if change[1] != change[2]),
        retied=tuple(name for name in common if our_groups[name] != their_groups[name]),
    )


def _tied_groups(checkpoint: Checkpoint, names: set[str]) -> dict[str, frozenset[str]]:
    """Each of ``names`` with those of ``names`` that hold the same tensor; which one comes first is no matter."""
    members: dict[str, set[str]] = {}
    for name in names:
        members.setdefault(checkpoint.ties.get(name, name), set()).add(name)
    groups = {first: frozenset(tied) for first, tied in members.items()}
    return {name: groups[checkpoint.ties.get(name, name)] for name in names}


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape for people.

    >>> shape_text((2, 3)), shape_text(())
    ('2 x 3', 'scalar')
    """
    return " x ".join(map(str, shape)) or "scalar"
