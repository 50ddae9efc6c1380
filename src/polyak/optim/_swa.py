"""The running mean of one parameter group of an optimizer, and its exchange with the live weights."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak import _torch
from polyak._mean import Accumulator
from polyak._model import is_sharded, refuse_swapped
from polyak._swap import copy_into
from polyak.errors import OptionError, StateError, StructureError, SwapError, name_list
from polyak.profiles import Uniform

__all__ = ["SWA"]

# The running mean of one parameter group of an optimizer, and its exchange with the live weights.

Buffers = dict[str, Tensor]


class GroupAverage:
    """The uniform mean of parameters, in fp32 at least.

    The counts are those of the group, ``n_avg`` and ``n_skipped``. Keeping them there as plain numbers waits
    for an accelerator once a sample.

    >>> group = {"params": [torch.tensor([1.0])], "n_avg": 0, "n_skipped": 0}
    >>> average = GroupAverage(averageable(group))
    >>> for value in (1.0, float("inf"), 3.0):
    ...     _ = group["params"][0].fill_(value)
    ...     average.update(group)
    >>> average.swap_in()
    >>> group
    {'params': [tensor([2.])], 'n_avg': 2, 'n_skipped': 1}
    >>> average.swap_out()
    >>> group["params"]
    [tensor([3.])]
    """

    def __init__(self, params: list[Tensor]):
        self.params = params
        self.live: list[Tensor] = []  # copies of the live weights, while the averages are in their place
        self._versions: list[int] = []
        self._kinds = _kinds(params)
        self._accumulator = Accumulator(params, list(map(str, range(len(params)))), Uniform())

    def update(self, group: dict[str, Any]) -> None:
        """Take a sample of ``group``; if its ``n_avg`` was set to 0, of a new mean.

        Raises:
            StructureError: its parameters or their shapes are not those of the first sample.
        """
        self._follow(averageable(group))
        refuse_swapped(self.params)
        if not group["n_avg"]:
            self._accumulator.restart(n_skipped=group["n_skipped"])
        self._accumulator.add(self.params)
        group["n_avg"], group["n_skipped"] = self._accumulator.n_averaged, self._accumulator.n_skipped

    def swap_in(self) -> None:
        """Put the averages into the parameters; raises :class:`SwapError` inside another average's swap."""
        refuse_swapped(self.params)
        # All copies are made before the first parameter changes: an interrupt loses nothing.
        self.live = [parameter.detach().clone() for parameter in self.params]
        copy_into(self.params, self._accumulator.means)
        self._versions = _torch.versions(self.params)

    def swap_out(self) -> None:
        """Bring the live weights back; raises :class:`SwapError` inside another average's swap."""
        refuse_swapped(self.params)
        # No versions: it was swapped in before it was saved, and the model loaded since.
        changed = self._versions and self._versions != _torch.versions(self.params)
        copy_into(self.params, self.live)
        self.live, self._versions = [], []
        if changed:
            warnings.warn(
                "the weights were changed while the averaged ones were in the model; those changes are gone, as "
                "the live weights are back",
                UserWarning,
                stacklevel=3,
            )

    def buffers(self) -> dict[Tensor, Buffers]:
        """To each parameter its ``swa_buffer``, and while swapped its ``live_buffer``; no copies."""
        kept = {"swa_buffer": self._accumulator.means} | ({"live_buffer": self.live} if self.live else {})
        return {p: {key: kept[key][i] for key in kept} for i, p in enumerate(self.params)}

    @classmethod
    def loaded(
        cls, params: list[Tensor], saved: Mapping[Tensor, Buffers], counts: Mapping[str, int]
    ) -> GroupAverage:
        """An average with the saved buffers and the counts ``n_avg`` and ``n_skipped``."""
        average = cls(params)
        copy_into(average._accumulator.means, [saved[p]["swa_buffer"] for p in params])
        average._accumulator.restart(counts["n_avg"], counts["n_skipped"])
        average.live = [saved[p]["live_buffer"] for p in params if "live_buffer" in saved[p]]
        return average

    def __reduce__(self) -> tuple[Any, ...]:
        # Piece by piece: the accumulator works on views, which pickle would tear from their means.
        counts = {"n_avg": self._accumulator.n_averaged, "n_skipped": self._accumulator.n_skipped}
        return GroupAverage.loaded, (self.params, self.buffers(), counts)

    def _follow(self, params: list[Tensor]) -> None:
        if list(map(id, params)) != list(map(id, self.params)):
            raise StructureError(
                "the group's parameters are not those of its first sample; add new ones as a new group"
            )
        kinds = _kinds(params)
        if kinds == self._kinds:
            return
        if [shape for shape, *_ in kinds] != [shape for shape, *_ in self._kinds]:
            raise StructureError(
                "a parameter of the group has another shape than at its first sample; make a new optimizer"
            )
        self._accumulator.bind(params)
        self._kinds = kinds


def averageable(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group that have a mean; integer ones, as of quantised models, have none."""
    return [p for p in group["params"] if p.is_floating_point() or p.is_complex()]


def all_params(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The parameters of all groups in one list, or their indices where the groups are saved ones."""
    return list(chain.from_iterable(group["params"] for group in groups))


def refuse_sharded(groups: Iterable[Mapping[str, Any]]) -> None:
    """Whole parameters are averaged here, and the ranks would not agree on which samples are finite."""
    if any(is_sharded(parameter) for parameter in all_params(groups)):
        raise StructureError(
            "the parameters are sharded, which SWA cannot average; polyak.Average with polyak.Uniform() can"
        )


def saved_buffers(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Buffers]:
    """The buffers in a saved state of SWA, by the parameters of ``groups`` that they belong to.

    Raises:
        StateError: the state is of another kind, or of other groups or shapes, or lacks averages.
    """
    if lacking := [key for key in ("opt_state", "swa_state", "param_groups") if key not in state]:
        raise StateError(f"this is not a state of SWA: it lacks {name_list(lacking)}; nothing was loaded")
    saved_sizes = [len(group["params"]) for group in state["param_groups"]]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise StateError(
            f"the state has groups of {saved_sizes} parameters, this optimizer of {sizes}; nothing was loaded"
        )
    buffers = {
        parameter: state["swa_state"].get(index, {})
        for index, parameter in zip(all_params(state["param_groups"]), all_params(groups), strict=True)
    }
    for number, (saved, group) in enumerate(zip(state["param_groups"], groups, strict=True)):
        if saved.get("n_avg"):
            _refuse_unfit(number, averageable(group), buffers)
    return buffers


def _refuse_unfit(number: int, params: list[Tensor], buffers: Mapping[Tensor, Buffers]) -> None:
    for index, parameter in enumerate(params):
        if "swa_buffer" not in buffers[parameter]:
            raise StateError(
                f"the state has no average of parameter {index} in group {number}, though it counts samples of "
                "it (torchcontrib loses them when it saves); nothing was loaded"
            )
        saved = {key: tuple(buffer.shape) for key, buffer in buffers[parameter].items()}
        if set(saved.values()) != {tuple(parameter.shape)}:
            raise StateError(
                f"parameter {index} of group {number} has shape {tuple(parameter.shape)}, and the state's "
                f"buffers have {saved}; nothing was loaded"
            )


def _kinds(params: list[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device, bool]]:
    return [(p.shape, p.dtype, p.device, p.is_contiguous()) for p in params]


# SWA as an optimizer that wraps another one: the interface of torchcontrib, on today's torch.

_COUNTS = ("n_avg", "n_skipped", "step_counter")
_HOOKS = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


class SWA(Optimizer):
    """Stochastic Weight Averaging around any torch optimizer: what it steps to is averaged on the way.

    In automatic mode, with ``swa_start`` and ``swa_freq`` given, parameter groups are sampled after the steps
    t > swa_start with t divisible by swa_freq, and from step swa_start + 1 on run at ``swa_lr``. Both count
    **optimizer steps** since a group was added, never epochs, as glossaries often have it: for epochs multiply
    by ``len(loader)``. In manual mode, without them, call :meth:`update_swa`. After n samples w_i of a group

        swa_buffer = (w_1 + … + w_n) / n,    followed as    m += (w - m) / n

    for all its floating parameters, as in torchcontrib also frozen ones and those without a gradient. Averages
    are in fp32 at least. A sample with a NaN or an infinity is left out and counted in the group's ``n_skipped``,
    beside ``n_avg`` and ``step_counter``; a step that GradScaler skips counts nowhere.

    ``param_groups``, ``defaults`` and ``state`` show the wrapped optimizer's own, so learning-rate schedulers
    may be given either of the two. After :meth:`swap_swa_sgd` a model with BatchNorm wants :meth:`bn_update`.

    Args:
        optimizer: the optimizer to wrap; it stays in reach as ``.optimizer``.
        swa_start: optimizer steps before sampling; None: manual mode.
        swa_freq: optimizer steps between samples; None: manual mode.
        swa_lr: learning rate after swa_start steps; None: left alone.

    Raises:
        OptionError: a negative start or learning rate, a frequency below 1, or no torch optimizer.

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization.

    >>> import torch
    >>> from polyak.optim import SWA
    >>> model, loss_fn = torch.nn.Linear(4, 1), torch.nn.MSELoss()
    >>> input, target = torch.randn(8, 4), torch.randn(8, 1)
    >>> opt = SWA(torch.optim.SGD(model.parameters(), lr=0.1), swa_start=10, swa_freq=5, swa_lr=0.05)
    >>> for _ in range(100):
    ...     opt.zero_grad()
    ...     loss_fn(model(input), target).backward()
    ...     opt.step()
    >>> opt.swap_swa_sgd()                    # the averaged weights are in the model

    >>> opt.param_groups[0]["n_avg"]          # after steps 15, 20, …, 100
    18
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_start: int | None = None,
        swa_freq: int | None = None,
        swa_lr: float | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise OptionError(f"SWA wraps a torch optimizer, got {type(optimizer).__name__}")
        refuse_sharded(optimizer.param_groups)
        self.swa_start, self.swa_freq, self.swa_lr = _schedule(swa_start, swa_freq, swa_lr)
        self._auto_mode = self.swa_start is not None
        self.optimizer = optimizer
        # By each group's first parameter: none is in two groups, and loading replaces the groups themselves.
        self._averages: dict[Tensor, GroupAverage] = {}
        # In place of Optimizer.__init__, which would make groups and a state of its own.
        super().__setstate__({})
        for when in _HOOKS:  # refused now rather than when a state is saved, should torch keep them elsewhere
            _torch.optimizer_hooks(self, when)
        for group in optimizer.param_groups:
            group.update(dict.fromkeys(_COUNTS, 0))

    # What is the wrapped optimizer's: properties, since loading a state replaces the objects.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the wrapped optimizer, with the counts of each."""
        # Here, since a group may be added to the wrapped optimizer, or loaded into it, and not pass by.
        for group in self.optimizer.param_groups:
            for count in _COUNTS:
                group.setdefault(count, 0)
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the wrapped optimizer."""
        return self.optimizer.defaults

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state with each ``swa_buffer``: new dicts at each reading, the same tensors."""
        # Apart underneath, as an optimizer takes any entry for a sign that its own are there.
        merged = defaultdict(dict, {p: dict(entries) for p, entries in self.optimizer.state.items()})
        for parameter, buffers in self._buffers().items():
            merged[parameter].update(buffers)
        return merged

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which begins its own ``step_counter`` and ``n_avg`` at 0."""
        self.optimizer.add_param_group(param_group)
        self.param_groups[-1].update(dict.fromkeys(_COUNTS, 0))

    # Stepping and averaging.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the wrapped optimizer, and in automatic mode the samples that are due.

        Returns:
            What the wrapped optimizer returns: the loss, given a closure.

        Raises:
            SwapError: the averaged weights are in the model.
        """
        self._refuse_while_swapped("step() would train the averaged weights")
        refuse_swapped(all_params(self.param_groups))
        start, lr = self.swa_start, self.swa_lr
        for group in self.param_groups:
            if start is not None and lr is not None and group["step_counter"] >= start:
                _set_lr(group, lr)
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            group["step_counter"] += 1
            if self._is_due(group["step_counter"]):
                self.update_swa_group(group)
        return loss

    def update_swa(self) -> None:
        """Take a sample of every group; raises as :meth:`update_swa_group` does."""
        for group in self.param_groups:
            self.update_swa_group(group)

    def update_swa_group(self, group: dict[str, Any]) -> None:
        """Take a sample of one of the ``param_groups``; setting its ``n_avg`` to 0 before begins a new mean.

        Raises:
            OptionError: ``group`` is none of them.
            SwapError: the averaged weights are in the model.
            StructureError: its parameters or their shapes are not those of its first sample.
        """
        self._refuse_while_swapped("a sample would be of the averaged weights")
        if not any(group is own for own in self.param_groups):
            raise OptionError("update_swa_group takes one of this optimizer's param_groups")
        if params := averageable(group):
            average = self._averages.get(group["params"][0]) or GroupAverage(params)
            average.update(group)
            self._averages[group["params"][0]] = average

    def swap_swa_sgd(self) -> None:
        """Exchange the live and the averaged weights, in place; a second call exchanges them back.

        Live weights come back bit for bit, and averages keep their own precision, whatever the model's dtype.
        Until then steps, samples and loading are refused, and what else changes the weights is undone with a
        warning. Groups without a sample are skipped, with a warning for each parameter.
        """
        if self._is_swapped():
            for average in self._averages.values():
                if average.live:
                    average.swap_out()
            return
        for number, group in enumerate(self.param_groups):
            average = self._average_of(group)
            if average is not None:
                average.swap_in()
            else:
                _warn_of_no_sample(number, group)

    @staticmethod
    def bn_update(
        loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None
    ) -> None:
        """Set BatchNorm statistics to those of all samples in ``loader``: :func:`polyak.update_bn`."""
        from polyak.batchnorm import update_bn

        update_bn(loader, model, device)

    # Saving and resuming.

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bitwise as if never interrupted; it loads with ``weights_only=True``.

        Returns:
            ``opt_state``, the wrapped optimizer's; ``swa_state``, to each averaged parameter's index its
            ``swa_buffer``, and while swapped the ``live_buffer``; and ``param_groups``. No copies. The schedule
            is not in it: it is the constructor's, as in torchcontrib.
        """
        for hook in _torch.optimizer_hooks(self, "state_dict_pre"):
            hook(self)
        inner = self.optimizer.state_dict()
        index = dict(zip(all_params(self.param_groups), all_params(inner["param_groups"]), strict=True))
        state = {
            "opt_state": inner["state"],
            "swa_state": {index[p]: buffers for p, buffers in self._buffers().items()},
            "param_groups": inner["param_groups"],
        }
        for hook in _torch.optimizer_hooks(self, "state_dict_post"):
            state = hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, one that was saved while swapped too.

        Raises:
            StateError: it is of another kind, or of other groups or shapes; nothing was loaded.
            SwapError: the averaged weights are in the model.
        """
        self._refuse_while_swapped("load_state_dict() would lose the live weights")
        state = state_dict.copy()
        for hook in _torch.optimizer_hooks(self, "load_state_dict_pre"):
            state = hook(self, state) or state
        saved = saved_buffers(state, self.param_groups)
        # torch's optimizers would go on with the very tensors of the state, and so change it.
        inner = {"state": deepcopy(state["opt_state"]), "param_groups": state["param_groups"]}
        self.optimizer.load_state_dict(inner)
        self._averages = {
            group["params"][0]: GroupAverage.loaded(averageable(group), saved, group)
            for group in self.param_groups
            if group["n_avg"]
        }
        for hook in _torch.optimizer_hooks(self, "load_state_dict_post"):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and what schedulers put around step stay behind, as in every torch optimizer.
        kept = ("optimizer", "swa_start", "swa_freq", "swa_lr", "_auto_mode", "_averages")
        return {name: self.__dict__[name] for name in kept}

    # How it works inside.

    def _is_due(self, steps: int) -> bool:
        start, freq = self.swa_start, self.swa_freq
        return start is not None and freq is not None and steps > start and steps % freq == 0

    def _average_of(self, group: dict[str, Any]) -> GroupAverage | None:
        """None as long as no sample of the group was taken."""
        return self._averages.get(group["params"][0]) if group["n_avg"] else None

    def _buffers(self) -> dict[Tensor, dict[str, Tensor]]:
        averages = filter(None, map(self._average_of, self.param_groups))
        return {p: buffers for average in averages for p, buffers in average.buffers().items()}

    def _is_swapped(self) -> bool:
        return any(average.live for average in self._averages.values())

    def _refuse_while_swapped(self, why: str) -> None:
        if self._is_swapped():
            raise SwapError(
                f"the averaged weights are in the model: {why}. Call swap_swa_sgd() again to go on with the "
                "live weights, or make a new optimizer to go on from the averaged ones"
            )


def _schedule(
    swa_start: int | None, swa_freq: int | None, swa_lr: float | None
) -> tuple[int | None, int | None, float | None]:
    """The options checked, or nothing of them where one that they need is missing."""
    if swa_start is None or swa_freq is None:
        ignored = ["other"] * (swa_start is not swa_freq) + ["swa_lr"] * (swa_lr is not None)
        for what in ignored:
            warnings.warn(f"Some of swa_start, swa_freq is None, ignoring {what}", UserWarning, stacklevel=3)
        return None, None, None
    steps = _steps("swa_start", swa_start, least=0), _steps("swa_freq", swa_freq, least=1)
    if swa_lr is not None and not 0 <= swa_lr < math.inf:
        raise OptionError(f"Invalid SWA learning rate: {swa_lr}; it must be finite and not negative")
    return *steps, swa_lr


def _steps(option: str, value: float, least: int) -> int:
    if not least <= value < math.inf:
        raise OptionError(f"Invalid {option}: {value}; it counts optimizer steps and must be {least} or more")
    if not isinstance(value, int):
        warnings.warn("Casting swa_start, swa_freq to int", UserWarning, stacklevel=4)
    return int(value)


def _warn_of_no_sample(number: int, group: Mapping[str, Any]) -> None:
    """In torchcontrib's words, which callers match on: each parameter as it prints; and what helps to find it."""
    names = group.get("param_names") or range(len(group["params"]))
    for name, parameter in zip(names, group["params"], strict=True):
        what = f"SWA wasn't applied to param {parameter}; skipping it"
        warnings.warn(
            f"{what}, as group {number} has no sample: its name or place there is {name!r}",
            UserWarning,
            stacklevel=3,
        )


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)  # compiled and captured steps read the tensor that they were given
    else:
        group["lr"] = lr
