import json
import os
import subprocess
import sys
import warnings

import pytest
import typer

import polyak.cli
from polyak import __version__
from polyak.cli import app, main
from polyak.errors import CheckpointError
from polyak.profiles import parse


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "polyak", *arguments], capture_output=True, text=True)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"polyak {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    assert "demo" in capsys.readouterr().out


def test_help_waits_for_neither_torch_nor_matplotlib():
    code = (
        "import sys; from polyak.cli import main; assert main(['demo', '--help']) == 0;"
        "heavy = {'torch', 'matplotlib', 'numpy', 'scipy', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_module_runs():
    result = run("demo", "--help")
    assert result.returncode == 0
    assert "polyak demo --task text" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "--nope"),
        (["nope"], "nope"),
        (["demo", "--task", "chess"], "chess"),
        (["demo", "--seeds", "few"], "'--seeds'"),
        (["demo", "--seeds"], "--seeds"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("polyak: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_bad_input_is_one_line_and_code_2_in_a_real_process(tmp_path):
    result = run("demo", "--seeds", "1", "--output", str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.startswith("polyak: error: seeds must be 2 to 1000")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert result.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("arguments", [["profiles"], ["profiles", "--json"], ["--help"]])
def test_a_result_that_cannot_be_printed_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "polyak", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == "polyak: error: cannot print the result: No space left on device\n"


def test_an_error_of_the_system_elsewhere_keeps_its_traceback(command):
    command(OSError(28, "No space left on device"))
    with pytest.raises(OSError):
        main(["fail"])


@pytest.fixture
def command(monkeypatch):
    """Add a command that raises what it is given, for as long as the test runs."""
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

    def add(error: BaseException) -> None:
        @app.command("fail")
        def fail() -> None:
            raise error

    return add


def test_an_error_of_several_lines_is_shown_as_one(command, capsys):
    command(CheckpointError("a.pt is truncated\nat byte 7"))
    assert main(["fail"]) == 2
    assert capsys.readouterr().err == "polyak: error: a.pt is truncated at byte 7\n"


def test_an_interrupt_is_code_130_without_a_traceback(command, capsys):
    command(KeyboardInterrupt())
    assert main(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_command_may_choose_its_exit_code(command):
    command(typer.Exit(3))
    assert main(["fail"]) == 3


def test_a_warning_is_one_line_without_source_code(monkeypatch, capsys):
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

    @app.command("warn")
    def warn() -> None:
        with warnings.catch_warnings(action="always"):  # which pytest has made an error
            warnings.warn("beware of\nthe dog", FutureWarning, stacklevel=1)

    assert main(["warn"]) == 0
    assert capsys.readouterr().err == "polyak: warning: beware of the dog\n"


def test_a_bug_keeps_its_traceback(command):
    command(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_commands_and_options_are_completed(monkeypatch, capsys):
    monkeypatch.setenv("_POLYAK_COMPLETE", "complete_bash")
    for words, completed in (("polyak ins", "inspect"), ("polyak average --pro", "--profile")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        with pytest.raises(SystemExit):
            main([])
        assert capsys.readouterr().out.split() == [completed]


def test_every_table_can_be_had_as_json():
    group = typer.main.get_command(app)
    with group.make_context("polyak", [], resilient_parsing=True) as context:
        commands = [group.get_command(context, name) for name in group.list_commands(context)]
    without = [command.name for command in commands if not any("--json" in p.opts for p in command.params)]
    assert len(commands) >= 6 and without == []


def test_profiles_are_listed_and_each_can_be_parsed(capsys):
    assert main(["profiles"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert {"uniform", "ema:half_life=2000", "decay:sqrt:0.4"} < set(listed)
    assert main(["profiles", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert all(str(parse(text)) for profile in known.values() for text in profile["examples"])
    assert known["ema"]["counts"] == ["samples", "steps"] and known["tail"]["examples"][0] in listed


def test_exports():
    assert set(polyak.cli.__all__) == {"app", "main"}
