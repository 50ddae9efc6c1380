"""The trajectory: a training run recorded as block means, to be averaged afterwards."""

from polyak.trajectory.explain import Explanation
from polyak.trajectory.manifest import Block
from polyak.trajectory.recorder import Recorder
from polyak.trajectory.summaries import Summary
from polyak.trajectory.trajectory import Trajectory

__all__ = ["Block", "Explanation", "Recorder", "Summary", "Trajectory"]
