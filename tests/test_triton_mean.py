"""The kernel of Triton against the host's mean, in Triton's interpreter, which wants a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_gives_what_the_host_gives():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _compare(scheme, dtype, options, bad):
    import torch

    from devices import as_if_on
    from polyak import _triton_mean
    from polyak._device_mean import _KernelFold
    from polyak._mean import Accumulator

    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (0,), (21, 37)]
    samples = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(6)]
    for n in bad:
        samples[n][3][5, 7] = float("nan")
    made = []
    for device in ("host", "accelerator"):
        with as_if_on(device):
            made.append(Accumulator(samples[0], ["a", "b", "c", "d"], scheme, **options))
    host, device = made
    assert [type(fold) for fold in device._counts._folds] == [_KernelFold]
    for n, sample in enumerate(samples, start=1):
        before = [m.clone() for m in device.means + device.residuals]
        host.add(sample, 3 * n)
        device.add(sample, 3 * n)
        if n - 1 in bad:
            assert all(map(torch.equal, before, device.means + device.residuals))
    assert (
        (host.n_averaged, host.n_skipped) == (device.n_averaged, device.n_skipped) == (6 - len(bad), len(bad))
    )
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(device.means[0].dtype, 1e-6)
    for one, other in zip(host.means, device.means, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert _triton_mean.works_on(torch.device("cpu"))


def _compare_all():
    import torch

    from polyak import _triton_mean
    from polyak.profiles import EMA, Power, Uniform

    _triton_mean._CHUNK_NUMEL, _triton_mean._BLOCK_NUMEL = 512, 128  # several programs, some of them full
    _compare(Uniform(), torch.float32, {"compensated": True}, bad={2})
    _compare(Power(gamma=2), torch.float16, {"compensated": True}, bad={0, 4})
    _compare(Power(gamma=2), torch.bfloat16, {"dtype": torch.float64}, bad={0, 4})
    _compare(EMA(half_life=7), torch.float64, {"dtype": torch.bfloat16}, bad={3})
    _compare(EMA(decay=0.9, debias=False), torch.bfloat16, {"dtype": torch.float16}, bad={5})
    _compare(Uniform(), torch.float64, {"check_finite": False}, bad=set())


if __name__ == "__main__":
    _compare_all()
