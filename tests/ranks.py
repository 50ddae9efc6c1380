"""Run a test's function on several gloo ranks, each a fresh process."""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 5.0  # for the other ranks to end by themselves after one failed


def run_on_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, timeout_seconds: float = 90
) -> list[Any]:
    """What ``function(*args)`` returns on each rank, in rank order, inside an initialised gloo group.

    ``function`` lives at the top of its module; arguments and results are pickled, so they are plain values
    and tensors. A rank that raises, dies or is late is an AssertionError that carries what it printed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = (inspect.getfile(function), function.__name__, args, timeout_seconds)
        (folder / "job").write_bytes(pickle.dumps(job))
        processes = [_start(folder, rank, ranks) for rank in range(ranks)]
        try:
            _wait(processes, timeout_seconds)
        finally:
            late = [process.poll() is None for process in processes]
            for process in processes:
                process.kill()
                process.wait()
        problems = [
            f"rank {rank} {'was stopped' if late[rank] else 'failed'}:\n{(folder / f'log{rank}').read_text()}"
            for rank, process in enumerate(processes)
            if process.returncode != 0
        ]
        assert not problems, "\n".join(problems)
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(ranks)]


def _start(folder: Path, rank: int, ranks: int) -> subprocess.Popen[bytes]:
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank), str(ranks)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _wait(processes: list[subprocess.Popen[bytes]], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    failed = False
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.poll() for process in processes):
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.02)


def _main(folder: Path, rank: int, ranks: int) -> None:
    import torch.distributed as dist

    file, function, args, timeout_seconds = pickle.loads((folder / "job").read_bytes())
    spec = importlib.util.spec_from_file_location("ranked", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    # A file, not a port: tests that run at the same time cannot collide.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_seconds),
    )
    result = getattr(module, function)(*args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
    # The interpreter's own end is left out: a thread of torch that asks for the lock meanwhile aborts the process.
    atexit._run_exitfuncs()  # coverage is among them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
