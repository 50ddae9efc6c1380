"""Other weights into a live model and back, exactly.

The live tensors keep their place in memory: values are copied into them, so that compiled, distributed and
sharded models, optimizers and CUDA graphs all see the swap, and copied back from a backup afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from polyak.errors import SwapError

__all__ = ["Swap", "copy_into", "refuse_swapped"]

# Live tensors that hold swapped-in values now: whatever wrapper it is reached through, one model has one swap.
_swapped_in = WeakIdKeyDictionary()


class Swap:
    """New values in live tensors, until :meth:`undo`.

    Args:
        targets: live local tensors that take the new values.
        values: the new values, in the same order; they are converted to the targets' dtype and device.
        keep: further live tensors whose present values come back as well, such as BatchNorm statistics.
        device: where the backup is kept; None: beside each live tensor.

    Raises:
        SwapError: a target is swapped already. Nothing was touched.

    If anything fails while the values go in, an interrupt included, the live values are back before the
    exception leaves.

    >>> weight = torch.tensor([1.0, 2.0])
    >>> swap = Swap([weight], [torch.tensor([5.0, 6.0])])
    >>> weight
    tensor([5., 6.])
    >>> swap.undo()
    >>> weight
    tensor([1., 2.])
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        keep: Sequence[Tensor] = (),
        device: torch.device | str | None = None,
    ):
        refuse_swapped(targets)
        self._targets = list(targets)
        self._live = [*targets, *keep]
        self._backup = [_clone(tensor, device) for tensor in self._live]
        try:
            _swapped_in.update(dict.fromkeys(self._targets, True))
            copy_into(self._targets, values)
        except BaseException:
            self._restore()
            raise
        self._versions = _versions(self._targets)

    def undo(self) -> None:
        """Bring the live values back, bit for bit."""
        trained = _versions(self._targets) != self._versions
        self._restore()
        if trained:
            warnings.warn(
                "the model's weights were changed while averaged weights were in it; those changes are gone, "
                "as the live weights are back. Train, load or step outside applied()",
                UserWarning,
                stacklevel=4,
            )

    def _restore(self) -> None:
        _finish(self._copy_back)

    def _copy_back(self) -> None:
        copy_into(self._live, self._backup)
        for target in self._targets:
            _swapped_in.pop(target, None)


def refuse_swapped(tensors: Sequence[Tensor]) -> None:
    """Raise :class:`SwapError` if live tensors hold averaged values now, whichever average swapped them in."""
    if _swapped_in and any(tensor in _swapped_in for tensor in tensors):
        raise SwapError(
            "this model holds averaged weights already, perhaps another average's; leave applied() or call "
            "swap_out() there first"
        )


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, in place, converting dtype and device."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _clone(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    # A copy even where the tensor is on that device already.
    return tensor.detach().to(device=device or tensor.device, copy=True)


def _finish(action: Callable[[], None]) -> None:
    """Run ``action``, which may be repeated, to its end even if an interrupt falls into it."""
    try:
        action()
    except BaseException:
        action()
        raise


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    # Tensors made in inference mode keep no count of in-place changes.
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
