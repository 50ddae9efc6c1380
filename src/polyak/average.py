"""One running average of a model's weights, followed while it trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyak import _torch
from polyak._attach import Attachment
from polyak._checks import Difference, checked, refuse_other_state, warn_user, whole_within, within
from polyak._mean import Accumulator, CheckFinite
from polyak._model import (
    Binding,
    ModelTensors,
    local,
    refuse_swapped,
    shape_of,
    sharded_like,
    watch_for_thaws,
)
from polyak._module import AverageModules, module_without_weights
from polyak._swap import Swap, copy_into, undoing
from polyak._version import __version__
from polyak.errors import NotStartedError, StateError, StructureError, SwapError, name_list
from polyak.profiles import Scheme, as_scheme

__all__ = ["Average"]


class Average:
    """The average of the weights that a model passes through: SWA, EMA or any other scheme.

    After the n-th sample w_n the mean is m_n = m_{n-1} + c_n (w_n - m_{n-1}), with the scheme's coefficients
    c_n. Parameters are matched by name, tied ones averaged once, frozen ones and buffers taken from the live
    model. The average costs one copy of the parameters, in fp32 at least.

    Samples are taken after optimizer steps start + every, start + 2·every, …: ``start`` is where the first cycle of
    ``every`` steps begins, at whose end the first sample is taken. Recipes that name the step of the first sample,
    as the SWA paper's does, mean ``start + every`` by it: with 390 steps an epoch, one sample at the end of each
    from the 161st on is ``start=160 * 390, every=390``.

    Args:
        model: any module: plain, compiled, in DistributedDataParallel, or sharded by ``fully_shard``. It is
            never copied.
        scheme: any :class:`polyak.Scheme`, or its text: ``polyak.Uniform()`` (SWA), ``"ema:half_life=2000"``, …
        start: optimizer steps before averaging begins.
        every: optimizer steps between samples: they are taken after steps start + every, start + 2·every, …; None:
            only :meth:`update_now` takes them.
        dtype: of the average; None: that of each parameter, but at least fp32.
        device: where the average and the backup of a swap are kept; None: beside each parameter. With "cpu", samples of
            an accelerator's model are copied to the host, and while training goes on where :func:`polyak.attach` calls
            :meth:`update`; the copy takes pinned memory there, as much as the weights in their dtype.
        buffers: "copy" takes buffers from the live model; "average" averages the floating ones.
        include: names or glob patterns of the tensors to average, frozen ones too; None: every trainable one, and
            those that thaw, for which all samples before have the value that they had while frozen.
        exclude: names or glob patterns of tensors to take from the live model instead.
        check_finite: True leaves out a sample that holds a NaN or an infinity and counts it in ``n_skipped``;
            "raise" raises :class:`~polyak.errors.NonFiniteError`; False does not look.
        compensated: twice the memory, for a million samples and more (Kahan 1965).

    Raises:
        OptionError: an option is out of range, or nothing would be averaged.

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization.

    >>> import torch, polyak
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> swa = polyak.Average(model, polyak.Uniform(), start=1)
    >>> for value in (9.0, 2.0, 4.0):                       # the weights after three optimizer steps
    ...     _ = model.weight.data.fill_(value)
    ...     swa.update()
    >>> with swa.applied():
    ...     print(model.weight.data)
    tensor([[3., 3.]])
    >>> model.weight.data
    tensor([[4., 4.]])
    """

    _attachment: Attachment | None = None  # to the optimizer that calls update()
    _blended: list[Tensor] | None = None  # what a swap puts into the model, where it is not the average alone
    _share: float

    @checked
    def __init__(
        self,
        model: nn.Module,
        scheme: Scheme | str,
        *,
        start: int = 0,
        every: int | None = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        check_finite: CheckFinite = True,
        compensated: bool = False,
    ):
        self._scheme = as_scheme(scheme)
        self.start = whole_within("[0, inf)", "start", start)
        self.every = None if every is None else whole_within("[1, inf)", "every", every)
        self._buffers = buffers
        self._device = device
        self._make_accumulator = partial(
            Accumulator, dtype=dtype, device=device, compensated=compensated, check_finite=check_finite
        )
        self._compensated = compensated
        self._binding = Binding(model, buffers=buffers, include=include, exclude=exclude)
        self._accumulator = self._allocate() if self._binding.ready else None
        self._modules: AverageModules | None = None
        self._swap: Swap | None = None
        self._step = 0
        self._sampled_at = 0
        self._origin: int | None = None
        self._watch()

    # Following the model.

    @property
    def scheme(self) -> Scheme:
        """Which coefficients c_n the average follows. Another scheme, or its text, may be assigned at any time.

        It counts from the next sample on, as if it had been followed from the start: the next coefficient is its
        c_n for the n samples, and the optimizer steps, that there were so far. So each later sample gets the weight
        that the new scheme gives it; what is averaged already keeps its proportions, and weighs together what the
        new scheme gives to all steps up to now. With the change after sample k, at t_k of T, and F, G the old and
        the new scheme::

            a_i = G(t_k, T) (F(t_i, t_k) - F(t_{i-1}, t_k))     for i <= k
            a_i = G(t_i, T) - G(t_{i-1}, T)                     for i > k

        Raises:
            OptionError: on assigning what is no scheme; the average goes on as before.

        >>> import torch, polyak
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = polyak.Average(model, polyak.Uniform())
        >>> for step, value in enumerate((1.0, 3.0, 10.0)):
        ...     if step == 2:
        ...         average.scheme = "ema:decay=0.5,debias=false"       # the next sample takes half
        ...     _ = model.weight.data.fill_(value)
        ...     average.update()
        >>> average.named_tensors()["weight"]
        tensor([[6.]])
        """
        return self._scheme

    @scheme.setter
    def scheme(self, scheme: Scheme | str) -> None:
        self._scheme = as_scheme(scheme)
        if self._accumulator:
            self._accumulator.scheme = self._scheme

    @_torch.uncompiled
    def update(self) -> None:
        """Count one optimizer step, and take a sample if one is due.

        Call it after each ``optimizer.step()``, or let :func:`polyak.attach` call it, which also knows the
        steps that GradScaler skipped.

        Raises:
            SwapError: the averaged weights are in the model.
            OptionError: an optimizer calls it already, by :func:`polyak.attach`.
            StructureError: the model's tensors are no longer those it was made for, or have no data yet.
            NonFiniteError: with ``check_finite="raise"``.
        """
        if self._attachment is not None:
            self._attachment.refuse_by_hand(self)
        self._refuse_while_swapped("update() would average the averaged weights")
        self._step += 1
        past = self._step - self.start
        if self.every is not None and past > 0 and past % self.every == 0:
            self._sample()

    @_torch.uncompiled
    def update_now(self) -> None:
        """Take a sample now, whatever the schedule; raises as :meth:`update` does.

        It stands for the optimizer steps counted since the last sample, the first one for those since ``start``.
        Where none were, because the caller keeps the schedule and never calls :meth:`update`, it stands for ``every``
        steps.
        """
        self._refuse_while_swapped("update_now() would average the averaged weights")
        if self._step == self._sampled_at:
            self._step += self.every or 1
        self._sample()

    @property
    def n_averaged(self) -> int:
        """Samples in the average."""
        return self._accumulator.n_averaged if self._accumulator else 0

    @property
    def n_skipped(self) -> int:
        """Samples left out because they held a NaN or an infinity."""
        return self._accumulator.n_skipped if self._accumulator else 0

    @property
    def swapped(self) -> bool:
        """Whether the averaged weights are in the model."""
        return self._swap is not None and self._swap.active

    @property
    def backend(self) -> str:
        """What takes the next sample in: "torch" by its operations; "numba" on the host, "triton" on accelerators.

        numba comes with ``pip install 'polyak[fast]'``. Until its loops are compiled, which takes seconds where it is
        not done yet and holds nothing up, this is "torch". Accepted samples give the same bits by either.
        """
        return self._accumulator.backend if self._accumulator else "torch"

    # Using the average.

    def named_tensors(self) -> dict[str, Tensor]:
        """The averaged model: name to tensor, each tied tensor once under its first name, no copies.

        Averaged tensors are the average's own, in its dtype; the rest (frozen parameters, buffers) are the
        live model's, and inside :meth:`applied` all buffers are, as :func:`polyak.update_bn` may have left them.
        Inside ``applied(share)`` the averaged tensors are what was put in, in the average's dtype.
        Buffers that are not part of a state dict are left out.

        Raises:
            NotStartedError: before the first sample.
        """
        return self._persistent_tensors("named_tensors()")

    @contextmanager
    def applied(self, share: float = 1.0) -> Iterator[nn.Module]:
        """The averaged weights in the model; the live ones are back on leaving, however it is left.

        Buffers come back too, so BatchNorm statistics may be recomputed inside. Whether modules are in training
        or evaluation mode is the caller's and stays as it is set.

        Args:
            share: of the average, in [0, 1]; the rest is that of the live weights now, as in
                :class:`polyak.Blend`. A blend is a copy of the average more, as long as it is in the model, and is
                what :meth:`save`, :meth:`copy_to` and :meth:`named_tensors` take there.

        Raises:
            NotStartedError: before the first sample.
            OptionError: a share out of range; nothing was changed.
            SwapError: averaged weights are in the model already.

        >>> import torch, polyak
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = polyak.Average(model, polyak.Uniform())
        >>> for value in (1.0, 3.0):
        ...     _ = model.weight.data.fill_(value)
        ...     average.update()
        >>> with average.applied(share=0.25):
        ...     print(model.weight.item())
        2.75
        """
        self._refuse_while_swapped("applied() cannot be nested")
        with undoing(self._swap_out_if_swapped):
            self.swap_in(share)
            yield self._binding.model

    @_torch.uncompiled
    def swap_in(self, share: float = 1.0) -> None:
        """Put the averaged weights into the model until :meth:`swap_out`; as :meth:`applied` does."""
        self._refuse_while_swapped("swap_in() was called twice")
        share = within("[0, 1]", "share", share)
        accumulator = self._started("swap_in()")
        self._follow_model()
        blended = None if share == 1 else _blended(self._binding.live, accumulator.means, share)
        # Kept before anything is copied: whatever interrupts the rest, the live weights can be brought back.
        self._swap = Swap.of(self._binding, self._device)
        self._blended, self._share = blended, share
        self._swap.put_in(accumulator.means if blended is None else blended)

    @_torch.uncompiled
    def swap_out(self) -> None:
        """Bring the live weights back.

        Raises:
            SwapError: the averaged weights are not in the model.
        """
        if self._swap is None or not self._swap.active:
            raise SwapError("swap_out() without swap_in(): the model holds its live weights")
        self._binding.tensors.reshard()
        self._swap.undo()
        self._swap = self._blended = None

    @checked
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged model into ``model``, by name; for the live model this is for good.

        Raises:
            NotStartedError: before the first sample.
            StructureError: a tensor of ``model`` is missing here or has another shape; nothing was written.
        """
        values = self._tensors("copy_to()")
        ours = ModelTensors(self._binding.model)
        sources = {name: values[canonical] for name, canonical in ours.all_names().items()}
        theirs = ModelTensors(model)
        if waiting := theirs.unmaterialised():
            raise StructureError(f"{name_list(waiting)} of the target have no data yet: materialise it first")
        targets = list(theirs.values())
        wanted = {t.name: shape_of(t.tensor) for t in targets}
        if unfit := Difference.of(wanted, {n: shape_of(t) for n, t in sources.items() if n in wanted}):
            raise StructureError(f"the average does not fit this model: it {unfit}; nothing was written")
        copy_into(local(t.tensor for t in targets), local(sources[t.name] for t in targets))

    @checked
    def module(self, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
        """The averaged model as a module of its own, in evaluation mode, to be called beside the live one.

        For a teacher, a reference policy, a validation beside training: it is what :meth:`applied` puts into the live
        model, which it leaves alone. It is made once and follows the average from then on; several may be made.

        Its parameters lie in the average's own memory, and take none, where they have its dtype and device; elsewhere,
        as in a bf16 model that is averaged in fp32, they are copies that each sample brings up to date. Those that are
        not averaged lie in the live model's memory. Buffers are its own: copies of the live model's, or of the
        average's with ``buffers="average"``, made now and with each sample. What :func:`polyak.update_bn` writes into
        them so stays until the next sample. Before the first sample it is the live model, in the live model's memory.

        It requires no gradients. Training it, or loading weights into it, would change the average, so that the next
        sample is refused where its parameters require gradients; ``copy.deepcopy(module)`` is yours to change.
        ``train()`` is yours as well, and the modes that ``.to()`` gives it stay.

        Args:
            factory: makes a module with the tensors of the model, by name and shape; None: the model is copied, without
                its weights, but with its hooks. DDP, ``torch.compile`` and the like are not part of it.

        Raises:
            StructureError: the model cannot be copied, is sharded, or has no data yet; or the factory's is another.
            SwapError: another average's weights are in the model.

        >>> import torch, polyak
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> average = polyak.Average(student, polyak.Uniform())
        >>> teacher = average.module()
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = student.weight.data.fill_(value)
        ...     average.update()
        ...     print(teacher(torch.ones(1, 1)).item())
        1.0
        1.5
        3.0
        """
        accumulator = self._follow_model()
        if not self.swapped:
            refuse_swapped(self._binding.live)
        if self._binding.sharded:
            raise StructureError(
                "the model is sharded, and a copy of it would not be: evaluate inside applied(), or make a second "
                "model, shard it alike, and call average.copy_to(second) after each update"
            )
        module = module_without_weights(self._binding.model, factory)
        if self._modules is None:
            self._modules = AverageModules()
        self._modules.add(module, self._binding, accumulator, is_copy=factory is None)
        return module

    @checked
    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the averaged model as a checkpoint, in the average's own dtype, atomically.

        The ending chooses the format: ``.safetensors``, ``.pt``, …; see :mod:`polyak.checkpoints`. A sharded
        model is written by all ranks, each its own elements, without gathering: as one ``.safetensors`` file, or
        under a name without an ending as a ``torch.distributed.checkpoint`` folder.

        A model with BatchNorm is saved inside :meth:`applied`, after :func:`polyak.update_bn`. Elsewhere its
        statistics are not those of the averaged weights, and a warning says so.

        Raises:
            NotStartedError: before the first sample.
            OutputExistsError: ``path`` exists and ``overwrite`` is False.
            OptionError: a sharded average under the ending of a format that only one process can write.
        """
        from polyak import checkpoints
        from polyak.batchnorm import tracks_statistics

        tensors = self._persistent_tensors("save()")
        if tracks_statistics(self._binding.model) and not self.swapped:
            warn_user(
                "the BatchNorm statistics in this file are not those of the averaged weights; save inside "
                "applied(), after polyak.update_bn(loader, model)"
            )
        entries = [e for e in ModelTensors(self._binding.model).values() if e.persistent]
        ties = {alias: e.name for e in entries for alias in e.aliases}
        about = {"scheme": str(self.scheme), "n_averaged": self.n_averaged, "polyak": __version__}
        if self._blend_in_model:
            about["share"] = self._share
        write = checkpoints.write_sharded if self._binding.sharded else checkpoints.write
        write(path, tensors, ties=ties, metadata={"polyak": json.dumps(about)}, overwrite=overwrite)

    # Saving and resuming.

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bitwise as if never interrupted: plain values and tensors, no copies.

        It loads with ``torch.load(weights_only=True)``, has the same keys and shapes at any time, but for parameters
        that thaw, and goes through ``torch.distributed.checkpoint``, sharded where the model is.
        """
        accumulator = self._follow_model()
        self._count_replayed(accumulator)
        return {
            **self._options(),
            "step": self._step,
            "sampled_at": self._sampled_at,
            "origin": self._origin,
            "n_averaged": accumulator.n_averaged,
            "n_skipped": accumulator.n_skipped,
            "position": accumulator.position,
            "frozen": self._binding.frozen,
            **self._saved_tensors(accumulator),
        }

    @checked
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state, also where other parameters are frozen now than were then.

        Raises:
            StateError: it was saved with another scheme, schedule or shape; nothing was loaded. To go on with
                another scheme, set :attr:`scheme` to that of the state, load it, and set the new one.
            SwapError: the averaged weights are in the model.
        """
        self._refuse_while_swapped("load_state_dict() would be undone by the swap")
        accumulator = self._follow_model()
        with self._binding.choosing_as(state, partial(self._bind, accumulator)) as names:
            self._refuse_other_state(state, names)
        self._watch()
        for kind, tensors in self._saved_tensors(accumulator).items():
            copy_into(local(tensors.values()), local(state[kind][name] for name in tensors))
        self._step, self._sampled_at, self._origin = state["step"], state["sampled_at"], state["origin"]
        clock = None if self._origin is None else float(self._sampled_at - self._origin)
        accumulator.restart(state["n_averaged"], state["n_skipped"], state["position"], clock)
        if self._modules is not None:
            self._modules.restart()
            self._modules.follow(self._binding, accumulator)

    def _refuse_other_state(self, state: dict[str, Any], names: list[str]) -> None:
        current = self.state_dict()
        kinds = self._saved_tensors(self._follow_model())
        current |= {kind: {name: tensors[name] for name in names} for kind, tensors in kinds.items()}
        options = [name for name in self._options() if name != "scheme"]
        refuse_other_state(current, state, options, [("sampled_at", "step"), ("n_averaged",), ("n_skipped",)])
        if state["origin"] is not None:
            whole_within(f"[-inf, {state['sampled_at']}]", "the saved origin", state["origin"])
        within("[0, inf)", "the saved position", state["position"])
        if (saved := state["scheme"]) != current["scheme"]:
            raise StateError(
                f"the state was saved with scheme={saved!r}, but this has scheme={current['scheme']!r}; nothing was "
                f"loaded. Set average.scheme = {saved!r} before loading, and the scheme to go on with after it"
            )

    def __repr__(self) -> str:
        schedule = f"start={self.start}, every={self.every}"
        return f"Average({self.scheme!r}, {schedule}, n_averaged={self.n_averaged}, backend={self.backend!r})"

    # How it works inside.

    def _sample(self) -> None:
        if self._modules is not None:
            self._modules.refuse_trained()
        self._sampled_at = self._step
        accumulator = self._follow_model()
        self._take_up_thawed()
        if (origin := self._origin) is None:
            origin = self._origin = self.start if self._step > self.start else self._step - (self.every or 1)
        accumulator.add(self._binding.live, self._step - origin, overlaps=self._overlaps)
        if self._modules is not None:
            self._modules.follow(self._binding, accumulator, with_buffers=True)

    @property
    def _overlaps(self) -> bool:
        """Whether training may go on while a sample is copied to the host: where only an optimizer's steps write it."""
        attached = self._attachment is not None and self._attachment.holds
        return attached and self._buffers == "copy"

    def _count_replayed(self, accumulator: Accumulator) -> None:
        """Steps for which a CUDA graph replayed :meth:`update` were counted on the device alone."""
        steps = round(accumulator.replayed())
        self._step += steps
        self._sampled_at += steps

    def _follow_model(self) -> Accumulator:
        replaced = self._binding.follow()
        if self._accumulator is None:
            self._accumulator = self._allocate()
        elif replaced:
            self._bind(self._accumulator)
        return self._accumulator

    def _bind(self, accumulator: Accumulator) -> None:
        accumulator.bind(self._binding.live, self._binding.names)
        if self._modules is not None:
            self._modules.follow(self._binding, accumulator)

    def _take_up_thawed(self) -> None:
        if self._binding.thawed():
            accumulator = self._follow_model()
            self._binding.average_also(self._binding.thawed(), partial(self._bind, accumulator))

    def _watch(self) -> None:
        if self._binding.frozen:
            watch_for_thaws(self._take_up_thawed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()

    def _allocate(self) -> Accumulator:
        binding = self._binding
        agree = binding.agree if binding.sharded else None
        return self._make_accumulator(
            binding.live, binding.names, self.scheme, agree=agree, watched=binding.watches_memory
        )

    def _started(self, call: str) -> Accumulator:
        if self._accumulator is None or not self._accumulator.n_averaged:
            first = "by update_now(), not at optimizer steps"
            if self.every is not None:
                first = f"after optimizer step {self.start + self.every}"
            raise NotStartedError(
                f"{call} needs at least one sample; the first is taken {first}, and {self._step} were counted (is "
                "update() called?)"
            )
        return self._accumulator

    @property
    def _blend_in_model(self) -> list[Tensor] | None:
        """After an interrupt the blend of a swap that is over may be there still."""
        return self._blended if self.swapped else None

    def _swap_out_if_swapped(self) -> None:
        if self.swapped:
            self.swap_out()

    def _persistent_tensors(self, call: str) -> dict[str, Tensor]:
        tensors = self._tensors(call)
        entries = ModelTensors(self._binding.model).values()
        return {e.name: tensors[e.name].detach() for e in entries if e.persistent}

    def _tensors(self, call: str) -> dict[str, Tensor]:
        """The averaged model; while swapped its buffers are those in the model, which may have been recomputed."""
        self._started(call)
        accumulator = self._follow_model()
        means = self._named(self._blend_in_model or accumulator.means)
        entries = list(ModelTensors(self._binding.model).values())
        others = [e.tensor for e in entries if e.name not in means]
        if not self.swapped:  # what is not averaged here must not be another average's
            refuse_swapped(local(others))
        swapped = self.swapped
        own = {e.name for e in entries if e.name in means and (e.kind == "parameter" or not swapped)}
        return {e.name: means[e.name] if e.name in own else e.tensor for e in entries}

    def _named(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        binding = self._binding
        return {n: sharded_like(t, w) for n, t, w in zip(binding.names, tensors, binding.whole, strict=True)}

    def _saved_tensors(self, accumulator: Accumulator) -> dict[str, dict[str, Tensor]]:
        average = {"average": self._named(accumulator.means)}
        return average | {"residual": self._named(accumulator.residuals)} if self._compensated else average

    def _options(self) -> dict[str, Any]:
        return {
            "scheme": str(self.scheme),
            "start": self.start,
            "every": self.every,
            "buffers": self._buffers,
            "compensated": self._compensated,
        }

    def _refuse_while_swapped(self, why: str) -> None:
        if self.swapped:
            raise SwapError(
                f"the averaged weights are in the model: {why}. Leave applied() or call swap_out()"
            )
        refuse_swapped(self._binding.live)


@torch.no_grad()
def _blended(live: Sequence[Tensor], means: Sequence[Tensor], share: float) -> list[Tensor]:
    """live + share · (mean - live) in the dtype and the place of each mean; equal ones stay as they are."""
    return [w.detach().to(mean, copy=True).lerp_(mean, share) for w, mean in zip(live, means, strict=True)]
