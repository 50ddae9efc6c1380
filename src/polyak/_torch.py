"""What polyak uses of torch that torch does not document: in one place, and looked for before it is relied upon.

Where a release of torch lacks one of these, a slower public way takes its place, or using it is a
:class:`PolyakError` that says so; never a wrong number. All other code keeps to torch's public names.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import repeat, starmap
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.errors import PolyakError, StructureError

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

__all__ = [
    "Layout",
    "before_optimizer_steps",
    "buffers_of",
    "children_of",
    "device_of_collectives",
    "foreach_add_",
    "foreach_addcmul_",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
    "foreach_sub_",
    "foreach_zero_",
    "fsdp_modules",
    "is_batchnorm",
    "is_persistent",
    "is_wrapped",
    "lerp_unless_",
    "lerps_unless",
    "on_host",
    "on_one_core",
    "openmp",
    "optimizer_hooks",
    "parameters_of",
    "queued_for",
    "reason_not_loaded",
    "refuse_flattened",
    "refuse_unseen_conversions",
    "uncompiled",
    "versions",
    "widest_float",
    "without_graphs",
]


def _refuse_without(holder: object, *names: str) -> None:
    kind = holder if isinstance(holder, type) else type(holder)
    for name in names:
        if not hasattr(holder, name):
            raise PolyakError(
                f"torch {torch.__version__} has no {kind.__qualname__}.{name}, without which polyak cannot do this; "
                "use a newer polyak, or an older torch"
            )


# Tensors


def _foreach(name: str, each: Callable[..., Any]) -> Callable[..., Any]:
    """torch's operation on many tensors at once, on which its optimizers rest; else ``each``, tensor by tensor.

    That is one call of C either way, which no interrupt can split, so that it is done to all tensors or to none.
    """

    def one_by_one(tensors: list[Tensor] | tuple[Tensor, ...], *others: Any) -> list[Any]:
        columns = [o if isinstance(o, (list, tuple)) else repeat(o, len(tensors)) for o in others]
        return list(starmap(each, zip(tensors, *columns, strict=True)))

    return getattr(torch, f"_foreach_{name}", one_by_one)


foreach_add_ = _foreach("add_", Tensor.add_)
foreach_addcmul_ = _foreach("addcmul_", lambda t, a, b, value: t.addcmul_(a, b, value=value))
foreach_copy_ = _foreach("copy_", Tensor.copy_)
foreach_lerp_ = _foreach("lerp_", Tensor.lerp_)
foreach_mul = _foreach("mul", Tensor.mul)
foreach_mul_ = _foreach("mul_", Tensor.mul_)
foreach_norm = _foreach("norm", torch.linalg.vector_norm)
foreach_sub_ = _foreach("sub_", Tensor.sub_)
foreach_zero_ = _foreach("zero_", Tensor.zero_)


def lerp_unless_(
    means: list[Tensor], weights: list[Tensor], minus_share: Tensor, refused: Tensor | None
) -> None:
    """``means += share (weights - means)`` in one call; where ``refused`` is 1 no mean is touched.

    A step of SGD at the rate -share, with a weight decay of -1, is just that; fp32 mixed precision has it look at
    ``refused`` on the device. Every mean must be fp32, dense, and lie in memory as its weights do, on one device
    with the two numbers, which are fp32 as well; see :func:`lerps_unless`.

    >>> mean, share = torch.zeros(2), torch.tensor(0.5)
    >>> for refused in (0.0, 1.0):
    ...     lerp_unless_([mean], [torch.full((2,), float("nan") if refused else 4.0)], -share, torch.tensor(refused))
    >>> mean
    tensor([2., 2.])
    """
    fold: Callable[..., Any] = getattr(torch, "_fused_sgd_")  # noqa: B009
    fold(
        means,
        weights,
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=minus_share,
        dampening=0.0,
        nesterov=False,
        maximize=False,  # True would say the same with +share, but torch 2.13 overlooks it for some dtypes on the CPU
        is_first_step=False,
        grad_scale=None,
        found_inf=refused,
    )


@cache
def lerps_unless(device: torch.device) -> bool:
    """Whether :func:`lerp_unless_` is there for tensors of a device and does what it says; found by trying.

    >>> lerps_unless(torch.device("cpu"))
    True
    """
    mean, share = torch.zeros(2, device=device), torch.full((), 0.5, device=device)
    try:
        lerp_unless_([mean], [torch.full_like(mean, 4)], -share, torch.zeros_like(share))
        lerp_unless_([mean], [torch.full_like(mean, float("nan"))], -share, torch.ones_like(share))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, RuntimeError):
        return False
    return mean.is_meta or mean.tolist() == [2, 2]


_refuse_without(Tensor, "_version")
_version: Callable[[Tensor], int] = attrgetter("_version")


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place; -1 for those made in inference mode, which keep no count.

    >>> weight = torch.zeros(1)
    >>> versions([weight]) == versions([weight]), versions([weight]) == versions([weight.add_(1)])
    (True, False)
    """
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else _version(tensor) for tensor in tensors]


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout == torch.strided else None


# Read one after the other: tuples of all would be as many objects for the garbage collector to count.
_LAYOUT = (attrgetter("shape"), attrgetter("dtype"), attrgetter("device"), _strides, Tensor.is_neg)


@cache
def _guards() -> Callable[..., Any] | None:
    """What torch's compiler tells by, in one call, whether tensors are as they were; found by trying."""
    try:
        guards: Any = import_module("torch._C._dynamo.guards").TensorGuards
        weight = torch.zeros(4, 2)
        check = guards(weight, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        alike, others = torch.ones(4, 2), (torch.ones(3, 2), torch.ones(2, 4).t(), weight.double())
        tells = check(alike) and not any(map(check, others))
    except (AttributeError, ImportError, TypeError, RuntimeError):
        return None
    return guards if tells else None


class Layout:
    """How tensors lie in memory: their shapes, dtypes, devices and strides, to see whether others lie so too.

    >>> layout = Layout([torch.zeros(2, 3)])
    >>> layout.is_that_of([torch.ones(2, 3)]), layout.is_that_of([torch.ones(3, 2).t()])
    (True, False)
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._described = [list(map(read, tensors)) for read in _LAYOUT]
        self._check: Callable[..., bool] | None = None
        if (guards := _guards()) is not None:
            try:
                self._check = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            except (TypeError, RuntimeError):
                self._check = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies tell by the descriptions: the compiler's guards cannot be copied."""
        return self.__dict__ | {"_check": None}

    def is_that_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors, as many as there were, lie as those did."""
        if self._check is not None and self._check(*tensors):
            return True
        # What the compiler looks at besides, such as whether a tensor needs gradients, says nothing of memory.
        return all(
            list(map(read, tensors)) == before for read, before in zip(_LAYOUT, self._described, strict=True)
        )


# Devices


def on_host(tensor: Tensor) -> bool:
    """Whether reading a number of the tensor waits for no accelerator.

    >>> on_host(torch.zeros(1))
    True
    """
    return tensor.device.type == "cpu"


@cache
def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have none, as Apple's; found by trying.

    >>> widest_float(torch.device("cpu"))
    torch.float64
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def queued_for(tensors: Iterable[Tensor]) -> list[torch.Event]:
    """An event for each accelerator that holds any of them, which comes when all that it was given so far is done.

    For another thread to wait for before it reads them: its own stream is not the one that they are computed on.

    >>> queued_for([torch.zeros(1)])
    []
    """
    accelerator = torch.accelerator.current_accelerator()
    devices = {t.device for t in tensors if accelerator is not None and t.device.type == accelerator.type}
    return [torch.accelerator.current_stream(device).record_event() for device in devices]


def device_of_collectives() -> torch.device:
    """A device whose tensors the default process group can reduce; NCCL, for one, takes none from the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device(accelerator.type)


# Threads


def openmp(name: str) -> Any:
    """A function of the OpenMP runtime that torch itself uses, for ctypes; None where it shows none."""
    try:
        return getattr(ctypes.CDLL(torch._C.__file__), name)
    except (AttributeError, OSError, TypeError):
        return None


@cache
def _openmp_setting() -> Callable[[int], object] | None:
    """How OpenMP is told how many threads to take."""
    return openmp("omp_set_num_threads")


@contextmanager
def on_one_core() -> Iterator[None]:
    """torch's operations of the thread that is inside stay on that thread; those of others go on as they did.

    ``torch.set_num_threads`` is also kept for all threads that begin later, OpenMP's own setting is not. Where that
    cannot be reached torch's is taken, which threads that begin meanwhile then see.

    >>> before = torch.get_num_threads()
    >>> with on_one_core():
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = (
        torch.get_num_threads()
    )  # which also has torch look at what it keeps for new threads, once and first
    setting = _openmp_setting() or torch.set_num_threads
    setting(1)
    try:
        yield
    finally:
        setting(before)


# Modules

_refuse_without(nn.Module(), "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_apply")

# A module's own dictionaries, without those of its children; `named_parameters` would give copies.
parameters_of: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_parameters")
buffers_of: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")
children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter("_modules")


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether a module's own buffer is part of state dicts."""
    return buffer not in module._non_persistent_buffers_set


# Child names that only wrappers use; what they hold keeps the name it had before it was wrapped.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Wrappers whose child is called `module`, a name that a user's own model may have as well.
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# Where torch's wrappers live; a child of theirs that is none of the above is a new name for one.
_HOMES_OF_WRAPPERS = ("torch._dynamo", "torch.distributed")


def is_wrapped(parent: nn.Module, child_name: str) -> bool:
    """Whether a child is the model that its parent wraps, so that their names should be the same.

    Raises:
        StructureError: it seems to be, but not under a name that is known.

    >>> is_wrapped(nn.DataParallel(nn.Linear(1, 1)), "module"), is_wrapped(nn.Sequential(), "0")
    (True, False)
    """
    if child_name in _WRAPPED or (child_name == "module" and isinstance(parent, _PARALLEL)):
        return True
    if child_name.startswith("_") and type(parent).__module__.startswith(_HOMES_OF_WRAPPERS):
        raise StructureError(
            f"{type(parent).__name__} of torch {torch.__version__} keeps what it wraps as {child_name!r}, which "
            "polyak does not know as a wrapper, so that tensors would be misnamed; give the model that is wrapped"
        )
    return False


def refuse_flattened(modules: Iterable[nn.Module]) -> None:
    """Refuse (``StructureError``) the older kind of FSDP, and DeepSpeed's ZeRO-3: no names or shapes are left."""
    # Where torch's FSDP was never imported no module can be sharded, and importing it takes long.
    flattened = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for module in modules:
        if isinstance(module, flattened):
            raise StructureError(
                "FullyShardedDataParallel (FSDP1) flattens parameters, so that their names and shapes are lost: shard "
                "the model with torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2), or save checkpoints and "
                "average those: polyak.average_checkpoints"
            )
        # DeepSpeed marks every parameter that it takes apart; it leaves an empty tensor in its place.
        if any(hasattr(parameter, "ds_id") for parameter in parameters_of(module).values()):
            raise StructureError(
                "DeepSpeed's ZeRO-3 leaves no parameter whole on any rank: use ZeRO-1 or 2, or FSDP2, or save whole "
                "checkpoints (DeepSpeed's zero_to_fp32.py makes them) and average those: polyak.average_checkpoints"
            )


def fsdp_modules(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Those that ``fully_shard`` was applied to."""
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in modules if isinstance(module, FSDPModule))


_LAZY_BATCHNORM = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_PUBLIC_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *_LAZY_BATCHNORM)
_BATCHNORM = getattr(nn.modules.batchnorm, "_BatchNorm", _PUBLIC_BATCHNORM)


def is_batchnorm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module normalises by the statistics of batches, of whatever shape and on however many ranks.

    >>> is_batchnorm(nn.BatchNorm1d(1)), is_batchnorm(nn.InstanceNorm1d(1))
    (True, False)
    """
    return isinstance(module, _BATCHNORM)


@cache
def refuse_unseen_conversions() -> None:
    """Refuse (:class:`PolyakError`) a torch whose ``Module.float()`` and the like do not go through ``_apply``.

    A module that has to know of them overrides it, as torch's own recurrent layers do.
    """
    seen: list[nn.Module] = []

    class Converted(nn.Module):
        def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
            seen.append(self)
            return self

    child = Converted()
    nn.Sequential(child).float()
    if seen != [child]:
        raise PolyakError(
            f"torch {torch.__version__} converts modules without Module._apply, so AveragedModel would round its means "
            "unseen; use polyak.Average, a newer polyak, or an older torch"
        )


# Compilation

# The decorator for what must run as it stands inside a compiled training step. The public one does the same, but
# loads the compiler, which takes seconds, when it decorates rather than when it has something to do.
uncompiled: Callable[..., Any] = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def without_graphs() -> AbstractContextManager[object]:
    """Compiled models run eagerly inside, as graphs compiled earlier do not call new hooks."""
    # Where the compiler was never loaded nothing is compiled, and loading it takes seconds.
    if "torch._dynamo" not in sys.modules and find_spec("torch._dynamo") is not None:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


# Optimizers


def before_optimizer_steps(call: Callable[[], object]) -> None:
    """Call ``call()`` before every step of every optimizer of the process, from now on."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    @uncompiled
    def hook(*_: object) -> None:
        call()

    register_optimizer_step_pre_hook(hook)


def optimizer_hooks(optimizer: Optimizer, when: str) -> Iterable[Callable[..., Any]]:
    """The hooks that were registered ``"state_dict_pre"``, …; torch calls them, but does not list them.

    >>> from torch.optim import SGD
    >>> list(optimizer_hooks(SGD([torch.zeros(1)]), "load_state_dict_post"))
    []
    """
    name = f"_optimizer_{when}_hooks"
    _refuse_without(optimizer, name)
    hooks: Mapping[int, Callable[..., Any]] = getattr(optimizer, name)
    return list(hooks.values())


# Reading torch's files

# Words of torch.load's messages, which are otherwise a page of advice.
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")
_REASON = "WeightsUnpickler error:"


def reason_not_loaded(error: Exception) -> tuple[str | None, str]:
    """What a file would need that ``torch.load(weights_only=True)`` refuses, or None; and its reason in few words.

    Where torch words its messages anew, the reason is the beginning of the message.

    >>> reason_not_loaded(RuntimeError("WeightsUnpickler error: Unsupported global: GLOBAL os.system"))
    ('os.system', 'Unsupported global: GLOBAL os.system')
    """
    forbidden = _FORBIDDEN.search(str(error))
    reason = str(error).rpartition(_REASON)[2].strip().split("\n", 1)[0][:200]
    return forbidden and forbidden[1], reason or type(error).__name__
