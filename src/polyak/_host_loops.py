"""The loops of the mean on the host, compiled by numba: a number comes from memory once, to be looked at and folded.

They do the jobs of :mod:`polyak._host_jobs` and hold no lock of Python's while they run. Importing this module compiles
them, or loads what was compiled before: seconds, or a quarter of one.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    numba: Any = None
else:
    try:
        import numba
        import numba.core.registry
        import numba.extending
    except ImportError:
        numba = None

__all__ = ["JOB", "TASKS", "run"]

# All that compiled code takes for granted stands in this file: what was compiled before is used while it is unchanged.
# Of a chunk: where its weights begin, as a place in a list of addresses and bytes from there; the same of its mean; how
# many numbers; their kind; and the group whose largest number it counts for.
OWNER, OFFSET, MEAN_OWNER, MEAN_OFFSET, NUMEL, KIND, GROUP = range(7)
SINGLE, BRAIN, HALF = range(3)  # fp32, bf16, fp16
TASKS = ("look", "fold", "fold fitting")
LOOK, FOLD, FOLD_FITTING = range(3)
JOB = np.dtype(
    [
        ("next", np.int64),  # share that nobody has taken
        ("n_shares", np.int64),
        # Addresses of tables, of int64 unless said otherwise.
        ("shares", np.int64),  # n_shares x 2: the first row of the chunks, and the one after the last
        ("chunks", np.int64),  # n_chunks x 7
        ("addresses", np.int64),  # of the owners of weights
        ("mean_addresses", np.int64),
        ("folded", np.int64),  # n_chunks of uint8: which are folded in
        ("bounds", np.int64),  # n_groups of uint32: "fold fitting" leaves out what is not below
        ("tops", np.int64),  # n_shares x n_groups of uint32: the largest magnitudes, as bits of fp32
        ("before", np.int64),  # n_shares x chunk_numel of fp32: room for the means of a chunk, as they were
        ("n_chunks", np.int64),
        ("chunk_numel", np.int64),  # at most
        ("n_groups", np.int64),
        ("task", np.uint8),
        ("which", np.uint8),  # "fold" is for the chunks of which `folded` says so
        ("far", np.uint8),  # whether the coefficient is c - 1, from the weights on; else c, from the means on
        ("coefficient", np.float32),
    ],
    align=True,
)

# fp32 numbers as bits: without the sign they are ordered as their magnitudes are, infinities and NaNs last.
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_HALF_MAGNITUDE = np.uint16(0x7FFF)
_HALF_SIGN = np.uint16(0x8000)


# A product and a sum are one operation where the processor has it, as in torch's own lerp_.
_OPTIONS = {"boundscheck": False, "error_model": "numpy", "fastmath": {"contract"}}


def _compiled(function: Any) -> Any:
    """Within what calls it."""
    return numba.njit(**_OPTIONS)(function) if numba else function


def _callable_from_c(signature: str) -> Callable[[Any], Any]:
    """At once, kept on disk where there is a place for it."""
    if numba is None:
        return lambda function: function

    def compiled(function: Any) -> Any:
        try:
            # numba names files by this, and may find in them what another version or processor left: it goes by the
            # time and size of a source, and writes what a file holds before the file.
            function.__qualname__ = f"{function.__qualname__}-{_about()}"
            return numba.cfunc(signature, cache=True, **_OPTIONS)(function)
        except Exception:  # no folder can be written to, or a file is damaged
            return numba.cfunc(signature, **_OPTIONS)(function)

    return compiled


def _about() -> str:
    """A digest of all that makes compiled code what it is: this source, the compiler, and the processor."""
    target = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
    about = (inspect.getsource(sys.modules[__name__]), numba.__version__, target)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


_at: Any = None
_address_of: Any = None
_fetch_and_add: Any = None
_as_float: Any = None
_as_bits: Any = None
carray: Any = None

if numba is not None:

    def _cast(returns: Any, takes: Any, instruction: str) -> Any:
        def typed(context: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                target = context.get_value_type(signature.return_type)
                return getattr(builder, instruction)(arguments[0], target)

            return returns(takes), generate

        return numba.extending.intrinsic(typed)

    def _typed_fetch_and_add(context: Any, address: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], context.get_value_type(numba.types.int64).as_pointer())
            return builder.atomic_rmw("add", place, arguments[1], "monotonic")

        return numba.types.int64(numba.types.int64, numba.types.int64), generate

    _fetch_and_add = numba.extending.intrinsic(_typed_fetch_and_add)
    _at = _cast(numba.types.voidptr, numba.types.int64, "inttoptr")
    _address_of = _cast(numba.types.int64, numba.types.voidptr, "ptrtoint")
    _as_float = _cast(numba.types.float32, numba.types.uint32, "bitcast")
    _as_bits = _cast(numba.types.uint32, numba.types.float32, "bitcast")
    carray = numba.carray


@_compiled
def _from_brain(bits):  # type: ignore[no-untyped-def]
    return _as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@_compiled
def _from_half(bits):  # type: ignore[no-untyped-def]
    magnitude = np.uint32(bits & _HALF_MAGNITUDE)
    sign = np.uint32(np.uint32(bits & _HALF_SIGN) << np.uint32(16))
    # The exponent moves from a bias of 15 to one of 127. What is below the normal numbers is the distance of two normal
    # ones, so that a processor told to take such numbers for 0 does not.
    wide = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
    tiny = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(113 << 23))
    small = _as_bits(np.float32(_as_float(tiny) - _as_float(np.uint32(113 << 23))))
    special = np.uint32(np.uint32(magnitude << np.uint32(13)) | np.uint32(0x7F800000))
    finite = wide if magnitude >= np.uint32(0x400) else small
    return _as_float(np.uint32((special if magnitude >= np.uint32(0x7C00) else finite) | sign))


@_compiled
def _largest(kind, address, numel):  # type: ignore[no-untyped-def]
    """The largest magnitude, as the bits of an fp32 number."""
    if kind == SINGLE:
        top = np.uint32(0)
        weights = carray(_at(address), numel, np.uint32)
        for i in range(numel):
            top = max(top, np.uint32(weights[i] & _MAGNITUDE))
        return top
    top16 = np.uint16(0)
    halves = carray(_at(address), numel, np.uint16)
    for i in range(numel):
        top16 = max(top16, np.uint16(halves[i] & _HALF_MAGNITUDE))
    return _as_bits(_from_brain(top16)) if kind == BRAIN else _as_bits(_from_half(top16))


@_compiled
def _fold(kind, address, mean_address, numel, coefficient, far):  # type: ignore[no-untyped-def]
    """m += c (w - m) as torch computes it: from m where c is less than a half, else from w, by c - 1."""
    means = carray(_at(mean_address), numel, np.float32)
    if kind == SINGLE:
        weights = carray(_at(address), numel, np.float32)
        if far:
            for i in range(numel):
                means[i] = weights[i] + coefficient * (weights[i] - means[i])
        else:
            for i in range(numel):
                means[i] = means[i] + coefficient * (weights[i] - means[i])
        return
    halves = carray(_at(address), numel, np.uint16)
    if kind == BRAIN:
        for i in range(numel):
            weight, mean = _from_brain(halves[i]), means[i]
            means[i] = (weight if far else mean) + coefficient * (weight - mean)
    else:
        for i in range(numel):
            weight, mean = _from_half(halves[i]), means[i]
            means[i] = (weight if far else mean) + coefficient * (weight - mean)


@_compiled
def _fold_if_below(bound, kind, address, mean_address, numel, coefficient, before):  # type: ignore[no-untyped-def]
    """Look at a chunk while it is folded in, and undo that where a magnitude is not below the bound; the largest."""
    means = carray(_at(mean_address), numel, np.float32)
    top, top16 = np.uint32(0), np.uint16(0)
    if kind == SINGLE:
        weights = carray(_at(address), numel, np.float32)
        bits = carray(_at(address), numel, np.uint32)
        for i in range(numel):
            weight, mean = weights[i], means[i]
            before[i] = mean
            top = max(top, np.uint32(bits[i] & _MAGNITUDE))
            means[i] = mean + coefficient * (weight - mean)
    else:
        halves = carray(_at(address), numel, np.uint16)
        if kind == BRAIN:
            for i in range(numel):
                weight, mean = _from_brain(halves[i]), means[i]
                before[i] = mean
                top16 = max(top16, np.uint16(halves[i] & _HALF_MAGNITUDE))
                means[i] = mean + coefficient * (weight - mean)
            top = _as_bits(_from_brain(top16))
        else:
            for i in range(numel):
                weight, mean = _from_half(halves[i]), means[i]
                before[i] = mean
                top16 = max(top16, np.uint16(halves[i] & _HALF_MAGNITUDE))
                means[i] = mean + coefficient * (weight - mean)
            top = _as_bits(_from_half(top16))
    if top >= bound:
        for i in range(numel):
            means[i] = before[i]
    return top


@_compiled
def _places(chunk, addresses, mean_addresses):  # type: ignore[no-untyped-def]
    return (
        addresses[chunk[OWNER]] + chunk[OFFSET],
        mean_addresses[chunk[MEAN_OWNER]] + chunk[MEAN_OFFSET],
    )


@_compiled
def _look(chunks, addresses, tops):  # type: ignore[no-untyped-def]
    """Keep the largest magnitude of each group in ``tops``, as the bits of an fp32 number."""
    for chunk in chunks:
        top = _largest(chunk[KIND], addresses[chunk[OWNER]] + chunk[OFFSET], chunk[NUMEL])
        tops[chunk[GROUP]] = max(tops[chunk[GROUP]], top)


@_compiled
def _fold_those(which, chunks, folded, addresses, mean_addresses, coefficient, far):  # type: ignore[no-untyped-def]
    """Fold the chunks in of which ``folded`` says ``which``."""
    for k in range(len(chunks)):
        if folded[k] == which:
            chunk = chunks[k]
            address, mean_address = _places(chunk, addresses, mean_addresses)
            _fold(chunk[KIND], address, mean_address, chunk[NUMEL], coefficient, far)


@_compiled
def _fold_fitting(bounds, chunks, folded, addresses, mean_addresses, tops, before, coefficient):  # type: ignore[no-untyped-def]
    """Look at every chunk, and fold those in whose largest magnitude is below the bound of their group.

    ``folded`` tells which they were. The coefficient is less than a half.
    """
    for k in range(len(chunks)):
        chunk = chunks[k]
        kind, group, numel = chunk[KIND], chunk[GROUP], chunk[NUMEL]
        address, mean_address = _places(chunk, addresses, mean_addresses)
        if bounds[group] == np.uint32(0):  # nothing is below
            top = _largest(kind, address, numel)
        else:
            top = _fold_if_below(bounds[group], kind, address, mean_address, numel, coefficient, before)
        folded[k] = top < bounds[group]
        tops[group] = max(tops[group], top)


@_callable_from_c("void(voidptr)")
def run(place):  # type: ignore[no-untyped-def]
    """Take a share of a job after another, until all are taken.

    Nothing in here allocates or raises: what is raised on a thread without Python's lock reaches nobody.
    """
    job = carray(place, 1, JOB)[0]
    all_shares = carray(_at(job.shares), (job.n_shares, 2), np.int64)
    all_chunks = carray(_at(job.chunks), (job.n_chunks, 7), np.int64)
    all_folded = carray(_at(job.folded), job.n_chunks, np.uint8)
    all_tops = carray(_at(job.tops), (job.n_shares, job.n_groups), np.uint32)
    bounds = carray(_at(job.bounds), job.n_groups, np.uint32)
    all_before = carray(_at(job.before), (job.n_shares, job.chunk_numel), np.float32)
    # No more than there are chunks to speak of them: where numba is told to watch bounds, it watches these.
    addresses = carray(_at(job.addresses), job.n_chunks, np.int64)
    mean_addresses = carray(_at(job.mean_addresses), job.n_chunks, np.int64)
    coefficient, far = np.float32(job.coefficient), bool(job.far)
    share = _fetch_and_add(_address_of(place), 1)
    while share < job.n_shares:
        first, last = all_shares[share]
        chunks, folded, tops = all_chunks[first:last], all_folded[first:last], all_tops[share]
        if job.task == LOOK:
            _look(chunks, addresses, tops)
        elif job.task == FOLD:
            _fold_those(job.which, chunks, folded, addresses, mean_addresses, coefficient, far)
        else:
            before = all_before[share]
            _fold_fitting(bounds, chunks, folded, addresses, mean_addresses, tops, before, coefficient)
        share = _fetch_and_add(_address_of(place), 1)
