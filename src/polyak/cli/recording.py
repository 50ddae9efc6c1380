"""``polyak average`` on a recorded run: the same question, answered from its blocks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from polyak.trajectory import Explanation

__all__ = ["average_recording"]


def average_recording(
    folder: Path, output: Path, profile: str, *, max_memory: str, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Write the average of a recorded run under ``profile``, and say how well its blocks give it.

    Raises as :meth:`polyak.Trajectory.write`.
    """
    from polyak import Trajectory

    trajectory = Trajectory(folder)
    explanation = trajectory.explain(profile)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not dry_run:
            trajectory.write(profile, output, overwrite=force, max_memory=max_memory)
    notes = [*explanation.warnings, *(str(warning.message) for warning in caught)]
    if as_json:
        typer.echo(json.dumps(_as_dict(explanation, notes, folder, output, dry_run), indent=2))
        return
    typer.echo(str(explanation))
    for note in notes[len(explanation.warnings) :]:
        typer.echo(f"warning: {note}")
    typer.echo(f"{'would write' if dry_run else 'wrote'} {output}")


def _as_dict(
    explanation: Explanation, notes: list[str], folder: Path, output: Path, dry_run: bool
) -> dict[str, object]:
    return {
        "input": str(folder),
        "output": str(output),
        "profile": str(explanation.profile),
        "blocks": [str(block) for block in explanation.blocks],
        "coefficients": explanation.coefficients.tolist(),
        "misplaced_weight": explanation.misplaced_weight,
        "effective_samples": explanation.effective_samples,
        "warnings": notes,
        "dry_run": dry_run,
    }
