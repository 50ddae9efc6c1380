import json

import pytest

from polyak.demo._show import Outputs
from polyak.errors import CheckpointError, OutputExistsError

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
