"""The loops of the mean on the host, compiled by numba: a number comes from memory once, to be looked at and folded.

A chunk is a run of numbers, dense in memory, with its mean; a table of them has a row for each, of the columns below.
Loops take a range of rows, so that threads share a table, and hold no lock of Python's while they run. What they read
and write is told by addresses: :class:`polyak._host_kernel.HostKernel` vouches for them. Importing this module compiles
the loops, or loads what was compiled before: seconds, or a quarter of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    numba: Any = None
else:
    try:
        import numba
        import numba.extending
    except ImportError:
        numba = None

__all__ = ["fold", "fold_fitting", "look"]

# Of a table of chunks: where its weights begin, as a place in a list of addresses and bytes from there; the same of
# its mean; how many numbers; their kind; and the group whose largest number it counts for.
OWNER, OFFSET, MEAN_OWNER, MEAN_OFFSET, NUMEL, KIND, GROUP = range(7)
SINGLE, BRAIN, HALF = range(3)  # fp32, bf16, fp16

# fp32 numbers as bits: without the sign they are ordered as their magnitudes are, infinities and NaNs last.
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_HALF_MAGNITUDE = np.uint16(0x7FFF)
_HALF_SIGN = np.uint16(0x8000)


def _compiled(*signatures: str) -> Callable[[Any], Any]:
    """With signatures at once, kept on disk where there is a place for it; without, within what calls it."""
    if numba is None:
        return lambda function: function
    # A product and a sum are one operation where the processor has it, as in torch's own lerp_.
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": {"contract"}}

    def compiled(function: Any) -> Any:
        if not signatures:
            return numba.njit(**options)(function)
        try:
            return numba.njit(list(signatures), cache=True, **options)(function)
        except (OSError, RuntimeError):  # no folder can be written to
            return numba.njit(list(signatures), **options)(function)

    return compiled


_at: Any = None
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

    _at = _cast(numba.types.voidptr, numba.types.int64, "inttoptr")
    _as_float = _cast(numba.types.float32, numba.types.uint32, "bitcast")
    _as_bits = _cast(numba.types.uint32, numba.types.float32, "bitcast")
    carray = numba.carray


@_compiled()
def _from_brain(bits):  # type: ignore[no-untyped-def]
    return _as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@_compiled()
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


@_compiled()
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


@_compiled()
def _fold(kind, address, mean_address, numel, share, far):  # type: ignore[no-untyped-def]
    """m += c (w - m) as torch computes it: from m where c is less than a half, else from w, by c - 1."""
    means = carray(_at(mean_address), numel, np.float32)
    if kind == SINGLE:
        weights = carray(_at(address), numel, np.float32)
        if far:
            for i in range(numel):
                means[i] = weights[i] + share * (weights[i] - means[i])
        else:
            for i in range(numel):
                means[i] = means[i] + share * (weights[i] - means[i])
        return
    halves = carray(_at(address), numel, np.uint16)
    if kind == BRAIN:
        for i in range(numel):
            weight, mean = _from_brain(halves[i]), means[i]
            means[i] = (weight if far else mean) + share * (weight - mean)
    else:
        for i in range(numel):
            weight, mean = _from_half(halves[i]), means[i]
            means[i] = (weight if far else mean) + share * (weight - mean)


@_compiled()
def _fold_and_look(kind, address, mean_address, numel, share, ahead):  # type: ignore[no-untyped-def]
    """Fold a chunk that the cache holds while as many numbers of the next come from memory to be looked at."""
    means = carray(_at(mean_address), numel, np.float32)
    if kind == SINGLE:
        top = np.uint32(0)
        weights = carray(_at(address), numel, np.float32)
        others = carray(_at(ahead), numel, np.uint32)
        for i in range(numel):
            top = max(top, np.uint32(others[i] & _MAGNITUDE))
            means[i] = means[i] + share * (weights[i] - means[i])
        return top
    top16 = np.uint16(0)
    halves = carray(_at(address), numel, np.uint16)
    other_halves = carray(_at(ahead), numel, np.uint16)
    if kind == BRAIN:
        for i in range(numel):
            top16 = max(top16, np.uint16(other_halves[i] & _HALF_MAGNITUDE))
            means[i] = means[i] + share * (_from_brain(halves[i]) - means[i])
        return _as_bits(_from_brain(top16))
    for i in range(numel):
        top16 = max(top16, np.uint16(other_halves[i] & _HALF_MAGNITUDE))
        means[i] = means[i] + share * (_from_half(halves[i]) - means[i])
    return _as_bits(_from_half(top16))


_CHUNKS = "int64, int64, int64[:, ::1], int64[::1]"


@_compiled(f"void({_CHUNKS}, uint32[::1])")
def look(first, last, chunks, addresses, tops):  # type: ignore[no-untyped-def]
    """Keep the largest magnitude of each group in ``tops``, as the bits of an fp32 number."""
    for k in range(first, last):
        chunk = chunks[k]
        top = _largest(chunk[KIND], addresses[chunk[OWNER]] + chunk[OFFSET], chunk[NUMEL])
        tops[chunk[GROUP]] = max(tops[chunk[GROUP]], top)


@_compiled(f"void({_CHUNKS}, int64[::1], uint8[::1], uint8, float32, boolean)")
def fold(first, last, chunks, addresses, mean_addresses, folded, which, share, far):  # type: ignore[no-untyped-def]
    """Fold the chunks in of which ``folded`` says ``which``."""
    for k in range(first, last):
        if folded[k] == which:
            chunk = chunks[k]
            address = addresses[chunk[OWNER]] + chunk[OFFSET]
            mean_address = mean_addresses[chunk[MEAN_OWNER]] + chunk[MEAN_OFFSET]
            _fold(chunk[KIND], address, mean_address, chunk[NUMEL], share, far)


@_compiled(f"void({_CHUNKS}, int64[::1], uint8[::1], uint32[::1], uint32[::1], float32)")
def fold_fitting(first, last, chunks, addresses, mean_addresses, folded, bounds, tops, share):  # type: ignore[no-untyped-def]
    """Look at every chunk, and fold those in whose largest magnitude is below the bound of their group.

    ``folded`` tells which they were. The share is less than a half.
    """
    top = np.uint32(0)  # of the chunk that comes next
    if first < last:
        chunk = chunks[first]
        top = _largest(chunk[KIND], addresses[chunk[OWNER]] + chunk[OFFSET], chunk[NUMEL])
    for k in range(first, last):
        chunk = chunks[k]
        kind, group, numel = chunk[KIND], chunk[GROUP], chunk[NUMEL]
        address = addresses[chunk[OWNER]] + chunk[OFFSET]
        mean_address = mean_addresses[chunk[MEAN_OWNER]] + chunk[MEAN_OFFSET]
        tops[group] = max(tops[group], top)
        fits = top < bounds[group]
        folded[k] = fits
        done = 0  # numbers of this chunk folded, and of the next looked at
        top = np.uint32(0)
        nbytes = 4 if kind == SINGLE else 2
        if k + 1 < last:
            after = chunks[k + 1]
            ahead = addresses[after[OWNER]] + after[OFFSET]
            if fits and after[KIND] == kind:
                done = min(numel, after[NUMEL])
                top = _fold_and_look(kind, address, mean_address, done, share, ahead)
            rest = _largest(after[KIND], ahead + nbytes * done, after[NUMEL] - done)
            top = max(top, rest)
        if fits and done < numel:
            _fold(kind, address + nbytes * done, mean_address + 4 * done, numel - done, share, False)
