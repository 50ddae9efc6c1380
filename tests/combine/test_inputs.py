"""Which inputs, in which order, at which coefficients."""

import pytest
import torch

import polyak
from polyak import checkpoints
from polyak.combine import Span, coefficients
from polyak.combine._inputs import (
    Budget,
    parse_bytes,
    spans_of_steps,
)
from polyak.combine._offline import parse_dtype
from polyak.combine._reading import read_inputs
from polyak.errors import CheckpointError, OptionError


def save(path, step=None):
    torch.save({"w": torch.ones(1)} | ({} if step is None else {"global_step": step}), path)


def test_saved_steps_come_before_names(tmp_path):
    for name, step in (("1", 30), ("2", 20), ("3", 100)):
        save(tmp_path / f"{name}.pt", step)
    reading = read_inputs(tmp_path)
    assert reading.steps == [20, 30, 100]
    assert [item.name for item in reading.taken] == ["2.pt", "1.pt", "3.pt"]


def test_saved_steps_that_contradict_a_word_in_the_names_order_nothing(tmp_path):
    for name, step in (("epoch1", 30), ("epoch2", 20), ("epoch3", 100)):
        save(tmp_path / f"{name}.pt", step)
    polyak.average_checkpoints(tmp_path, tmp_path.with_suffix(".npz"))
    with pytest.raises(OptionError, match=r"epoch1\.pt is of step 30 by its entries and epoch2\.pt of 20"):
        polyak.average_checkpoints(tmp_path, tmp_path.with_suffix(".pt"), profile="tail:0.5")


def test_names_serve_where_saved_steps_are_missing_or_equal(tmp_path):
    for name, step in (("10", 5), ("9", 5)):
        save(tmp_path / f"{name}.pt", step)
    assert read_inputs(tmp_path).required().steps == [9, 10]


def test_the_given_order_stays_where_no_steps_are_known(tmp_path):
    for name in ("b", "a"):
        save(tmp_path / f"{name}.pt")
    reading = read_inputs([tmp_path / "b.pt", tmp_path / "a.pt"])
    assert reading.steps is None and [item.name for item in reading.taken] == ["b.pt", "a.pt"]


def test_folders_of_checkpoints_and_folders_that_are_checkpoints(tmp_path):
    save(tmp_path / "10.pt")
    save(tmp_path / "9.pt")
    (tmp_path / "notes.txt").write_text("none")
    checkpoints.write(tmp_path / "11", {"w": torch.ones(1)})
    reading = read_inputs([tmp_path, tmp_path / "11"])
    assert [item.path.name for item in reading.taken] == ["9.pt", "10.pt", "11"]
    assert "the same file as" in reading.left_out


def test_nothing_to_average(tmp_path):
    with pytest.raises(OptionError, match="nothing to average"):
        read_inputs([]).required()
    with pytest.raises(CheckpointError, match="it is empty"):
        read_inputs(tmp_path).required()


def test_a_checkpoint_stands_for_the_steps_since_the_one_before():
    assert spans_of_steps([100, 150, 300]) == [Span(50, 100), Span(100, 150), Span(150, 300)]
    assert spans_of_steps([0, 50]) == [Span(0, 0), Span(0, 50)]
    assert spans_of_steps([7]) == [Span(0, 7)]
    with pytest.raises(OptionError, match="different steps"):
        spans_of_steps([3, 3])


@pytest.mark.parametrize(
    ("profile", "steps", "expected"),
    [
        ("uniform", [100, 150, 300], [1 / 3] * 3),
        ("tail:0.5", [100, 150, 300, 301], [0, 0, 0.5, 0.5]),
        ("tail:steps=150", [100, 200, 300], [0, 1 / 3, 2 / 3]),
        ("window:100,200", [100, 200, 300], [0, 1, 0]),
        ("weights:1,2,1", [5, 6, 9], [0.25, 0.5, 0.25]),
        ("power:gamma=1", [100, 200], [0.25, 0.75]),
        # The checkpoints cover steps 500 to 1000 only; each keeps its share of the whole run's law.
        ("power:gamma=1", [750, 1000], [5 / 12, 7 / 12]),
        ("ema:half_life=100", [100, 200, 300], [1 / 7, 2 / 7, 4 / 7]),
    ],
)
def test_coefficients(profile, steps, expected):
    assert coefficients(polyak.parse(profile), spans_of_steps(steps)) == pytest.approx(expected, abs=1e-12)


def test_counts_weigh_samples_and_not_steps():
    blocks = [Span(0, 100, 1), Span(100, 200, 3)]
    assert coefficients(polyak.Uniform(), blocks) == [0.25, 0.75]


def test_a_profile_with_no_weight_on_what_there_is():
    with pytest.raises(
        OptionError, match="window:10,20 has no weight on any of the steps there are, 900 to 1100"
    ):
        coefficients(polyak.Window(10, 20), spans_of_steps([1000, 1100]))


@pytest.mark.parametrize("size", ["much", "5XB", "-1MB", "", 1.5, True, None])
def test_sizes_that_are_none(size):
    with pytest.raises(OptionError, match="as a size in bytes"):
        parse_bytes(size)


@pytest.mark.parametrize("max_memory", [0, -5, "1kB", "10MB"])
def test_too_little_memory_says_how_much_is_needed(tmp_path, max_memory):
    save(tmp_path / "1.pt")
    inputs = read_inputs(tmp_path).checkpoints
    with pytest.raises(OptionError, match=r"allow (\d+)MB or more") as caught:
        Budget.within(max_memory, inputs, 1)
    least = str(caught.value).partition("allow ")[2].partition(" ")[0]
    budget = Budget.within(least, inputs, 1)
    assert budget.total_bytes <= parse_bytes(least) and budget.slice_bytes == 1 << 16


def test_many_outputs_make_the_slices_smaller(tmp_path):
    save(tmp_path / "1.pt")
    inputs = read_inputs(tmp_path).checkpoints
    roomy, tight = Budget.within("1GB", inputs, 40), Budget.within("20MB", inputs, 40)
    assert tight.slice_bytes < roomy.slice_bytes and tight.total_bytes <= 20_000_000 < roomy.total_bytes


def test_slices_have_64_kilobytes_at_least(tmp_path):
    save(tmp_path / "1.pt")
    with pytest.raises(OptionError, match="allow 30MB or more"):  # 16 MB for the rest, and 200 buffers
        Budget.within("20MB", read_inputs(tmp_path).checkpoints, 196)


def test_a_file_that_must_be_loaded_whole_counts(tmp_path):
    model = {"w": torch.ones(10_000_000)}
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(OptionError, match=r"old\.pt is in an old torch format"):
        polyak.average_checkpoints(tmp_path, tmp_path / "average.pt", max_memory="50MB")
    assert not (tmp_path / "average.pt").exists()


@pytest.mark.parametrize("dtype", ["int32", "float31", torch.int64, "nn", "complex64"])
def test_dtypes_that_cannot_be_asked_for(dtype):
    with pytest.raises(OptionError, match="no floating-point dtype"):
        parse_dtype(dtype)


def test_an_average_among_what_it_was_made_of_is_left_out(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir(), elsewhere.mkdir()
    for step in (1, 2):
        checkpoints.write(run / f"step{step}.safetensors", {"w": torch.full((2,), float(step))})
    polyak.average_checkpoints(run, elsewhere / "average.safetensors")
    polyak.average_checkpoints(run, run / "mine.safetensors")
    with pytest.warns(UserWarning, match=r"left out: 'mine\.safetensors' \(itself an average, of 'step1"):
        report = polyak.average_checkpoints(run, tmp_path / "again.safetensors")
    assert report.inputs == ("step1.safetensors", "step2.safetensors")
    report = polyak.average_checkpoints(elsewhere, tmp_path / "copy.safetensors")
    assert "only one checkpoint counts: what is written are its weights" in report.notes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("7", 7), ("7B", 7), ("2K", 2_000), ("2kb", 2_000), ("3 MB", 3_000_000), ("1.5g", 1_500_000_000)),
        *(
            ("2TB", 2 * 10**12),
            ("1KiB", 1024),
            ("1MiB", 2**20),
            (" 1 GiB ", 2**30),
            ("1.5Ti", 3 * 2**39),
            (12, 12),
        ),
    ],
)
def test_sizes_in_bytes(text, size):
    assert parse_bytes(text) == size
