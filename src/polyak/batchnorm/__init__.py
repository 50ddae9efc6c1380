"""BatchNorm statistics for averaged weights: those of the whole data, not of the last batches."""

from polyak.batchnorm.layers import statistics, tracks_statistics
from polyak.batchnorm.update import update_bn

__all__ = ["statistics", "tracks_statistics", "update_bn"]
