"""What an update of an average costs on an accelerator, and whether it does there what it does on the host.

    python benchmarks/accelerator.py --count [--output FILE]
    python benchmarks/accelerator.py [--rounds 20] [--only resnet50,gpt2] [--output FILE]
    python benchmarks/accelerator.py --device cpu --rounds 1 --only many_small

``--count`` needs no GPU. Updates run on tensors of the meta device, which have shapes but no numbers, and every
operation is counted. One JSON object goes to stdout, and for each case it says ``calls``, the operations that would
launch a kernel (views and allocations are left out); ``passes``, the bytes that they read and write over the bytes of
the parameters in fp32; and ``host_reads``, numbers that the host would wait for, or copy over. One ``_foreach_lerp_``
of all parameters makes 1 call and 3 passes.

Without it a GPU is measured: time, host time, launches and memory of an update beside the installed peers and a copy
of the same bytes, a CUDA graph that is replayed with a NaN, a swap, and training steps with an average on the host.
``--device cpu`` goes the same way without a GPU, to see that it can be gone; its figures say nothing and are not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import harness
import polyak
import shapes
from peers import CONTENDERS, DECAY
from polyak import _torch
from polyak._mean import Accumulator

DISTRIBUTIONS = ("polyak", "ema-pytorch", "timm")
COMPARED = (
    "polyak EMA",
    "polyak EMA, checked",
    "foreach, lists built once",
    "torch AveragedModel, EMA",
    "ema-pytorch foreach",
    "timm ModelEmaV3",
)
WARM_UP_UPDATES = 3
UPDATES_PER_ROUND = 20


@dataclass(frozen=True)
class Case:
    """A model's parameters, and how they are averaged."""

    shapes: Callable[[], list[shapes.Shape]]
    dtype: torch.dtype = torch.float32
    check_finite: bool = True

    @property
    def fp32_bytes(self) -> int:
        return 4 * shapes.number_of_elements(self.shapes())


CASES = {
    "resnet50 fp32 checked": Case(shapes.resnet50),
    "resnet50 fp32 unchecked": Case(shapes.resnet50, check_finite=False),
    "gpt2 fp32 checked": Case(shapes.gpt2_small),
    "gpt2 fp32 unchecked": Case(shapes.gpt2_small, check_finite=False),
    "resnet50 bf16 checked": Case(shapes.resnet50, torch.bfloat16),
    "many_small fp32 checked": Case(shapes.many_small),
}
MODELS = {
    "resnet50": Case(shapes.resnet50),
    "gpt2": Case(shapes.gpt2_small),
    "many_small": Case(shapes.many_small),
    "resnet50_bf16": Case(shapes.resnet50, torch.bfloat16),
    "gpt2_bf16": Case(shapes.gpt2_small, torch.bfloat16),
}


# Counted, without a GPU.

# torch 2.13 has no kernel of this operation for tensors without numbers. It changes tensors and returns nothing.
_WITHOUT_NUMBERS = torch.library.Library("aten", "IMPL", "Meta")
if not _torch.lerps_unless(torch.device("meta")):
    _WITHOUT_NUMBERS.impl("_fused_sgd_.tensor_lr", lambda *args, **kwargs: None)
    _torch.lerps_unless.cache_clear()


class Counter(TorchDispatchMode):
    """Counts the operations that run inside, the bytes they read and write, and what the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.traffic_bytes = 0
        self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.host_reads += 1
            return 0.0  # a tensor of the meta device has no other answer
        result = func(*args, **kwargs)
        self.host_reads += len({t.device for t in tree_leaves((args, kwargs, result)) if _is_tensor(t)}) > 1
        if not _is_view(func) and not func._schema.name.startswith("aten::empty"):
            self.calls += 1
            self.traffic_bytes += sum(_traffic(func, args, kwargs, result))
        return result


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


# Operations that write all of what they change and read none of it, and arguments that are only said to be changed.
_OVERWRITING = ("aten::copy_", "aten::_foreach_copy_", "aten::fill_", "aten::zero_", "aten::_foreach_zero_")
_UNCHANGED = {("aten::_fused_sgd_", "grads")}


def _traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[int]:
    """Bytes read, and bytes written, by each argument; and those of new results."""
    given: set[int] = set()
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        given |= set(map(id, tensors))
        size = sum(tensor.nbytes for tensor in tensors)
        name = func._schema.name
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and (name, argument.name) not in _UNCHANGED:
            yield size
            overwrites = argument.is_out or name in _OVERWRITING
        else:
            overwrites = False
        if not overwrites:
            yield size
    yield sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor) and id(t) not in given)


def count(case: Case) -> dict[str, float]:
    """Calls, passes and host reads of the third update of a case."""
    weights = [torch.empty(shape, dtype=case.dtype, device="meta") for shape in case.shapes()]
    names = [str(n) for n in range(len(weights))]
    mean = Accumulator(weights, names, polyak.EMA(decay=DECAY), check_finite=case.check_finite)
    for _ in range(2):
        mean.add(weights)
    with Counter() as counter:
        mean.add(weights)
    passes = round(counter.traffic_bytes / case.fp32_bytes, 4)
    return {"calls": counter.calls, "passes": passes, "host_reads": counter.host_reads}


# Measured, on a GPU, or gone through on the host.


class Gpu:
    """What is measured there, and how."""

    kind = "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def peak_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def seconds(self, call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(UPDATES_PER_ROUND):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / UPDATES_PER_ROUND

    def launches(self, call: Callable[[], object]) -> int:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """A graph of the call, which is not made, to be replayed."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


class Host:
    """The same calls without a GPU."""

    kind = "cpu"
    name = "none: the host"

    def synchronize(self) -> None:
        """Nothing is queued."""

    def allocated_bytes(self) -> int:
        return 0

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 0

    def seconds(self, call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def launches(self, call: Callable[[], object]) -> int:
        with Counter() as counter:
            call()
        return counter.calls

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        return call


def measure(case: Case, rounds: int, device: Gpu | Host) -> dict[str, Any]:
    """Every contender that is installed, in turns; a case in which one fails says so and goes on."""
    model = shapes.module_of(case.shapes(), case.dtype).to(device.kind)
    calls: dict[str, Callable[[], object]] = {"copy of the same bytes": _copying(case, device)}
    left_out: dict[str, str] = {}
    memory: dict[str, float] = {}
    for name in COMPARED:
        if case.dtype != torch.float32 and not CONTENDERS[name].mixed:
            continue
        before = device.allocated_bytes()
        try:
            calls[name] = CONTENDERS[name].build(model).update
            for _ in range(WARM_UP_UPDATES):
                calls[name]()
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"
            calls.pop(name, None)
            continue
        memory[name] = (device.peak_bytes(calls[name]) - before) / case.fp32_bytes
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in harness.rotated(list(calls), rounds):
        seconds[name].append(device.seconds(calls[name]))
    copied = seconds["copy of the same bytes"]
    contenders = {
        name: {
            "microseconds": 1e6 * statistics.median(values),
            "over_copy": harness.ratios(values, copied).median,
            "host_microseconds": 1e6 * _host_seconds(calls[name], device),
            "launches": device.launches(calls[name]),
            "peak_memory_over_fp32_parameters": memory.get(name),
        }
        for name, values in seconds.items()
    }
    return {
        "contenders": contenders,
        "left_out": left_out,
        "graph": _replayed(case, device),
        "swap": _swapped(model, device),
        "offload": _offloaded(case, device),
    }


def _copying(case: Case, device: Gpu | Host) -> Callable[[], object]:
    """What 2 of the 3 passes of a fold cost: the parameters' bytes in fp32, read and written once."""
    source = torch.zeros(shapes.number_of_elements(case.shapes()), device=device.kind)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _host_seconds(call: Callable[[], object], device: Gpu | Host) -> float:
    """Until the call returns, with nothing queued before it."""
    taken = []
    for _ in range(UPDATES_PER_ROUND):
        device.synchronize()
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    device.synchronize()
    return statistics.median(taken)


def _replayed(case: Case, device: Gpu | Host) -> dict[str, Any]:
    """A graph of one update, replayed over values of which the third is a NaN, beside the mean of the others."""
    model = shapes.module_of(case.shapes(), case.dtype).to(device.kind)
    average = polyak.Average(model, polyak.Uniform())
    values = [1.0, 2.0, float("nan"), 3.0, 6.0]
    _fill(model, values[0])
    average.update()
    replay = device.captured(average.update)
    for value in values[1:]:
        _fill(model, value)
        replay()
    off = max(float((mean - 3.0).abs().max()) for mean in average.named_tensors().values())
    return {"averaged": average.n_averaged, "skipped": average.n_skipped, "largest_error": off}


@torch.no_grad()
def _fill(model: torch.nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


def _swapped(model: torch.nn.Module, device: Gpu | Host) -> dict[str, float]:
    average = polyak.Average(model, polyak.Uniform())
    average.update()

    def swap() -> None:
        average.swap_in()
        average.swap_out()

    swap()
    return {"microseconds": 1e6 * device.seconds(swap), "launches": device.launches(swap)}


def _offloaded(case: Case, device: Gpu | Host) -> dict[str, Any]:
    """Training steps that take twice an update on the host: without it, waiting for each, and with it meanwhile.

    The two averages are of the same weights, so that they should be the same, bit for bit.
    """
    update_seconds = _training_steps(case, device, lambda: None, "waits")[0]
    matrix = torch.ones(_MATRIX_WIDTH, _MATRIX_WIDTH, device=device.kind)
    product_seconds = device.seconds(lambda: torch.mm(matrix, matrix))
    products = max(1, round(2 * update_seconds / product_seconds))

    def work() -> None:
        for _ in range(products):
            torch.mm(matrix, matrix)

    found = {way: _training_steps(case, device, work, way) for way in ("none", "waits", "meanwhile")}
    waited, meanwhile = found["waits"][1], found["meanwhile"][1]
    return {
        "step_microseconds": {way: 1e6 * seconds for way, (seconds, _) in found.items()},
        "same_bits": all(torch.equal(waited[name], meanwhile[name]) for name in waited),
    }


_MATRIX_WIDTH = 1024


def _training_steps(
    case: Case, device: Gpu | Host, work: Callable[[], object], way: str
) -> tuple[float, dict[str, Tensor]]:
    """Seconds of a step, and the average on the host in the end, if there is one."""
    model = shapes.module_of(case.shapes(), case.dtype).to(device.kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    average = polyak.Average(model, f"ema:decay={DECAY}", device="cpu")
    if way == "meanwhile":
        polyak.attach(optimizer, average)

    def steps(count: int) -> None:
        for _ in range(count):
            work()
            optimizer.step()
            if way == "waits":
                average.update()

    steps(WARM_UP_UPDATES)
    device.synchronize()
    started = time.perf_counter()
    steps(UPDATES_PER_ROUND)
    device.synchronize()
    averaged = average.n_averaged  # waits for the last sample
    seconds = (time.perf_counter() - started) / UPDATES_PER_ROUND
    return seconds, average.named_tensors() if averaged else {}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.count:
        record: dict[str, Any] = {name: count(case) for name, case in CASES.items()}
        print(json.dumps(record))
    elif options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --count needs none")
    else:
        device = Gpu() if options.device == "cuda" else Host()
        record = {
            "benchmark": "accelerator",
            "device": device.name,
            "environment": harness.environment(DISTRIBUTIONS),
            "settings": {"rounds": options.rounds, "updates_per_round": UPDATES_PER_ROUND, "decay": DECAY},
            "counted": {name: count(case) for name, case in CASES.items()},
            "cases": {name: measure(MODELS[name], options.rounds, device) for name in options.only},
        }
        print(json.dumps(record, indent=2))
    if options.output is not None:
        harness.write_json(
            options.output, {"benchmark": "accelerator", "counted": record} if options.count else record
        )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--count", action="store_true", help="count operations instead; needs no GPU")
    parser.add_argument("--rounds", type=int, default=20, help="measurements a contender (default 20)")
    parser.add_argument("--only", type=_model_names, default=list(MODELS), help="models, separated by commas")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to see that it runs"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this file as JSON")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.output is not None and not options.count:
        parser.error("--device cpu measures nothing that is worth keeping: leave --output out")
    return options


def _model_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown model {unknown[0]!r}; the models are {', '.join(MODELS)}")
    return names


if __name__ == "__main__":
    main()
