"""Peak anonymous memory stays within ``max_memory`` beside what a bare interpreter with torch takes."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from polyak import checkpoints

MB = 10**6
MEASURE = """
    import sys, threading, torch
    from pathlib import Path

    def anonymous_bytes():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024

    bare = anonymous_bytes()
    seen, finished = [bare], threading.Event()

    def sample():
        while not finished.wait(1e-3):
            seen.append(anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    import polyak
    folder, budget, profile = sys.argv[1:]
    polyak.average_checkpoints(folder, f"{folder}/out/average.safetensors", max_memory=budget, profile=profile)
    finished.set()
    sampler.join()
    print(max(seen) - bare)
"""

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory"
)


def peak_bytes(folder, max_memory):
    (folder / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(folder), max_memory, "uniform"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(result.stdout)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("n_inputs", "tensors", "elements"),
    [
        pytest.param(2, 1, 24_000_000, id="one tensor larger than the budget"),
        pytest.param(8, 400, 16_000, id="8 inputs"),
        pytest.param(64, 150, 4_000, id="64 inputs"),
    ],
)
def test_peak_is_within_max_memory(tmp_path, n_inputs, tensors, elements, suffix):
    model = {f"layers.{index}.weight": torch.ones(elements, dtype=torch.bfloat16) for index in range(tensors)}
    for step in range(n_inputs):
        checkpoints.write(tmp_path / f"{step}{suffix}", model)
    assert peak_bytes(tmp_path, "32MB") <= 32 * MB
