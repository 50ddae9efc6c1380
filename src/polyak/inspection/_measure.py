"""What checkpoints hold, how far apart they are, and how weights moved between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from polyak._checks import Difference
from polyak.checkpoints import Checkpoint
from polyak.combine import is_averaged
from polyak.combine._engine import as_reals
from polyak.errors import StructureError, name_list

__all__ = [
    "Change",
    "CheckpointSummary",
    "Comparison",
    "LayoutDifference",
    "Movement",
    "Neighbour",
    "Origin",
    "TensorDifference",
    "TensorSummary",
    "compare_checkpoints",
    "compare_layouts",
    "measure_movement",
    "summarise_checkpoint",
]

# One checkpoint, described from its headers alone.


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


# Two checkpoints' headers, held against each other.


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
    found = Difference.of(first.tensors, second.tensors)
    shapes = ((name, shape_text(a.shape), shape_text(b.shape)) for name, (a, b) in found.changed.items())
    dtypes = ((name, dtype_name(a.dtype), dtype_name(b.dtype)) for name, (a, b) in found.changed.items())
    common = [name for name in first.tensors if name in second.tensors]
    our_groups, their_groups = _tied_groups(first, set(common)), _tied_groups(second, set(common))
    return LayoutDifference(
        missing=found.missing,
        extra=found.added,
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


# Inner products of weights, streamed: all that distances and cosines need.

# A slice and what is worked out from it take some 10 MB, and stay in cache better than larger ones would.
_SLICE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Products:
    """``‖a‖²``, ``‖b‖²``, ``a·b`` and ``‖a − b‖²``; those of pieces add up to those of the whole.

    >>> both = products(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    >>> both.cosine, both.relative_distance
    (0.6, 1.3333333333333333)
    """

    first: float = 0.0
    second: float = 0.0
    cross: float = 0.0
    difference: float = 0.0

    def __add__(self, other: Products) -> Products:
        return Products(
            self.first + other.first,
            self.second + other.second,
            self.cross + other.cross,
            self.difference + other.difference,
        )

    @property
    def relative_distance(self) -> float | None:
        """``‖a − b‖ / ‖a‖``; 0 where both are zero, None where only ``a`` is."""
        if self.difference == 0:
            return 0.0
        return _finite_or_none(math.sqrt(self.difference) / math.sqrt(self.first)) if self.first else None

    @property
    def cosine(self) -> float | None:
        """``a·b / (‖a‖ ‖b‖)``; None where one is zero."""
        return cosine(self.cross, self.first, self.second)


def cosine(cross: float, first: float, second: float) -> float | None:
    """``a·b / (‖a‖ ‖b‖)`` from ``a·b``, ``‖a‖²`` and ``‖b‖²``; None where one is zero.

    >>> cosine(-2.0, 4.0, 1.0)
    -1.0
    """
    # The product of the squares could overflow where that of the roots does not.
    scale = math.sqrt(first) * math.sqrt(second)
    value = _finite_or_none(cross / scale) if scale else None
    return value if value is None else max(-1.0, min(1.0, value))


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def products(first: Tensor, second: Tensor) -> Products:
    """The inner products of two 1-D tensors of one dtype."""
    difference = first - second
    pairs = ((first, first), (second, second), (first, second), (difference, difference))
    return Products(*[float(torch.dot(one, other)) for one, other in pairs])


def slices(numel: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of the slices that cover ``numel`` elements.

    >>> list(slices(3)), list(slices(0))
    ([(0, 3)], [])
    """
    for start in range(0, numel, _SLICE_ELEMENTS):
        yield start, min(start + _SLICE_ELEMENTS, numel)


def read_float64(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Elements ``[start, stop)`` of a tensor as 1-D float64; a complex one counts as two real ones."""
    return as_float64(checkpoint.read_slice(name, start, stop))


def as_float64(values: Tensor) -> Tensor:
    """A 1-D tensor of any dtype as float64, real and imaginary parts side by side.

    >>> as_float64(torch.tensor([1 + 2j]))
    tensor([1., 2.], dtype=torch.float64)
    """
    return as_reals(values).to(torch.float64)


# How a run moved through weight space: drifting on, or circling around one place.

# The least mean turn, its name, what it means. Of the squares the drift is then twice the scatter, or 40% of it.
_KINDS = (
    (0.25, "Drifting", "A long average may lag behind: compare it with shorter ones on validation data."),
    (-0.25, "Between drifting and circling", "Let validation choose how long to average."),
    (-math.inf, "Circling", "Averaging this part removes scatter at little cost."),
)


@dataclass(frozen=True)
class Neighbour:
    """How weights lie to those before them.

    Attributes:
        relative_distance: ``‖b_k − b_{k−1}‖ / ‖b_{k−1}‖``; None where the former weights are zero.
        cosine: of ``b_k`` and ``b_{k−1}``; None where either is zero.
        turn: cosine of this displacement and the one before; None for the first, and where nothing moved.
    """

    relative_distance: float | None
    cosine: float | None
    turn: float | None


@dataclass(frozen=True)
class Movement:
    """The path through weight space.

    Attributes:
        neighbours: one for each of the weights but the first.
        straightness: ``‖b_K − b_1‖ / Σ ‖d_k‖``, 1 on a straight line; None where nothing moved.
    """

    neighbours: tuple[Neighbour, ...]
    straightness: float | None

    @property
    def late_turns(self) -> tuple[float, ...]:
        """The turns of the second half, which is what a tail average sees; the beginning of any run drifts."""
        turns = [neighbour.turn for neighbour in self.neighbours if neighbour.turn is not None]
        return tuple(turns[len(turns) // 2 :])

    @property
    def finding(self) -> str:
        """Drifting or circling, in a sentence."""
        if not self.late_turns:
            return "Three different weights are needed to tell drifting from circling."
        turn, (_, kind, _) = mean(self.late_turns), self._kind
        return f"{kind}: over the second half the mean turn is {turn:+.2f} (1 straight on, -0.5 around one place)."

    @property
    def verdict(self) -> str:
        """The same, with what it means for averages; scores on validation data know better."""
        return f"{self.finding} {self._kind[2]}" if self.late_turns else self.finding

    @property
    def _kind(self) -> tuple[float, str, str]:
        turn = mean(self.late_turns)
        return next(kind for kind in _KINDS if turn >= kind[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def measure_movement(checkpoints: Sequence[Checkpoint]) -> Movement:
    """Measure the path through checkpoints in order, over their floating-point tensors as one vector.

    Each is read once, in slices; a few slices are held, whatever the sizes and however many there are. Elements
    that are not finite count as not moving.

    Raises ``StructureError`` if the checkpoints do not hold the same tensors, ``CheckpointError`` where one cannot
    be read.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from polyak import checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> opened = []
    >>> for step, place in enumerate([(0.0, 1.0), (0.0, 2.0), (2.0, 2.0), (1.0, 2.0)]):
    ...     path = Path(folder.name) / f"{step}.safetensors"
    ...     checkpoints.write(path, {"w": torch.tensor(place)})
    ...     opened.append(checkpoints.open(path))
    >>> [neighbour.turn for neighbour in measure_movement(opened).neighbours]
    [None, 0.0, -1.0]
    >>> folder.cleanup()
    """
    reference = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        _refuse_other_layout(reference, checkpoint)
    path = _Path(len(checkpoints))
    for name, info in reference.tensors.items():
        if name not in reference.ties and is_averaged(info.dtype):
            for start, stop in slices(info.numel):
                path.follow(read_float64(checkpoint, name, start, stop) for checkpoint in checkpoints)
    return path.movement()


def _refuse_other_layout(reference: Checkpoint, checkpoint: Checkpoint) -> None:
    ours, theirs = ({n: i.shape for n, i in c.tensors.items()} for c in (reference, checkpoint))
    if difference := Difference.of(ours, theirs):
        raise StructureError(
            f"{checkpoint.path} does not hold the tensors of {reference.path}: it {difference}"
        )


class _Path:
    """Squares and products along the path, added up slice by slice."""

    def __init__(self, count: int) -> None:
        self._square = [0.0] * count  # ‖b_k‖²
        self._cross = [0.0] * count  # b_k · b_{k−1}
        self._moved = [0.0] * count  # ‖d_k‖²
        self._turned = [0.0] * count  # d_k · d_{k−1}
        self._net = 0.0  # ‖b_K − b_1‖²

    def follow(self, places: Iterable[Tensor]) -> None:
        """Add one slice, given as the same elements of each of the weights in turn."""
        first = before = moved_before = None
        for k, place in enumerate(places):
            self._square[k] += _dot(place, place)
            if first is None or before is None:
                first = before = place
                continue
            moved = place - before
            self._cross[k] += _dot(place, before)
            self._moved[k] += _dot(moved, moved)
            if moved_before is not None:
                self._turned[k] += _dot(moved, moved_before)
            before, moved_before = place, moved
        if first is not None and before is not None:
            self._net += _dot(before - first, before - first)

    def movement(self) -> Movement:
        neighbours = [
            Neighbour(
                math.sqrt(self._moved[k] / self._square[k - 1]) if self._square[k - 1] else None,
                cosine(self._cross[k], self._square[k], self._square[k - 1]),
                cosine(self._turned[k], self._moved[k], self._moved[k - 1]),
            )
            for k in range(1, len(self._square))
        ]
        length = sum(map(math.sqrt, self._moved))
        return Movement(tuple(neighbours), math.sqrt(self._net) / length if length else None)


def _dot(first: Tensor, second: Tensor) -> float:
    """The inner product, in which NaN and infinities count as zeros."""
    product = float(torch.dot(first, second))
    if math.isfinite(product):
        return product
    first, second = (torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) for values in (first, second))
    return float(torch.dot(first, second))


# Two checkpoints compared: what differs, and by how much.


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor lies from its counterpart.

    Attributes:
        name: its name, the first one of tied names.
        dtype: in the first checkpoint.
        numel: number of elements.
        is_identical: same dtype, same bits.
        relative_distance: ``‖a − b‖ / ‖a‖``; None where only ``a`` is zero.
        cosine: ``a·b / (‖a‖ ‖b‖)``; None where one is zero.
        non_finite: elements where either is NaN or infinite; they are left out of distance and cosine.
    """

    name: str
    dtype: str
    numel: int
    is_identical: bool
    relative_distance: float | None
    cosine: float | None
    non_finite: int


@dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
        first, second: where the weights came from.
        layout: names, shapes, dtypes and ties that are not the same.
        tensors: each tensor that both have in one shape, the largest relative distance first.
        relative_distance, cosine: of all floating-point ones as one vector. Counters and index tables are no
            weights: their size would drown everything else.
    """

    first: Origin
    second: Origin
    layout: LayoutDifference
    tensors: tuple[TensorDifference, ...]
    relative_distance: float | None
    cosine: float | None

    @property
    def changed(self) -> tuple[TensorDifference, ...]:
        """The tensors that are not identical, the largest relative distance first."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_identical)

    @property
    def is_identical(self) -> bool:
        """Whether names, shapes, dtypes, ties and all bits are the same."""
        return not self.layout and not self.changed

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"kind": "comparison", "is_identical": self.is_identical, **asdict(self)}


def compare_checkpoints(first: Checkpoint, second: Checkpoint) -> Comparison:
    """Compare two opened checkpoints, tensor by tensor, in float64.

    Reads both once, in slices: memory does not depend on their sizes.

    Raises ``StructureError`` if no name and shape is in both, ``CheckpointError`` where a file cannot be read.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from polyak import checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> a, b = Path(folder.name) / "a.safetensors", Path(folder.name) / "b.safetensors"
    >>> checkpoints.write(a, {"w": torch.tensor([3.0, 0.0]), "frozen": torch.ones(1)})
    >>> checkpoints.write(b, {"w": torch.tensor([3.0, 4.0]), "frozen": torch.ones(1)})
    >>> comparison = compare_checkpoints(checkpoints.open(a), checkpoints.open(b))
    >>> [tensor.name for tensor in comparison.changed], comparison.tensors[0].cosine
    (['w'], 0.6)
    >>> folder.cleanup()
    """
    pairs = list(_comparable(first, second))
    if not pairs:
        raise StructureError(
            f"{first.path} and {second.path} have no tensor of one name and shape in common: the first has "
            f"{name_list(list(first.tensors), most=3)}, the second {name_list(list(second.tensors), most=3)}; "
            f"if other weights are nested in there, choose them with a key"
        )
    total = Products()
    tensors = []
    for name in pairs:
        difference, part = _compare_tensor(first, second, name)
        tensors.append(difference)
        if all(is_averaged(checkpoint.tensors[name].dtype) for checkpoint in (first, second)):
            total += part
    return Comparison(
        Origin.of(first),
        Origin.of(second),
        compare_layouts(first, second),
        tuple(sorted(tensors, key=_largest_first)),
        total.relative_distance,
        total.cosine,
    )


def _comparable(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    """Names that both have in one shape; those that are tied in both come once."""
    seen = set()
    for name, info in first.tensors.items():
        if name in second.tensors and second.tensors[name].shape == info.shape:
            pair = (first.ties.get(name, name), second.ties.get(name, name))
            if pair not in seen:
                yield name
            seen.add(pair)


def _compare_tensor(first: Checkpoint, second: Checkpoint, name: str) -> tuple[TensorDifference, Products]:
    info = first.tensors[name]
    is_identical = info.dtype == second.tensors[name].dtype
    total, non_finite = Products(), 0
    for start, stop in slices(info.numel):
        ours, theirs = first.read_slice(name, start, stop), second.read_slice(name, start, stop)
        is_identical = is_identical and _same_bits(ours, theirs)
        part, dropped = _finite_products(ours, theirs)
        total += part
        non_finite += dropped
    return (
        TensorDifference(
            name,
            dtype_name(info.dtype),
            info.numel,
            is_identical,
            total.relative_distance,
            total.cosine,
            non_finite,
        ),
        total,
    )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _finite_products(first: Tensor, second: Tensor) -> tuple[Products, int]:
    """The products over the elements that are finite in both, and the number of the others."""
    first, second = _paired(first, second)
    whole = products(first, second)
    # Sums that are finite are of finite elements: the masks are only needed where they are not.
    if math.isfinite(whole.first + whole.second):
        return whole, 0
    finite = first.isfinite() & second.isfinite()
    return products(first[finite], second[finite]), int(finite.logical_not().sum())


def _paired(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64; a real one is held against a complex one as complex."""
    if first.is_complex() != second.is_complex():
        first, second = first.to(torch.complex128), second.to(torch.complex128)
    return as_float64(first), as_float64(second)


def _largest_first(tensor: TensorDifference) -> tuple[bool, float]:
    distance = math.inf if tensor.relative_distance is None else tensor.relative_distance
    return tensor.is_identical, -distance
