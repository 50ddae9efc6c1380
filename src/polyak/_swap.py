"""Other weights and modes into a live model and back, exactly.

The live tensors keep their place in memory: values are copied into them, so that compiled, distributed and
sharded models, optimizers and CUDA graphs all see the swap, and copied back from a backup afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polyak import _torch
from polyak._checks import warn_user
from polyak._model import Binding, Place, note_swapped, note_unswapped
from polyak._offload import fence
from polyak.errors import StructureError, SwapError

__all__ = ["Swap", "copy_into", "modes", "undoing"]


class Swap:
    """New values in live tensors, from :meth:`put_in` until :meth:`undo`.

    Args:
        targets: live local tensors that take the new values.
        keep: further live tensors whose present values come back as well.
        free: targets that may be changed meanwhile, such as BatchNorm statistics.
        places: (dictionary, key, tensor) of tensors that go back to their place if others were put there.
        device: where the backup is kept; None: beside each live tensor.

    >>> weight = torch.tensor([1.0, 2.0])
    >>> swap = Swap([weight])
    >>> swap.put_in([torch.tensor([5.0, 6.0])])
    >>> weight
    tensor([5., 6.])
    >>> swap.undo()
    >>> weight
    tensor([1., 2.])
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        *,
        keep: Sequence[Tensor] = (),
        free: Sequence[Tensor] = (),
        places: Sequence[Place] = (),
        device: torch.device | str | None = None,
    ):
        self._targets = list(targets)
        self._live = [*targets, *keep]
        may_change = set(map(id, free))
        self._watched = [tensor for tensor in targets if id(tensor) not in may_change]
        self._places = list(places)
        self._device = device
        self._devices: list[torch.device] = []
        self._backup: list[Tensor] = []
        self._versions: list[int] = []
        self.active = False

    @classmethod
    def of(cls, binding: Binding, device: torch.device | str | None = None) -> Swap:
        """For what ``binding`` averages of a live model; the model's other buffers come back as well."""
        return cls(
            binding.live,
            keep=binding.other_buffers(),
            free=binding.averaged_buffers(),
            places=binding.places(),
            device=device,
        )

    def put_in(self, values: Sequence[Tensor]) -> None:
        """Copy ``values`` into the targets, converted to their dtype and device.

        If anything fails on the way, an interrupt included, the live values are back before the exception
        leaves.

        Raises:
            SwapError: a tensor is swapped already; nothing was changed.
        """
        self.active = True
        try:
            # Before the backup, which would be of another swap's values if that one came in between.
            note_swapped(self._live)
            self._devices = [tensor.device for tensor in self._live]
            self._backup = _copies(self._live, self._device)
            copy_into(self._targets, values)
            self._versions = _torch.versions(self._watched)
        except SwapError:
            self.active = False
            raise
        except BaseException:
            with undoing(self._restore):
                raise

    def keep(self) -> None:
        """Make the values that are in the model now the ones that :meth:`undo` brings back."""
        self._backup = self._live

    def undo(self) -> None:
        """Bring the live values back, bit for bit, and say so if the swapped ones were changed meanwhile.

        Where they are back already it does nothing.
        """
        if not self.active:
            return
        with undoing(self._restore):
            changed = self._versions != _torch.versions(self._watched) or any(
                isinstance(tensor, nn.Parameter) and place.get(key) is not tensor
                for place, key, tensor in self._places
            )
        if changed:
            warn_user(
                "the model's weights were changed while averaged weights were in it; those changes are gone, "
                "as the live weights are back. Train, load or step outside applied()"
            )

    def _restore(self) -> None:
        try:
            for place, key, tensor in self._places:
                place[key] = tensor
            if self._backup:  # there is none where making it failed
                self._undo_conversions()
                copy_into(self._live, self._backup)
        finally:
            note_unswapped(self._live)
        self.active = False

    def _undo_conversions(self) -> None:
        """What ``model.half()`` or ``model.to(device)`` made of the same tensors is no place for the live values."""
        for tensor, kept, device in zip(self._live, self._backup, self._devices, strict=True):
            was = (kept.dtype, kept.shape, device)
            if kept is not tensor and (tensor.dtype, tensor.shape, tensor.device) != was:
                tensor.data = torch.empty_like(kept, device=device)


@torch.inference_mode()  # tensors that were made in inference mode may be written to in it only
def copy_into(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, in place, converting dtype and device; shapes must be equal."""
    for target, value in zip(targets, values, strict=True):
        if target.shape != value.shape:  # copy_ would broadcast
            raise StructureError(f"shape {tuple(value.shape)} does not go into {tuple(target.shape)}")
    fence()
    if targets:
        _torch.foreach_copy_(list(targets), list(values))


@contextmanager
def modes(model: nn.Module, training: Collection[nn.Module] = ()) -> Iterator[None]:
    """The modules of ``model`` in evaluation mode, but for those of ``training``.

    Their own modes, and the modules inside each, are back on leaving.

    >>> model = nn.Sequential(nn.Dropout())
    >>> with modes(model):
    ...     print(model.training, model[0].training)
    False False
    >>> model.training, model[0].training
    (True, True)
    """
    before = {module: (module.training, dict(_torch.children_of(module))) for module in model.modules()}

    def restore() -> None:
        for module, (mode, inside) in before.items():
            module.training = mode
            children = _torch.children_of(module)
            if children != inside:
                children.clear()
                children.update(inside)

    with undoing(restore):
        # The flags, not `eval()`: some modules merge weights there, which restoring a flag would not undo.
        for module in before:
            module.training = module in training
        yield


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo``, which may be repeated, on leaving, and to its end even if an interrupt falls into it.

    >>> with undoing(lambda: print("as it was")):
    ...     print("changed")
    changed
    as it was
    """
    # Not a function to be called in a `finally`: an interrupt as it is entered would leave everything undone.
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise


def _copies(tensors: Sequence[Tensor], device: torch.device | str | None) -> list[Tensor]:
    """Copies even where the tensors are on that device already."""
    copies = [torch.empty_like(tensor, device=device, requires_grad=False) for tensor in tensors]
    copy_into(copies, tensors)
    return copies
