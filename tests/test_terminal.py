"""What people see in a terminal: tables of plain text, and bars only where there is one to show them."""

import pytest

from polyak import _terminal


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes any stream a terminal to rich
    monkeypatch.setenv("COLUMNS", "200")


def test_a_bar_says_how_far_it_is_and_leaves_stdout_alone(terminal, capsys):
    with _terminal.progress_bar("candidates", shown=True) as bar:
        assert list(bar.over("abc", total=3)) == ["a", "b", "c"]
    said = capsys.readouterr()
    assert said.out == "" and "candidates" in said.err and "3/3" in said.err


def test_a_bar_may_say_what_is_being_done(terminal, capsys):
    with _terminal.progress_bar("starting", shown=True, total=2) as bar:
        bar.advance("tuning")
    said = capsys.readouterr().err
    assert "tuning" in said and "1/2" in said


def test_a_bar_may_count_bytes(terminal, capsys):
    with _terminal.progress_bar("out.pt", shown=True, in_bytes=True) as bar:
        bar.reach(500_000, 2_000_000)
    assert "0.5/2.0 MB" in capsys.readouterr().err


@pytest.mark.parametrize("shown", [True, False])
def test_nothing_is_written_where_no_terminal_shows_it(capsys, monkeypatch, shown):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with _terminal.progress_bar("candidates", shown=shown, total=2) as bar:
        bar.advance()
        bar.reach(2, 2)
    assert capsys.readouterr() == ("", "")


def test_names_are_text_never_markup_and_never_cut():
    rows = _terminal.table("name", "#:warning: [b]size[/b]")
    rows.add_row("[red]" + 200 * "x" + ":smile:", "1")
    lines = _terminal.as_text(rows, "[b]below[/b]").splitlines()
    assert lines[0].split() == ["name", ":warning:", "[b]size[/b]"]
    assert lines[2].split() == ["[red]" + 200 * "x" + ":smile:", "1"] and lines[3] == "[b]below[/b]"


def test_what_is_below_a_table_is_as_wide_as_it():
    rows = _terminal.table("name", "#size")
    rows.add_row("w" * 90, "1")
    *table, first, second = _terminal.as_text(rows, 40 * "word ").splitlines()
    assert 90 <= len(first) <= max(map(len, table)) and second.startswith("word")


def test_nothing_is_wrapped_in_a_pipe(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    rows = _terminal.table("name", "#size")
    rows.add_row("w" * 90, "1")
    _terminal.console().print(rows, 40 * "word ")
    assert [len(line.split()) for line in capsys.readouterr().out.splitlines()] == [2, 1, 2, 40]
