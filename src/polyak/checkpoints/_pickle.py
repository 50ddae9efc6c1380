"""What a pickle may hold, read as data.

The names in it stand for what is defined here, so that no code is run and nothing is imported by name. Tensors are
described, with their place in a storage, and not read; harmless objects are records of what they were made of.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from polyak.checkpoints._base import is_shape
from polyak.errors import shown

__all__ = [
    "HARMLESS",
    "Entries",
    "ForbiddenName",
    "Place",
    "Record",
    "SavedShard",
    "SavedTensor",
    "stand_ins",
    "unpickle",
]

# Objects whose classes are not needed.


class Record:
    """An object whose class is not needed: what it was made of, and its attributes where the pickle names them."""

    arguments: tuple
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> Record:
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is left to do, whatever it was made of."""

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            vars(self).update(state)


class Entries(Record, dict):
    """An object of a class that may be a dict, a list or a set: the entries of a dict are kept, and found in it."""

    # The class may be one whose objects are keys.
    __hash__ = object.__hash__  # type: ignore[assignment]

    def append(self, item: Any) -> None:
        """Leave out an item of a list."""

    add = append


# Reading a pickle.

# What every module has in its state, and hardly anything else.
_MODULE_ATTRIBUTES = (b"_parameters", b"_buffers", b"_modules")

# Operations of pickles: bytes of the argument, or what it begins with, by the code.
_ARGUMENT_NBYTES = {
    ord(operation.code): operation.arg.n if operation.arg else 0 for operation in pickletools.opcodes
}
_COUNT_NBYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_TWO_LINES = frozenset(pickle.GLOBAL + pickle.INST)
_MEMO_INDEX = frozenset(pickle.PUT + pickle.LONG_BINPUT)
_STOP = ord(pickle.STOP)
_EXTENSIONS = frozenset(pickle.EXT1 + pickle.EXT2 + pickle.EXT4)
# Operations in which nothing has to be looked at, many in one match: their arguments are numbers of a fixed length,
# low places in the memo, or short texts.
_FIXED = {
    code: nbytes
    for code, nbytes in _ARGUMENT_NBYTES.items()
    if nbytes >= 0 and code not in _MEMO_INDEX | _EXTENSIONS | {_STOP}
}
_PLAIN = [
    *(
        b"[%b]%b" % (re.escape(bytes(code for code in _FIXED if _FIXED[code] == nbytes)), b"." * nbytes)
        for nbytes in sorted(set(_FIXED.values()))
    ),
    b"%b..\0\0" % pickle.LONG_BINPUT,
    b"%b(?:%b)"
    % (pickle.BINUNICODE, b"|".join(b"%b\0\0\0.{%d}" % (re.escape(bytes([n])), n) for n in range(64))),
]
_PLAIN_RUN = re.compile(b"(?:%b)*+" % b"|".join(_PLAIN), re.DOTALL)


class ForbiddenName(pickle.UnpicklingError):
    """The pickle needs something by names that are not known to be data.

    Attributes:
        names: all of them, in the order of the pickle.
        has_module: whether a module was pickled whole.
        has_tensors: whether there are tensors outside the objects that need these names.
    """

    def __init__(self, names: Sequence[str], has_module: bool = False, has_tensors: bool = False) -> None:
        super().__init__(f"it needs {', '.join(names)}, and no code from a checkpoint is run")
        self.names, self.has_module, self.has_tensors = tuple(names), has_module, has_tensors


class _Unpickler(pickle.Unpickler):
    """Names that are not known get a stand-in too, so that all of them are found before the pickle is refused."""

    def __init__(self, data: bytes, known: Callable[[str], Any]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._known = known
        self.forbidden: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        found = vars(torch).get(name) if module == "torch" else None
        found = found if isinstance(found, torch.dtype) else self._known(full_name)
        if found is None:
            self.forbidden[full_name] = None
            return Entries
        return found

    def persistent_load(self, pid: Any) -> Any:
        """What is outside the pickle, such as a storage, is what the pickle says of it."""
        return pid


def _operations(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Code and argument of the operations, told apart as ``pickletools.genops`` does; plain ones are passed over.

    Raises ``LookupError`` or ``ValueError`` for damaged data.
    """
    place, code = 0, -1
    while code != _STOP:
        run = _PLAIN_RUN.match(data, place)
        place = place if run is None else run.end()
        code = data[place]
        nbytes = _ARGUMENT_NBYTES[code]
        start = place + 1
        end = start + nbytes
        if nbytes in _COUNT_NBYTES:
            start += _COUNT_NBYTES[nbytes]
            end = start + int.from_bytes(data[place + 1 : start], "little")
        elif nbytes == pickletools.UP_TO_NEWLINE:
            end = data.index(b"\n", start) + 1
            if code in _TWO_LINES:
                end = data.index(b"\n", end) + 1
        yield code, data[start:end]
        place = end


def _memo_index(code: int, argument: bytes) -> int:
    return int(argument) if code in pickle.PUT else int.from_bytes(argument, "little")


def unpickle(data: bytes, known: Callable[[str], Any]) -> Any:
    """What a pickle holds, where all names in it are of torch's dtypes, or have a stand-in that is ``known``.

    Raises ``ForbiddenName`` for other names, and any exception for damaged data.
    """
    for code, argument in _operations(data):
        # A damaged index would have the unpickler clear gigabytes of memory for its memo.
        if code in _MEMO_INDEX and _memo_index(code, argument) > len(data):
            raise pickle.UnpicklingError("impossible memo index")
        if code in _EXTENSIONS:
            raise ForbiddenName([f"extension {int.from_bytes(argument, 'little')}"])
    unpickler, content = _Unpickler(data, known), None
    try:
        content = unpickler.load()
    finally:
        # What else goes wrong comes of the stand-ins.
        if unpickler.forbidden:
            has_module = all(attribute in data for attribute in _MODULE_ATTRIBUTES)
            raise ForbiddenName(list(unpickler.forbidden), has_module, _has_tensors(content))
    return content


def _has_tensors(content: Any) -> bool:
    seen: dict[int, Any] = {}
    stack = [content]
    while stack:
        node = stack.pop()
        if isinstance(node, SavedTensor):
            return True
        if id(node) not in seen and isinstance(node, dict | list | tuple):
            seen[id(node)] = node
            stack.extend(node.values() if isinstance(node, dict) else node)
    return False


# What torch.save puts into its pickle, by the names that it has there.

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
_QUANTISED = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")


class _Fixed:
    """What a pickle may ask for, and not change."""

    @classmethod
    def __setstate__(cls, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what is not its own")


class Place(NamedTuple):
    """Where a tensor lies: in which storage, from which element on, with which strides."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class SavedTensor(_Fixed):
    """A tensor as the pickle describes it. Whether that can be one is found out where its place is asked for.

    Attributes:
        shape: of the whole tensor.
        storage: what the pickle says of it; None where the elements do not lie there as they are.
    """

    shape: tuple[int, ...] = ()
    storage: Any = None

    def __init__(
        self, storage, offset, size, stride, _grad=False, _hooks=None, flags=None, dtype=None
    ) -> None:
        self.shape, self._offset, self._stride, self._dtype = tuple(size), offset, tuple(stride), dtype
        if not flags:  # conjugated or negated when it is looked at
            self.storage = storage

    @classmethod
    def unusual(cls, shape: tuple[int, ...]) -> Self:
        """A tensor of which nothing but the shape is known."""
        return cls(None, 0, shape, ())

    @property
    def place(self) -> Place | None:
        """None where it is of an unusual kind. Raises ``UnpicklingError`` for what is no tensor."""
        if self.storage is None:
            return None
        kind, dtype, key, *_ = self.storage
        dtype = self._dtype or dtype
        are_whole = {int}.issuperset(map(type, (self._offset, *self._stride)))
        is_tensor = are_whole and is_shape(self.shape) and len(self.shape) == len(self._stride)
        if kind != "storage" or type(key) is not str or not is_tensor:
            raise pickle.UnpicklingError(f"a tensor of shape {shown(self.shape)}")
        if not isinstance(dtype, torch.dtype):  # a quantised one
            return None
        return Place(key, dtype, self._offset, self.shape, self._stride)


class SavedShard(SavedTensor):
    """A DTensor of which one rank saved its part, or one term of a sum; ``shape`` is that of the whole."""

    local_shape: tuple[int, ...] = ()


class _TensorType(Record):
    """Stands for ``torch.Tensor`` and ``torch.nn.Parameter``."""


class _DTensorType(Record):
    """Stands for DTensor."""


class _Placement(Record):
    """Stands for the ways to lay a DTensor out in which every element is on some rank as it is."""


@dataclass(frozen=True)
class _Stand(_Fixed):
    """Stands for a function: a plain function has attributes that a pickle could set."""

    build: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.build(*arguments)


def _rebuild_tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, flags=None) -> SavedTensor:
    return SavedTensor(storage, offset, size, stride, flags=flags, dtype=dtype)


def _rebuild_parameter(data: SavedTensor, *_: Any) -> SavedTensor:
    return data


def _rebuild_on_device(data: SavedTensor, dtype: torch.dtype, *_: Any) -> SavedTensor:
    place = data.place
    return data if place is not None and place.dtype == dtype else SavedTensor.unusual(data.shape)


def _rebuild_from_type(
    build: Callable[..., SavedTensor], kind: Any, arguments: tuple, state: Any
) -> SavedTensor:
    tensor = build(*arguments)
    if kind is _DTensorType:
        return _dtensor(tensor.shape, state)
    return tensor if kind is _TensorType else SavedTensor.unusual(tensor.shape)


def _dtensor(shape: tuple[int, ...], state: Any) -> SavedTensor:
    """The local tensor, where that is the whole of it."""
    attributes = state[1] if isinstance(state, tuple) else state
    local, placements = attributes["_local_tensor"], attributes["_spec"].placements
    is_placed = bool(placements) and all(isinstance(placement, _Placement) for placement in placements)
    if is_placed and local.shape == shape:
        return local
    shard = SavedShard.unusual(shape)
    shard.local_shape = local.shape
    return shard


def _unusual(*arguments: Any) -> SavedTensor:
    """Sparse, quantised and nested tensors, subclasses: the first tuple of numbers is taken for their shape."""
    flat = [part for argument in arguments for part in (argument if type(argument) is tuple else ())]
    shapes = [
        part for part in (*arguments, *flat) if type(part) is tuple and all(type(n) is int for n in part)
    ]
    return SavedTensor.unusual(shapes[0] if shapes else ())


# What other libraries put beside the weights.

# The dtypes whose scalars are numbers of Python.
_NUMBERS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))


def _numpy_scalar(kind: Record, data: Any) -> Any:
    """A number, so that a step that is NumPy's is a step."""
    code = kind.arguments[0]
    order = kind.state[1] if isinstance(kind.state, tuple) else None
    if code not in _NUMBERS or order not in ("<", ">", "|"):
        return Record(kind, data)
    # Older pickles have no bytes: they encode a text, which is left undone.
    raw = data.arguments[0].encode("latin1") if isinstance(data, Record) else data
    dtype = np.dtype(order + code)
    if len(raw) != dtype.itemsize:
        raise pickle.UnpicklingError(f"a NumPy scalar of {len(raw)} bytes")
    return np.frombuffer(raw, dtype)[0].item()


def _new_dict(*_: Any) -> dict:
    return {}


def _new_list(*_: Any) -> list:
    return []


def _named(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


# Objects that are data, or the classes of such, by their full names.
_PATHS = "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath"
_TYPES = (
    "bool bytes bytearray complex dict float frozenset int list long object range set slice str tuple xrange"
)
_SCALARS = (
    "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 "
    "str_ bytes_ datetime64 timedelta64 longdouble"
)
_ATTRIBUTE_DICTS = (
    "pytorch_lightning.utilities.parsing",
    "lightning.pytorch.utilities.parsing",
    "lightning_fabric.utilities.data",
    "lightning.fabric.utilities.data",
)
HARMLESS: dict[str, Any] = {
    "collections.defaultdict": _Stand(_new_dict),
    "collections.deque": _Stand(_new_list),
    **{f"{module}.AttributeDict": Entries for module in _ATTRIBUTE_DICTS},
    **dict.fromkeys(_named("numpy.core.multiarray", "scalar"), _Stand(_numpy_scalar)),
    **dict.fromkeys(_named("numpy._core.multiarray", "scalar"), _Stand(_numpy_scalar)),
    **dict.fromkeys(
        (
            "argparse.Namespace",
            "types.SimpleNamespace",
            "decimal.Decimal",
            "fractions.Fraction",
            "uuid.UUID",
            "typing.Any",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.core.numeric._frombuffer",
            "numpy._core.numeric._frombuffer",
            *_named("numpy", f"dtype ndarray {_SCALARS}"),
            *_named("builtins", _TYPES),
            *_named("datetime", "date datetime time timedelta timezone"),
            *_named("pathlib", _PATHS),
            *_named("pathlib._local", _PATHS),
            *_named("omegaconf.dictconfig", "DictConfig"),
            *_named("omegaconf.listconfig", "ListConfig"),
            *_named("omegaconf.base", "ContainerMetadata Metadata UnionNode"),
            *_named(
                "omegaconf.nodes",
                "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode",
            ),
        ),
        Record,
    ),
}

# What torch itself writes.
_PLACEMENTS = "Shard _StridedShard Replicate"
# Modules of which a DTensor's description holds records of many classes.
_DTENSOR_MODULES = (
    "torch.distributed.tensor.",
    "torch.distributed._tensor.",
    "torch.distributed.device_mesh.",
    "torch.distributed._mesh_layout.",
)
_TORCH: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": OrderedDict,
    "torch.Size": tuple,
    "torch.Tensor": _TensorType,
    "torch.nn.parameter.Parameter": _TensorType,
    "torch._utils._rebuild_tensor": SavedTensor,
    "torch._utils._rebuild_tensor_v2": SavedTensor,
    "torch._utils._rebuild_tensor_v3": _Stand(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Stand(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Stand(_rebuild_parameter),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _Stand(_rebuild_on_device),
    "torch._tensor._rebuild_from_type_v2": _Stand(_rebuild_from_type),
    "torch.distributed.tensor.DTensor": _DTensorType,
    "torch.distributed._tensor.api.DTensor": _DTensorType,
    **dict.fromkeys(_named("torch.distributed.tensor.placement_types", _PLACEMENTS), _Placement),
    **dict.fromkeys(_named("torch.distributed._tensor.placement_types", _PLACEMENTS), _Placement),
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in _STORAGES.items()},
    **dict.fromkeys(
        (
            "torch._utils._rebuild_sparse_tensor",
            "torch._utils._rebuild_qtensor",
            "torch._utils._rebuild_nested_tensor",
            "torch._utils._rebuild_wrapper_subclass",
            "torch._utils._rebuild_meta_tensor_no_storage",
            "torch._utils._rebuild_device_tensor_from_numpy",
        ),
        _Stand(_unusual),
    ),
    **dict.fromkeys(
        (
            "_codecs.encode",
            "torch.device",
            "torch.serialization._get_layout",
            "torch.storage.TypedStorage",
            "torch.per_tensor_affine",
            "torch.per_tensor_symmetric",
            "torch.per_channel_affine",
            "torch.per_channel_symmetric",
            "torch.per_channel_affine_float_qparams",
            *(f"torch.{name}" for name in _QUANTISED),
        ),
        Record,
    ),
}


def stand_ins(allowed: Iterable[str]) -> Callable[[str], Any]:
    """The stand-in of a name in a file of torch, None where it has none; of those that are ``allowed``, a record."""
    known = {**dict.fromkeys(allowed, Entries), **HARMLESS, **_TORCH}

    def find(name: str) -> Any:
        return known.get(name) or (Record if name.startswith(_DTENSOR_MODULES) else None)

    return find
