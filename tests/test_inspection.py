"""What ``polyak.inspection`` says, against float64 oracles, every format and the files of real tools."""

import json
import logging
import subprocess
import sys
import warnings
from io import StringIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.optim.swa_utils import AveragedModel

import polyak
from polyak import checkpoints
from polyak.checkpoints._base import FORMATS
from polyak.errors import CheckpointError, OptionError, StructureError
from polyak.inspection import CheckpointSummary, FolderSummary, _measure, compare, describe
from polyak.inspection._views import view

SUFFIXES = {"safetensors": ".safetensors", "pt": ".pt", "npz": ".npz"}
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.uint16,
    torch.uint8,
    torch.bool,
)


def save(path, format="safetensors", **tensors):
    checkpoints.write(path, tensors, format=format)
    return path


def random(dtype, shape=(7, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = 4 * torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else None)
    return (values if dtype.is_signed else values.abs()).to(dtype)


def as_vector(tensor):
    """An obvious float64 vector, complex numbers as pairs of real ones."""
    if tensor.is_complex():
        return tensor.numpy().astype(np.complex128).ravel().view(np.float64)
    return tensor.to(torch.float64).numpy().ravel()


def distance_and_cosine(first, second):
    a, b = as_vector(first), as_vector(second)
    return np.linalg.norm(a - b) / np.linalg.norm(a), a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_and_cosine_of_every_dtype(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(_measure, "_SLICE_ELEMENTS", 8)
    first, second = random(dtype, seed=1), random(dtype, seed=2)
    if dtype == torch.bool:
        first.view(-1)[:3], second.view(-1)[2:5] = False, False
    a, b = save(tmp_path / "a.safetensors", w=first), save(tmp_path / "b.safetensors", w=second)
    (found,) = compare(a, b).tensors
    distance, cosine = distance_and_cosine(first, second)
    assert found.relative_distance == pytest.approx(distance, rel=1e-13)
    assert found.cosine == pytest.approx(cosine, rel=1e-13)
    assert (found.dtype, found.numel) == (str(dtype).removeprefix("torch."), 35)
    assert not found.is_identical and found.non_finite == 0


def test_the_whole_is_one_vector_of_floating_tensors_largest_difference_first(tmp_path):
    first = {"a": random(torch.float32), "b": random(torch.bfloat16, (3,)), "c": torch.tensor(1.0)}
    second = {"a": first["a"] * 1.01, "b": -first["b"], "c": torch.tensor(1.0)}
    counter = {"n": torch.tensor(10**6)}, {"n": torch.tensor(1)}
    comparison = compare(
        save(tmp_path / "a.safetensors", **first, **counter[0]),
        save(tmp_path / "b.safetensors", **second, **counter[1]),
    )
    whole = [torch.cat([tensor.flatten().double() for tensor in side.values()]) for side in (first, second)]
    distance, cosine = distance_and_cosine(*whole)
    assert comparison.relative_distance == pytest.approx(distance, rel=1e-13)
    assert comparison.cosine == pytest.approx(cosine, rel=1e-13)
    assert [tensor.name for tensor in comparison.tensors] == ["b", "n", "a", "c"]
    assert [tensor.name for tensor in comparison.changed] == ["b", "n", "a"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 2), min_size=1, max_size=40), st.integers(1, 40))
def test_products_of_pieces_add_up(values, cut):
    a, b = torch.tensor(values, dtype=torch.float64).unbind(1)
    whole = _measure.products(a, b)
    parts = _measure.products(a[:cut], b[:cut]) + _measure.products(a[cut:], b[cut:])
    if whole.relative_distance is None:
        assert parts.relative_distance is None
    else:
        assert parts.relative_distance == pytest.approx(whole.relative_distance, rel=1e-9)
    assert whole.cosine is None or -1 <= whole.cosine <= 1


def test_formats_and_dtypes_may_differ(tmp_path, format):
    first, second = random(torch.float32), random(torch.float32).bfloat16()
    a = save(tmp_path / "a.npz", "npz", w=first)
    b = save(tmp_path / f"b{SUFFIXES.get(format, '')}", format, w=second)
    comparison = compare(a, b)
    assert comparison.relative_distance == pytest.approx(distance_and_cosine(first, second)[0], rel=1e-13)
    (change,) = comparison.layout.retyped
    assert (change.name, change.first, change.second) == ("w", "float32", "bfloat16")
    assert not comparison.is_identical


def test_real_and_complex_weights_are_compared_as_complex(tmp_path):
    real, imaginary = torch.tensor([3.0, 0.0]), torch.tensor([3 + 4j, 0j])
    a, b = save(tmp_path / "a.safetensors", w=real), save(tmp_path / "b.safetensors", w=imaginary)
    assert compare(a, b).relative_distance == pytest.approx(4 / 3)


def test_identical_means_every_bit(tmp_path):
    weight = torch.tensor([1.0, float("nan"), -0.0])
    a, b = save(tmp_path / "a.safetensors", w=weight), save(tmp_path / "b.pt", "pt", w=weight)
    assert compare(a, b).is_identical
    c = save(tmp_path / "c.safetensors", w=weight.abs())
    comparison = compare(a, c)
    assert not comparison.is_identical and comparison.relative_distance == 0


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    inf, nan = float("inf"), float("nan")
    a = save(tmp_path / "a.safetensors", w=torch.tensor([3.0, -inf, nan, 1.0, 0.0]))
    b = save(tmp_path / "b.safetensors", w=torch.tensor([3.0, -inf, 2.0, inf, 4.0]))
    comparison = compare(a, b)
    assert comparison.tensors[0].non_finite == 3
    assert comparison.relative_distance == pytest.approx(4 / 3)
    assert comparison.cosine == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("first", "second", "distance", "cosine"),
    [([0.0], [0.0], 0.0, None), ([0.0], [1.0], None, None), ([1.0], [0.0], 1.0, None), ([], [], 0.0, None)],
)
def test_zeros_and_nothing_at_all(tmp_path, first, second, distance, cosine):
    a = save(tmp_path / "a.safetensors", w=torch.tensor(first), v=torch.tensor([1e-9]))
    b = save(tmp_path / "b.safetensors", w=torch.tensor(second), v=torch.tensor([1e-9]))
    comparison = compare(a, b)
    found = next(tensor for tensor in comparison.tensors if tensor.name == "w")
    assert (found.relative_distance, found.cosine) == (distance, cosine)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_layouts_are_compared_by_name(tmp_path):
    shared = torch.ones(2, 3)
    a = save(
        tmp_path / "a.safetensors", x=shared, y=shared, old=torch.ones(1), s=torch.ones(2), same=torch.ones(4)
    )
    b = save(
        tmp_path / "b.safetensors",
        x=shared,
        y=shared.clone(),
        new=torch.ones(1),
        s=torch.ones(3),
        same=torch.ones(4),
    )
    layout = compare(a, b).layout
    assert (layout.missing, layout.extra, layout.retied) == (("old",), ("new",), ("x", "y"))
    assert [(change.name, change.first, change.second) for change in layout.reshaped] == [("s", "2", "3")]
    assert layout.names == {"old", "new", "x", "y", "s"}
    # Untied, y is another tensor than x and is compared for itself.
    assert {tensor.name for tensor in compare(a, b).tensors} == {"x", "y", "same"}


def test_tied_tensors_count_once_whatever_their_order(tmp_path):
    tied, free = torch.full((50,), 2.0), torch.tensor([1.0])
    a = save(tmp_path / "a.pt", "pt", x=tied, y=tied, free=free)
    b = save(tmp_path / "b.pt", "pt", y=tied, x=tied, free=2 * free)
    comparison = compare(a, b)
    assert not comparison.layout
    assert comparison.relative_distance == pytest.approx(1 / np.sqrt(50 * 4 + 1), rel=1e-13)


def test_nothing_in_common_is_refused(tmp_path):
    a, b = (
        save(tmp_path / "a.safetensors", x=torch.ones(1)),
        save(tmp_path / "b.safetensors", y=torch.ones(1)),
    )
    with pytest.raises(StructureError, match=r"no tensor of one name and shape in common.*'x'.*'y'.*key"):
        compare(a, b)


def test_a_checkpoint_is_described_in_every_format(tmp_path, format):
    tied = torch.ones(2, 3, dtype=torch.bfloat16)
    path = tmp_path / f"a{SUFFIXES.get(format, '')}"
    tensors = {"wte": tied, "head": tied, "scale": torch.tensor(1.0), "n": torch.tensor([4, 5])}
    checkpoints.write(path, tensors, format=format, metadata={"step": "12"})
    summary = describe(path)
    assert isinstance(summary, CheckpointSummary)
    assert (summary.origin.format, summary.origin.step, summary.is_lazy) == (format, 12, True)
    assert (summary.numel, summary.nbytes) == (9, 12 + 4 + 16)
    assert {tensor.name: tensor.shape for tensor in summary.tensors} == {
        "wte": (2, 3), "head": (2, 3), "scale": (), "n": (2,)
    }  # fmt: skip
    assert {tensor.name for tensor in summary.tensors} - {tensor.name for tensor in summary.stored} <= {
        "wte",
        "head",
    }
    assert len(summary.stored) == 3
    assert list(summary.dtypes) == ["int64", "bfloat16", "float32"]
    assert summary.dtypes["bfloat16"].nbytes == 12 and summary.metadata["step"] == "12"
    data = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert (data["kind"], data["nbytes"], len(data["tensors"])) == ("checkpoint", 32, 4)


def test_old_torch_files_say_that_they_are_loaded_whole(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    summary = describe(tmp_path / "old.pt")
    assert isinstance(summary, CheckpointSummary) and not summary.is_lazy


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def test_the_average_of_torch_against_its_live_model(tmp_path):
    model = small_model()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averaged.update_parameters(model)
    torch.save(
        {"state_dict": model.state_dict(), "epoch": 2, "model_ema": averaged.state_dict()}, tmp_path / "x.pt"
    )

    summary = describe(tmp_path / "x.pt")
    assert isinstance(summary, CheckpointSummary)
    assert summary.origin.note == (
        "weights found under 'model_ema'; also present: 'state_dict'; "
        "the prefix 'module.' was left out of the names"
    )
    assert summary.ignored == ("state_dict", "epoch", "model_ema.n_averaged") and summary.origin.step == 2
    comparison = compare(tmp_path / "x.pt", tmp_path / "x.pt", "state_dict", "model_ema")
    assert [tensor.name for tensor in comparison.changed] == ["0.weight"]
    live, average = model[0].weight.detach(), averaged.module[0].weight.detach()
    assert comparison.changed[0].relative_distance == pytest.approx(
        distance_and_cosine(live, average)[0], rel=1e-13
    )
    with pytest.raises(OptionError, match="no weights under 'nope'"):
        describe(tmp_path / "x.pt", "nope")


def test_folders_of_transformers_and_a_run_of_its_trainer(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    for step in (100, 50, 1000):
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="2KB")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    run, one = describe(tmp_path), describe(tmp_path / "checkpoint-50")
    assert isinstance(run, FolderSummary) and isinstance(one, CheckpointSummary)
    assert [(row.name, row.step) for row in run.rows] == [
        (f"checkpoint-{step}", step) for step in (50, 100, 1000)
    ]
    assert run.same_layout and run.rows[0].nbytes == one.nbytes == 4 * model.num_parameters()
    assert compare(tmp_path / "checkpoint-50", tmp_path / "checkpoint-100").is_identical


def write_run(folder, places, dtype=torch.float64):
    """Checkpoints of the given weights, a torch file each."""
    folder.mkdir(exist_ok=True)
    for index, place in enumerate(places, 1):
        torch.save(
            {"model": {"w": torch.as_tensor(place, dtype=dtype)}, "step": 10 * index}, folder / f"{index}.pt"
        )
    return folder


def test_a_folder_lists_what_does_not_fit_and_what_is_damaged(tmp_path):
    folder = write_run(tmp_path / "run", torch.randn(12, 4))
    whole = (folder / "1.pt").read_bytes()
    (folder / "13.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"w": torch.ones(4, dtype=torch.float32), "v": torch.ones(1)}, folder / "5.pt")
    (folder / "notes.txt").write_text("not a checkpoint")
    (folder / "logs").mkdir()
    summary = describe(folder)
    assert isinstance(summary, FolderSummary)
    assert [row.name for row in summary.rows] == [f"{index}.pt" for index in range(1, 14)]
    assert summary.reference == "1.pt" and not summary.same_layout
    assert [row.name for row in summary.rows if row.layout] == ["5.pt"]
    layout = summary.rows[4].layout
    assert layout is not None and layout.extra == ("v",) and layout.retyped[0].name == "w"
    (damaged,) = summary.unreadable
    assert damaged.name == "13.pt" and "13.pt is truncated" in str(damaged.error)
    assert summary.movement is None
    json.dumps(summary.to_dict(), allow_nan=False)


def test_a_folder_without_checkpoints_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no checkpoint \(it holds 'notes.txt'\)"):
        describe(tmp_path)
    with pytest.raises(CheckpointError, match="nothing_there"):
        describe(tmp_path / "nothing_there")


def movement_of(folder):
    summary = describe(folder, movement=True)
    assert isinstance(summary, FolderSummary) and summary.movement is not None
    return summary.movement


def test_movement_equals_the_obvious_formulas(tmp_path, monkeypatch):
    monkeypatch.setattr(_measure, "_SLICE_ELEMENTS", 7)
    places = torch.randn(6, 40, dtype=torch.float64).cumsum(0).numpy()
    found = movement_of(write_run(tmp_path / "run", places))
    moves = np.diff(places, axis=0)

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    distances = [
        np.linalg.norm(move) / np.linalg.norm(place) for move, place in zip(moves, places, strict=False)
    ]
    assert [neighbour.relative_distance for neighbour in found.neighbours] == pytest.approx(distances)
    assert [n.cosine for n in found.neighbours] == pytest.approx([cosine(a, b) for a, b in pairwise(places)])
    assert found.neighbours[0].turn is None
    turns = [cosine(a, b) for a, b in pairwise(moves)]
    assert [n.turn for n in found.neighbours[1:]] == pytest.approx(turns)
    path_length = np.linalg.norm(moves, axis=1).sum()
    assert found.straightness == pytest.approx(np.linalg.norm(places[-1] - places[0]) / path_length)


@pytest.mark.parametrize(
    ("drift", "scatter", "verdict"),
    [(1.0, 0.1, "Drifting: "), (0.05, 1.0, "Circling: "), (1.0, 1.0, "Between drifting and circling: ")],
)
def test_the_verdict_tells_drifting_from_circling(tmp_path, drift, scatter, verdict):
    generator = torch.Generator().manual_seed(3)
    direction = torch.nn.functional.normalize(torch.randn(2000, generator=generator), dim=0)
    noise = scatter * torch.randn(12, 2000, generator=generator) / 2000**0.5
    places = drift * direction * torch.arange(12)[:, None] + noise
    movement = movement_of(write_run(tmp_path / "run", places))
    assert movement.verdict.startswith(verdict)
    # The formula that the module's docstring states, with d the drift and s the scatter.
    expected = (drift**2 - scatter**2) / (drift**2 + 2 * scatter**2)
    assert np.mean(movement.late_turns) == pytest.approx(expected, abs=0.1)


def test_movement_needs_three_places_and_one_model(tmp_path):
    two = movement_of(write_run(tmp_path / "two", torch.eye(2)))
    assert two.verdict == "Three different weights are needed to tell drifting from circling."
    still = movement_of(write_run(tmp_path / "still", torch.ones(4, 3)))
    assert still.straightness is None and still.neighbours[2].turn is None
    folder = write_run(tmp_path / "mixed", torch.eye(3))
    torch.save({"model": {"w": torch.ones(5)}, "step": 40}, folder / "4.pt")
    with pytest.raises(StructureError, match=r"4.pt does not hold the tensors of .*1.pt: it (lacks|has) 'w'"):
        describe(folder, movement=True)
    with pytest.raises(OptionError, match="is one checkpoint"):
        describe(folder / "4.pt", movement=True)


def test_movement_leaves_out_what_is_not_finite(tmp_path):
    inf, nan = float("inf"), float("nan")
    movement = movement_of(
        write_run(tmp_path / "run", [[1.0, -inf, 0.0], [2.0, -inf, nan], [3.0, -inf, 0.0]])
    )
    assert [n.relative_distance for n in movement.neighbours] == pytest.approx([1.0, 0.5])
    assert movement.neighbours[1].turn == pytest.approx(1.0)


def test_memory_does_not_grow_with_the_weights(tmp_path):
    """Two tensors of 128 MB are compared under 64 MB beyond what the interpreter and a small comparison took."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        torch.save({"w": torch.full((32_000_000,), value)}, tmp_path / f"{name}.pt")
        torch.save({"w": torch.full((3,), value)}, tmp_path / f"small_{name}.pt")
    code = """
import sys, threading, torch
from polyak import inspection
torch.set_num_threads(1)
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
inspection.compare(sys.argv[1] + "/small_a.pt", sys.argv[1] + "/small_b.pt")
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
assert inspection.compare(sys.argv[1] + "/a.pt", sys.argv[1] + "/b.pt").relative_distance == 1.0
done.set(); watcher.join()
print(peak - before)
"""
    if sys.platform != "linux":
        pytest.skip("anonymous memory is counted by Linux")
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert 0 < int(result.stdout) * 1024 < 64_000_000


def test_a_recorded_trajectory_shows_its_blocks_and_how_they_lie(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with polyak.Recorder(model, tmp_path, block=2, optimizer=optimizer) as run:
        for step, value in enumerate((1.0, 3.0, 4.0, 4.0, 2.0, 2.0), 1):
            model.weight.data.fill_(value)
            optimizer.param_groups[0]["lr"] = 0.5 if step < 5 else 0.25
            run.update(loss=1 / value)
    summary = describe(tmp_path)
    data = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert [(b["start"], b["stop"], b["count"]) for b in data["blocks"]] == [(0, 2, 2), (2, 4, 2), (4, 6, 2)]
    assert [n["relative_distance"] for n in data["movement"]["neighbours"]] == [1.0, 0.5]
    assert data["movement"]["neighbours"][1]["turn"] == pytest.approx(-1)
    console = Console(file=StringIO(), width=100)
    console.print(view(summary))
    shown = " ".join(console.file.getvalue().split())
    assert "optimizer steps 0 to 6, 3 blocks, 6 samples, 24 bytes" in shown
    assert "(4, 6] 2 0.25 0.5 0.5 1.000000 -1.00" in shown and "Circling" in shown
    with pytest.raises(OptionError, match="no nested keys"):
        describe(tmp_path, "model")

    (tmp_path / summary.blocks[1].file_name).unlink()
    console.print(view(describe(tmp_path)))
    assert "damaged" in console.file.getvalue()


def test_steps_are_read_from_names_as_averaging_reads_them(tmp_path):
    for step in (9, 10):
        save(tmp_path / f"step-{step}.safetensors", w=torch.ones(1))
    assert [row.step for row in describe(tmp_path).rows] == [9, 10]
