"""The table, the sentence, the figure and the files of the demo."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from polyak.demo._show import Outputs, study_as_data, study_figure, study_table, verdict
from polyak.demo._tasks import CHOSEN, LIVE
from polyak.errors import CheckpointError, OutputExistsError

LIVE_NLL = [0.50, 0.52, 0.48, 0.51, 0.49]
SWA, RAW, EMA, DECAY = "SWA + update_bn", "SWA, no update_bn", "EMA + update_bn", "decay, last 40%"


def shifted(by: float, wobble: float) -> list[float]:
    """The live weights' scores, moved, and moved a little more or less on every other seed."""
    return [nll + by + wobble * (-1) ** seed for seed, nll in enumerate(LIVE_NLL)]


def test_verdict_when_averaging_helped_and_beat_the_decay(made_up_study):
    study = made_up_study({LIVE: LIVE_NLL, CHOSEN: shifted(-0.2, 0.01), DECAY: shifted(-0.1, 0.01)})
    answer, live, decay, *_ = verdict(study)
    assert answer == (
        "Averaging helped: accuracy 90.0 → 90.0%, NLL 0.500 → 0.302; the best tuned decay reaches 90.0% and 0.402, "
        "which is worse."
    )
    assert live.startswith(
        "The test NLL of what was chosen is 0.1980 below that of the live weights (95% interval"
    )
    assert "p < 0.001, lower on 5 of 5 seeds)" in live
    assert decay.startswith("It is 0.1000 below that of the best tuned learning-rate decay")
    assert "linear over the last 40%, a share that 18 runs on other seeds" in decay


def test_verdict_when_averaging_did_harm(made_up_study):
    study = made_up_study({LIVE: LIVE_NLL, CHOSEN: shifted(0.1, 0.01), DECAY: shifted(-0.1, 0.01)})
    answer, live, decay, *_ = verdict(study)
    assert answer.startswith("Averaging did not help, it did harm: accuracy") and answer.endswith(
        "which is better."
    )
    assert "is 0.1020 above" in live and "lower on 0 of 5 seeds" in live
    assert decay.startswith("It is 0.2000 above that of the best tuned learning-rate decay")


def test_verdict_when_the_seeds_cannot_tell(made_up_study):
    study = made_up_study({LIVE: LIVE_NLL, CHOSEN: shifted(-0.01, 0.1), DECAY: shifted(-0.02, 0.0)})
    answer, live, *_ = verdict(study)
    assert answer.startswith("Not sure whether averaging helped: ") and answer.endswith("no sure difference.")
    low, high = (float(bound) for bound in live.split("difference ")[1].split(",")[0].split(" to "))
    assert low < 0 < high


@pytest.mark.parametrize(("by", "word"), [(-0.2, "better"), (0.2, "worse")])
def test_two_seeds_that_agree_are_said_to_be_too_few(made_up_study, by, word):
    study = made_up_study({LIVE: LIVE_NLL[:2], CHOSEN: shifted(by, 0.1)[:2]})
    assert verdict(study)[0].startswith(f"Averaging did {word} on all 2 seeds, too few to be sure: ")


@pytest.mark.parametrize(
    ("raw", "opening"),
    [
        (
            [0.60, 0.55, 0.62, 0.58, 0.61],
            "Without update_bn the average is wrong: 59.2% of the test examples right",
        ),
        ([0.95, 0.60, 0.99, 0.97, 0.40], "Whether update_bn mattered is not sure here: 78.2%"),
        ([0.99, 0.98, 0.99, 0.98, 0.99], "Without update_bn the average did better, which is unusual: 98.6%"),
    ],
)
def test_verdict_on_update_bn(made_up_study, raw, opening):
    study = made_up_study({LIVE: LIVE_NLL}, accuracy={RAW: raw, SWA: [0.90, 0.91, 0.92, 0.90, 0.91]})
    sentence = verdict(study)[4]
    assert sentence.startswith(opening)
    assert "instead of 90.8%" in sentence


def test_verdict_says_what_was_chosen_and_what_test_confirms(made_up_study):
    assert verdict(made_up_study({LIVE: LIVE_NLL}))[3] == (
        "After training, validation chose among up to 30 averages and the live weights, on so many seeds: "
        "tail:0.5 (4), live (1). Of 4 averages chosen, test confirms 4 beyond the noise of its examples."
    )


def test_the_data_is_json_with_the_numbers_that_were_measured(made_up_study):
    study = made_up_study({LIVE: LIVE_NLL, CHOSEN: shifted(-0.2, 0.01), DECAY: shifted(-0.1, 0.01)})
    data = json.loads(json.dumps(study_as_data(study), allow_nan=False))

    by_seed = [data["curves"][str(seed)][CHOSEN]["test_nll"][-1] for seed in range(5)]
    summary = data["summary"][CHOSEN]["test_nll"]
    assert summary["by_seed"] == by_seed == shifted(-0.2, 0.01)
    assert summary["mean"] == pytest.approx(np.mean(by_seed))
    assert summary["stderr"] == pytest.approx(np.std(by_seed, ddof=1) / 5**0.5)
    assert summary["minus_live"]["mean"] == pytest.approx(np.mean(by_seed) - np.mean(LIVE_NLL))
    assert summary["minus_tuned_decay"]["mean"] == pytest.approx(-0.1)
    assert list(data["summary"]) == [LIVE, "live, early-stopped", DECAY, RAW, SWA, EMA, CHOSEN]
    assert data["tuning"]["best_decay_fraction"] == 0.4
    assert data["settings"]["averages"][SWA] == {
        "scheme": "uniform",
        "start": 320,
        "every": 20,
        "update_bn": True,
    }
    assert data["settings"]["seeds"] == [0, 1, 2, 3, 4]
    assert data["verdict"] == verdict(study)


def test_the_table_shows_every_candidate_uncut_on_a_terminal_of_80_columns(made_up_study):
    study = made_up_study({LIVE: LIVE_NLL, CHOSEN: shifted(-0.2, 0.01), DECAY: shifted(-0.1, 0.01)})
    console = Console(file=StringIO(), width=80)
    console.print(study_table(study))
    table = console.file.getvalue()
    assert "…" not in table
    lines = [line.split() for line in table.splitlines()]
    chosen = next(line for line in lines if line[:3] == CHOSEN.split())
    stderr = np.std(shifted(-0.2, 0.01), ddof=1) / 5**0.5
    assert chosen[3:] == ["0.3020", "±", f"{stderr:.4f}", "-0.1980", "(p<0.001)", "-0.1000", "(p<0.001)"]
    assert sum(line[:2] == ["live", "weights"] for line in lines) == 2


def test_the_figure_draws_the_decay_only_from_where_it_begins(made_up_study):
    study = made_up_study({LIVE: LIVE_NLL}, live_validation_nll=(0.9,) * 10)
    nll, accuracy = study_figure(study).get_axes()
    ends = {line.get_label(): (line.get_xdata()[0], line.get_xdata()[-1]) for line in nll.get_lines()}
    # Epochs: 800 steps of 20, the decay over the last 40% of them.
    assert ends[LIVE] == (12, 40)
    assert ends[DECAY] == (24, 40)
    assert accuracy.get_lines()[0].get_ydata()[-1] == pytest.approx(90)


def test_what_select_chose_is_drawn_and_a_broken_average_sets_no_scale(made_up_study):
    study = made_up_study({LIVE: LIVE_NLL, RAW: [90.0] * 5}, accuracy={RAW: [0.1] * 5})
    for axes in study_figure(study).get_axes():
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert {text.get_text().rstrip(" ↑↓") for text in axes.texts} == set(lines) and lines[
            CHOSEN
        ].get_marker() == ""
        low, high = axes.get_ylim()
        assert not low <= lines[RAW].get_ydata()[-1] <= high and low < lines[LIVE].get_ydata()[-1] < high
        assert lines[LIVE].get_color() != lines[CHOSEN].get_color()


# demo/test_outputs

NUMBERS = {"made_by": "polyak demo", "one": 1.0}


def test_writes_three_files_and_nothing_else(tmp_path):
    outputs = Outputs(tmp_path / "new" / "folder", "digits")
    outputs.claim()
    outputs.write(NUMBERS, b"\x89PNG", "a verdict ±\n")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["digits.json", "digits.png", "digits.txt"]
    assert json.loads((outputs.folder / "digits.json").read_text()) == NUMBERS
    assert (outputs.folder / "digits.png").read_bytes() == b"\x89PNG"
    assert (outputs.folder / "digits.txt").read_text(encoding="utf-8") == "a verdict ±\n"


def test_a_former_demos_files_are_rewritten_and_others_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for text in ("first\n", "second\n"):
        outputs = Outputs(tmp_path, "text")
        outputs.claim()
        outputs.write(NUMBERS, b"", text)
    assert (tmp_path / "text.txt").read_text() == "second\n"
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["{}", '{"made_by": "me"}', "[]", "not JSON"])
def test_a_file_of_that_name_that_no_demo_made_is_refused(tmp_path, content):
    (tmp_path / "digits.json").write_text(content)
    with pytest.raises(OutputExistsError, match=r"digits\.json.*--output"):
        Outputs(tmp_path, "digits").claim()
    assert (tmp_path / "digits.json").read_text() == content


def test_a_picture_of_somebody_elses_is_refused(tmp_path):
    (tmp_path / "digits.png").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"digits\.png"):
        Outputs(tmp_path, "digits").claim()


def test_the_other_tasks_files_do_not_matter(tmp_path):
    (tmp_path / "digits.json").write_text("mine")
    Outputs(tmp_path, "text").claim()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("digits.json", "mine")]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        Outputs(tmp_path / "file" / "below", "digits").claim()
