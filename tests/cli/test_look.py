import json
import sys
from dataclasses import replace

import pytest

from polyak.cli import main
from polyak.demo import _show, _study
from polyak.demo._show import study_as_data
from polyak.demo._tasks import TASKS


@pytest.fixture
def tiny(monkeypatch):
    """Make the digits task four steps long and train it in this process."""
    task = replace(
        TASKS["digits"],
        steps=60,
        eval_steps=20,
        block_steps=10,
        averages={label: replace(spec, start=0) for label, spec in TASKS["digits"].averages.items()},
        decay_fractions=(0.5,),
        tuning_seeds=(1000,),
        seeds=2,
    )
    monkeypatch.setitem(TASKS, "digits", task)
    monkeypatch.setattr(_show.os, "cpu_count", lambda: 1)
    return task


def test_demo_shows_and_writes_what_was_measured(tiny, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    data = json.loads((tmp_path / "digits.json").read_text())
    assert data == json.loads(json.dumps(study_as_data(_study.run_study(tiny, seeds=2))))

    unwrapped = " ".join(shown.split())
    written = " ".join((tmp_path / "digits.txt").read_text(encoding="utf-8").split())
    for sentence in data["verdict"]:
        assert sentence in unwrapped and sentence in written
    assert f"{data['summary']['live weights']['test_nll']['mean']:.4f}" in shown
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "digits.json").read_text()


def test_quick_takes_two_seeds_and_few_tuning_runs(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(_show, "show", lambda task, seeds, outputs, as_json: taken.append((task, seeds)))
    assert main(["demo", "--quick"]) == main(["demo", "--quick", "--seeds", "3"]) == main(["demo"]) == 0
    assert [seeds for _, seeds in taken] == [2, 3, 8]
    assert [_study.run_count(task, seeds) for task, seeds in taken] == [7, 9, 34]
    assert {task.steps for task, _ in taken} == {800}


@pytest.mark.slow
def test_running_it_twice_gives_the_same_files_byte_for_byte(tiny, tmp_path, capsys):
    contents = []
    for how in ([], ["--json"]):
        capsys.readouterr()
        assert main(["demo", "--output", str(tmp_path), *how]) == 0
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    assert json.loads(capsys.readouterr().out) == json.loads(contents[1]["digits.json"])


def test_foreign_files_stop_it_before_any_training(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_study, "run_study", lambda *args, **kwargs: pytest.fail("it trained"))
    (tmp_path / "digits.json").write_text("{}")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "digits.json" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "scipy", "sklearn"])
def test_a_missing_extra_is_named_before_any_training(tiny, tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setattr(_study, "run_study", lambda *args, **kwargs: pytest.fail("it trained"))
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert missing in error and "pip install 'polyak[demo]'" in error
    assert not (tmp_path / "out").exists()
