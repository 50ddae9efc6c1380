"""What a selection found: the verdict, the table, and the chosen weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak import _plots, _terminal
from polyak._evaluate import Mode, apply_weights, badness, lacks_frozen, live_weights, write_weights
from polyak.batchnorm import tracks_statistics
from polyak.errors import NonFiniteError
from polyak.profiles import Profile
from polyak.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "HEADINGS",
    "LIVE",
    "RECALIBRATED",
    "STALE_STATISTICS",
    "Candidate",
    "HoldoutCheck",
    "Selection",
    "as_rows",
    "shortened",
]

# A candidate's evidence, and all of it in words.

# The live weights as the run ended, and with BatchNorm statistics recomputed as those of every average are.
LIVE = "live"
RECALIBRATED = "live, recalibrated"
STALE_STATISTICS = (
    "These scores are not those the averages can have: the model has BatchNorm layers, whose statistics are of "
    "other weights. Give recalibrate the batches to recompute them from."
)
FROZEN_ARE_THE_MODELS = (
    "Frozen parameters are those of the given model, as the checkpoints have none of them."
)
LIVE_IS_THE_MODEL = (
    "Live are the weights in the model, as the trajectory was opened before its recorder was closed."
)


@dataclass(frozen=True)
class Candidate:
    """One set of weights and how it scored.

    Attributes:
        name: the profile as text, ``live``, or ``live, recalibrated``.
        profile: what was averaged; None for the live weights.
        score: what ``score`` returned, or the mean of the losses that it returned.
        stderr: the standard error of that mean; None if ``score`` returned one number.
        difference: the score minus that of the baseline, see :attr:`Selection.baseline`.
        low, high: the interval of the difference, which holds for all candidates at once with 95%, so that the
            best may be chosen by it; None if ``score`` returned one number, or fewer than five losses.
        tied: whether the best candidate is no better than this one beyond noise; None where there are no intervals.
        effective_samples: 1 / Σ a², of the weights a of the samples: how many equal ones do the same.
        warnings: what speaks against this profile on this run, in sentences.
    """

    name: str
    profile: Profile | None
    score: float
    stderr: float | None
    difference: float
    low: float | None
    high: float | None
    tied: bool | None
    effective_samples: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no NaN: None stands for it. The profile is its name."""
        return {key: _plain(value) for key, value in asdict(self).items() if key != "profile"}


@dataclass(frozen=True)
class HoldoutCheck:
    """The best candidate and the baseline on other data: scores, their difference and its 95% interval.

    Nothing was chosen on these data, so the interval is a plain one.
    """

    best_score: float
    baseline_score: float
    difference: float
    low: float | None
    high: float | None
    examples: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as those of a candidate."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    """The value, or None for a float that is not finite.

    >>> _plain(math.nan), _plain(0.5)
    (None, 0.5)
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The verdict: what the candidates say about the live weights, in sentences.


def verdict(choice: Selection) -> list[str]:
    """Whether an average beats the live weights, how surely, and whether a simpler one does as well."""
    best = choice.best
    if not choice.has_best:
        return ["No candidate has a finite score: look at what score returns for the live weights first."]
    if best.profile is None:
        sentences = [_kept(choice)]
    else:
        sentences = [_against_baseline(choice), _out_of(choice)]
        if choice.holdout is not None:
            sentences.append(_on_holdout(choice.holdout, choice.mode))
    simplest = choice.simplest
    if simplest is not best:
        verb = "are" if simplest.profile is None else "is"
        sentences.insert(
            1, f"{_named(simplest)} ({simplest.score:.5g}) {verb} as good within noise, and simpler."
        )
    return [*sentences, *(f"Mind that {warning}." for warning in best.warnings)]


def _kept(choice: Selection) -> str:
    best, live = choice.best, choice.live
    averages = sum(candidate.profile is not None for candidate in choice.table)
    none = (
        "the average tried is no better than"
        if averages == 1
        else f"none of {averages} averages scored better than"
    )
    what = f"{none} their {best.score:.5g} ({choice.better})"
    if best is live:
        return f"Keep the live weights: {what}."
    return (
        f"Keep the live weights, with recomputed BatchNorm statistics: {what}; with those of the run's end they "
        f"score {live.score:.5g}."
    )


def _named(candidate: Candidate) -> str:
    return {LIVE: "The live weights", RECALIBRATED: "The live weights, recalibrated"}.get(
        candidate.name, candidate.name
    )


def _against_baseline(choice: Selection) -> str:
    best, baseline = choice.best, choice.baseline
    opening = f"{best.name} scores best, {best.score:.5g} ({choice.better})"
    if not math.isfinite(best.difference):
        return f"{opening}; the score of the live weights is not finite."
    sentence = f"{opening}, {_size(best.difference)} {_named(baseline).replace('The', 'the', 1)}"
    if best.low is None or best.high is None:
        from_what, cure = (
            ("one number", "a tensor with one loss per example")
            if choice.examples is None
            else (f"{choice.examples} losses", "those of more examples")
        )
        return (
            f"{sentence}. Whether that is beyond noise, and which simpler ones are as good, cannot be told from "
            f"{from_what} for each: let score return {cure}."
        )
    outcome = "beyond" if choice.beats_baseline else "not beyond"
    return f"{sentence} ({_interval(best.low, best.high)}): {outcome} the noise of these examples."


def _out_of(choice: Selection) -> str:
    sentence = f"It is the best of {len(choice.table)} candidates"
    if choice.best.low is not None and math.isfinite(choice.best.low):
        sentence += ", which the interval allows for"
    if choice.holdout is not None:
        return f"{sentence}."
    return f"{sentence}, but its score is optimistic: confirm it with a holdout, data it was not chosen on."


def _on_holdout(holdout: HoldoutCheck, mode: Mode) -> str:
    if not math.isfinite(holdout.difference):
        return "On the holdout a score is not finite, which confirms nothing."
    size = f"{_size(holdout.difference)} the live weights"
    if holdout.low is None or holdout.high is None:
        is_better = badness(holdout.difference, mode) < 0
        return f"On the holdout it is {'better' if is_better else 'no better'}: {size}."
    confirms = "confirms" if _beyond_noise(holdout.low, holdout.high, mode) else "does not confirm"
    return f"The holdout {confirms} it: {size} ({_interval(holdout.low, holdout.high)})."


def _size(difference: float) -> str:
    return f"{abs(difference):.3g} {'above' if difference > 0 else 'below'}"


def _interval(low: float, high: float) -> str:
    return f"95% interval {low:+.3g} to {high:+.3g}"


def _beyond_noise(low: float, high: float, mode: Mode) -> bool:
    return high < 0 if mode == "min" else low > 0


# Which of several candidates that are as good is the simplest.

# Kinds of profiles by the length of the story that one has to tell of them. Those of the user's own come between
# these and the last two.
_SIMPLE_KINDS = ("uniform", "tail", "window", "ema", "warmup-ema", "decay", "power", "polynomial")
_INTRICATE_KINDS = ("weights", "blend")


def simplicity(profile: Profile | None) -> tuple[int, int]:
    """A number of the profile's kind, and how many options it takes: simpler ones come first.

    The live weights; then the plain mean of all or of the last part; then EMAs, decays, powers; then profiles of
    one's own; then weights for each block, and blends. Of one kind those with fewer options.

    >>> from polyak import EMA, Decay, Tail, Uniform
    >>> sorted([Decay("sqrt", 0.4), EMA(half_life=100), Tail(0.4), Uniform(), None], key=simplicity)
    [None, Uniform(), Tail(0.4), EMA(half_life=100.0), Decay('sqrt', 0.4)]
    """
    if profile is None:
        return 0, 0
    kind = 1 + len(_SIMPLE_KINDS)
    if profile.name in _SIMPLE_KINDS:
        kind = 1 + _SIMPLE_KINDS.index(profile.name)
    elif profile.name in _INTRICATE_KINDS:
        kind += 1 + _INTRICATE_KINDS.index(profile.name)
    return kind, len(profile._words(repr))


# Candidates as a table that people read down its columns.

# A profile with a weight for each block has a name longer than the page.
_MOST_NAME = 28
_MOST_DECIMALS = 8

HEADINGS = ("candidate", "≈", "score", "± error", "difference", "95% interval", "samples")


def as_rows(choice: Selection, candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    """The cells under ``HEADINGS``, which ``choice.legend`` explains; the numbers of a column are equally long."""
    baseline = choice.baseline
    others = [candidate for candidate in candidates if candidate is not baseline]
    score = _form([c.score for c in candidates], 5)
    error = _form([c.stderr for c in candidates], 2)
    difference = _form([c.difference for c in others], 3, "+")
    bound = _form([value for c in others for value in (c.low, c.high)], 3, "+")
    return [
        (
            shortened(c.name),
            "≈" if c.tied and c is not choice.best else "",
            f"{c.score:{score}}",
            "" if c.stderr is None or not math.isfinite(c.stderr) else f"{c.stderr:{error}}",
            "" if c is baseline or not math.isfinite(c.difference) else f"{c.difference:{difference}}",
            "" if c is baseline or not _has_interval(c) else f"{c.low:{bound}} to {c.high:{bound}}",
            f"{c.effective_samples:.4g}",
        )
        for c in candidates
    ]


def _has_interval(candidate: Candidate) -> bool:
    bounds = candidate.low, candidate.high
    return all(bound is not None and math.isfinite(bound) for bound in bounds)


def _form(values: Sequence[float | None], digits: int, sign: str = "") -> str:
    """How to write all of ``values``: the usual one of them with ``digits`` digits.

    >>> _form([0.0123, 0.4, 0.38], 3), _form([1250.0], 2), _form([1e-12, 2e-12], 3, "+")
    ('.3f', '.0f', '+.3g')
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value != 0]
    if not sizes:
        return f"{sign}.{digits}g"
    decimals = max(0, digits - 1 - math.floor(math.log10(median(sizes))))
    # Numbers that are smaller still, or one that is far larger than the rest, make a column of zeros.
    if decimals > _MOST_DECIMALS or max(sizes) >= 10 ** (digits + 3):
        return f"{sign}.{digits}g"
    return f"{sign}.{decimals}f"


def shortened(name: str) -> str:
    """A name that fits into a table or a figure."""
    return name if len(name) <= _MOST_NAME else f"{name[: _MOST_NAME - 1]}…"


# What `select` found: every candidate with its evidence, and the best of them ready for use.

# Beside the simplest and the live weights.
_ROWS_SHOWN, _DOTS_SHOWN = 10, 5


@dataclass(frozen=True, repr=False)
class Selection:
    """The candidates of a run in order of their scores, and what is to be done with the best.

    Printing it shows the best ten, the live weights and the verdict. Made by :func:`polyak.select`.

    Attributes:
        table: every :class:`Candidate`, best first; the live weights are the one named ``live`` and, where BatchNorm
            statistics are recomputed, the one named ``live, recalibrated``.
        mode: "min" or "max", whichever scores are better.
        holdout: the best average and the baseline on data that nothing was chosen on, if that was asked for.
        examples: how many losses ``score`` returned; None if it returned one number.
        prepared: whether ``prepare`` changed each candidate before it was scored.
    """

    table: Sequence[Candidate]
    mode: Mode
    holdout: HoldoutCheck | None
    _trajectory: Trajectory
    _model: nn.Module
    _recalibrate: Iterable[Any] | None
    examples: int | None = None
    prepared: bool = False

    @property
    def best(self) -> Candidate:
        """The candidate of the best score, whether or not that is beyond noise."""
        return self.table[0]

    @property
    def has_best(self) -> bool:
        """Whether any candidate has a finite score; where none has, there is nothing to choose."""
        return math.isfinite(self.best.score)

    @property
    def best_average(self) -> Candidate:
        """The average of the best score, also where the live weights are better."""
        return next(candidate for candidate in self.table if candidate.profile is not None)

    @property
    def live(self) -> Candidate:
        """The live weights, as the run ended with them."""
        return next(candidate for candidate in self.table if candidate.name == LIVE)

    @property
    def baseline(self) -> Candidate:
        """What differences are stated against: the better of ``live`` and ``live, recalibrated``, by score."""
        return next(candidate for candidate in self.table if candidate.profile is None)

    @property
    def simplest(self) -> Candidate:
        """The simplest of the candidates that the best does not beat beyond noise; the best itself at least.

        Simplest are the live weights, then plain means (uniform, tail), then EMAs, decays, powers, profiles of one's
        own, weights of blocks, and blends; of one kind those with fewer options, of these the one that scores best.
        Of scores that are one number no noise is known, and it is the best.
        """
        return min((c for c in self.table if c.tied or c is self.best), key=lambda c: simplicity(c.profile))

    @property
    def beats_baseline(self) -> bool | None:
        """Whether the best beats the baseline beyond noise, the choice allowed for; None where noise is not known."""
        best = self.best
        if best.low is None or best.high is None:
            return None
        return _beyond_noise(best.low, best.high, self.mode)

    @property
    def better(self) -> str:
        """``lower is better`` or ``higher is better``."""
        return "lower is better" if self.mode == "min" else "higher is better"

    @property
    def legend(self) -> str:
        """How the table is to be read."""
        parts = [self.better.capitalize(), f"differences are to {self.baseline.name}"]
        if self.best.tied is not None:
            parts.append("≈: as good as the best")
        return "; ".join(parts)

    @property
    def caveats(self) -> list[str]:
        """What speaks against these scores as a whole, in sentences."""
        caveats = {
            LIVE_IS_THE_MODEL: not self._trajectory.has_live,
            FROZEN_ARE_THE_MODELS: lacks_frozen(self._trajectory, self._model),
            STALE_STATISTICS: self._recalibrate is None and tracks_statistics(self._model),
            self._broken: bool(self._broken) and self.has_best,
        }
        return [caveat for caveat, holds in caveats.items() if holds]

    @property
    def _broken(self) -> str:
        averages = [candidate for candidate in self.table if candidate.profile is not None]
        broken = sum(not math.isfinite(candidate.score) for candidate in averages)
        has = "has no finite score, and ranks" if broken == 1 else "have no finite score, and rank"
        return f"{broken} of {len(averages)} averages {has} last." if broken else ""

    @property
    def verdict(self) -> str:
        """Whether the best beats the live weights beyond noise, out of how many, and which simpler one is as good."""
        return " ".join([*self.caveats, *verdict(self)])

    def weights(self) -> dict[str, Tensor]:
        """The best weights: name to tensor on the host, as :meth:`Trajectory.average` and ``live`` give them.

        Their BatchNorm statistics are not recomputed. Of a recording that was not closed, live weights are those in
        the model, and the dictionary is empty. Raises as :meth:`apply`.
        """
        return self._best()[0]

    def apply(self, model: nn.Module) -> None:
        """Put the best weights into ``model`` for good, BatchNorm statistics of an average recomputed if asked for.

        If ``live`` is the best, the weights are put in as the run ended with them; of a recording that was not
        closed the model keeps those it has. Those named ``live, recalibrated`` get recomputed statistics.

        Raises:
            StructureError: the weights do not fit the model, which is then as it was.
            NonFiniteError: no candidate has a finite score.
        """
        apply_weights(model, *self._best())

    def write(
        self,
        path: str | PathLike[str],
        *,
        like: str | PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the model with the best weights; the ending says the format, see :mod:`polyak.checkpoints`.

        The file holds the whole model, averaged parameters in the average's own dtype. What is not averaged
        is read from the model that was given to ``select``, as it is now; it is left as it is. Where the trajectory's
        checkpoints are folders of transformers, diffusers or PEFT, an output without a suffix becomes a folder that
        ``from_pretrained`` loads, with their configs.

        Args:
            path: the output.
            like: a torch checkpoint, such as one of the trajectory's, that a torch output is nested like, with its
                settings, as for :func:`polyak.average_checkpoints`.
            overwrite: replace an output that is there.

        Raises:
            OutputExistsError: ``path`` exists and ``overwrite`` is False.
            OptionError, StructureError: ``like`` is not nested, or holds other tensors.
            NonFiniteError: no candidate has a finite score.
        """
        self._write(Path(path), like, overwrite)

    def _write(self, path: Path, like: str | PathLike[str] | None, overwrite: bool) -> list[str]:
        """As :meth:`write`, with notes on what was copied, left out or is missing beside the output."""
        weights, recalibrate = self._best()
        return write_weights(
            path,
            self._model,
            weights,
            inputs=self._trajectory.checkpoints,
            recalibrate=recalibrate,
            metadata={"polyak.profile": self.best.name, "polyak.score": repr(self.best.score)},
            like=like,
            overwrite=overwrite,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, as plain values for JSON."""
        return {
            "verdict": self.verdict,
            "mode": self.mode,
            "best": self.best.name,
            "baseline": self.baseline.name,
            "simplest": self.simplest.name,
            "beats_baseline": self.beats_baseline,
            "holdout": None if self.holdout is None else self.holdout.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.table],
        }

    def plot(self) -> Figure:
        """A matplotlib figure of the best few and the live weights, with their intervals where there are any.

        Filled dots, and those marked ≈, are as good as the best within noise.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        dots = [
            _plots.Dot(
                f"{shortened(c.name)} ≈" if c.tied and c is not self.best else shortened(c.name),
                c.difference,
                c.low,
                c.high,
                role="live" if c.profile is None else "chosen" if c is self.best else "other",
                filled=bool(c.tied) or c is self.best or c.profile is None,
            )
            for c in self._shown(_DOTS_SHOWN)
        ]
        side = "left" if self.mode == "min" else "right"
        return _plots.dot_chart(
            self._plot_title, f"difference to {self.baseline.name}\n({side} is better)", dots
        )

    @property
    def _plot_title(self) -> str:
        best, baseline = shortened(self.best.name), self.baseline.name
        if self.best.profile is None:
            return f"No average scores better than {best}"
        if self.beats_baseline is None:
            return f"{best} scores best; noise is not ruled out"
        tied = sum(bool(c.tied) for c in self.table if c is not self.best)
        as_good = f"; {tied} {'other is' if tied == 1 else 'others are'} as good (≈)" if tied else ""
        return f"{best} is {'better' if self.beats_baseline else 'not better'} than {baseline} beyond noise{as_good}"

    def __str__(self) -> str:
        first, *others = HEADINGS
        rows = _terminal.table(first, *(f"#{heading}" for heading in others))
        shown = self._shown(_ROWS_SHOWN)
        for row in as_rows(self, shown):
            rows.add_row(*row)
        hidden = len(self.table) - len(shown)
        others = f" {_terminal.counted(hidden, 'more candidate')} scored worse." if hidden else ""
        return f"{self.legend}\n{_terminal.as_text(rows, self.verdict + others)}"

    def __repr__(self) -> str:
        return f"Selection(best={self.best.name!r}, candidates={len(self.table)})"

    def _best(self) -> tuple[dict[str, Tensor], Iterable[Any] | None]:
        """The best weights, and the batches for statistics, which live weights have."""
        if not self.has_best:
            raise NonFiniteError(
                "no candidate has a finite score, so none is the best: look at what score returns for the live weights"
            )
        profile = self.best.profile
        recalibrate = None if self.best.name == LIVE else self._recalibrate
        if profile is None:
            return live_weights(self._trajectory), recalibrate
        (weights,) = self._trajectory.average_many([profile])  # the verdict has the warnings
        return weights, recalibrate

    def _shown(self, best: int) -> list[Candidate]:
        """The ``best`` few, the simplest that is as good, and the live weights."""
        always = (self.simplest, *(c for c in self.table if c.profile is None))
        return [c for at, c in enumerate(self.table) if at < best or c in always]
