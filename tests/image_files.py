"""Small data sets of made-up images, in the files of MNIST and CIFAR."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST's files: bytes only."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, train: int, test: int, *, side: int = 28) -> None:
    """Images whose class is how bright one of ten rows is, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in {"train": train, "t10k": test}.items():
        labels = np.arange(count) % 10
        pixels = rng.integers(0, 128, (count, side, side))
        pixels[np.arange(count), 2 * labels + 2] += 100
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels)


def write_cifar(folder: Path, files: dict[str, int], label_key: bytes) -> dict[str, dict[bytes, object]]:
    """The Python files: the name of each, and how many images it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    written = {}
    for name, count in files.items():
        pixels = rng.integers(0, 256, (count, 3 * 32 * 32)).astype(np.uint8)
        written[name] = {b"data": pixels, label_key: [number % 10 for number in range(count)]}
        (folder / name).write_bytes(pickle.dumps(written[name], protocol=2))
    return written
