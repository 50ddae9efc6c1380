"""The trajectory: a training run recorded as block means, to be averaged afterwards."""

from polyak.trajectory._blocks import Block, Summary
from polyak.trajectory._explain import Explanation
from polyak.trajectory._recorder import Recorder
from polyak.trajectory._trajectory import Trajectory

__all__ = ["Block", "Explanation", "Recorder", "Summary", "Trajectory"]
