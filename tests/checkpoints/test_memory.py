"""Reading and writing in slices takes the memory of a slice, whatever the size of the tensor."""

import os
import subprocess
import sys
import textwrap

import pytest

CONVERT = """
    import sys, torch
    from pathlib import Path
    from polyak import checkpoints
    from polyak.checkpoints import Layout, TensorInfo

    ELEMENTS, SLICE = 24_000_000, 250_000

    def anonymous_mb():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024

    folder, source, target = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    checkpoints.write(folder / "warm-up", {"w": torch.ones(SLICE)}, format=target)
    layout = Layout({"w": TensorInfo((4_000, 6_000), torch.float32)})
    with checkpoints.create(folder / "source", layout, format=source) as writer:
        for start in range(0, ELEMENTS, SLICE):
            writer.write("w", start, torch.arange(start, start + SLICE).float())
    before = highest = anonymous_mb()

    class Measured(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            global highest
            highest = max(highest, anonymous_mb())
            return function(*arguments, **(keywords or {}))

    with checkpoints.open(folder / "source") as opened, Measured():
        with checkpoints.create(folder / "target", layout, format=target) as writer:
            for start in range(0, ELEMENTS, SLICE):
                writer.write("w", start, opened.read_slice("w", start, start + SLICE))
                highest = max(highest, anonymous_mb())
    highest = max(highest, anonymous_mb())
    with checkpoints.open(folder / "target") as opened:
        for start in range(0, ELEMENTS, ELEMENTS // 7):
            assert opened.read_slice("w", start, start + 1).item() == float(torch.tensor(start).float())
    print(highest - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory")
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("safetensors", "pt"),
        pytest.param("pt", "npz", marks=pytest.mark.slow),
        pytest.param("npz", "dcp", marks=pytest.mark.slow),
        ("dcp", "safetensors"),
    ],
)
def test_a_large_tensor_in_little_memory(tmp_path, source, target):
    code = textwrap.dedent(CONVERT)
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), source, target],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert float(result.stdout) < 16  # MB, for a tensor of 96 MB
