"""The entry point: fast help, exit codes, one line for every failure, one JSON object with --json."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest

from foveate import __version__
from foveate.cli.main import COMMANDS, cli
from foveate.cli.output import talking
from foveate.errors import FoveateWarning, PassError
from tests.cli.conftest import Run, said_in

HEAVY = ("torch", "transformers", "rich", "numpy", "PIL", "yaml")


@pytest.mark.parametrize("args", [["--help"], ["bench", "--help"], ["demo", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom foveate.cli.main import cli\n"
        f"try: cli({args!r}, prog_name='foveate')\nexcept SystemExit as end: assert not end.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "foveate" in done.stdout


def test_every_command_in_the_list_exists_and_has_json(run: Run) -> None:
    commands = "passes cost snapshot diff calibrate inspect optimize export run train bench eval demo"
    assert list(COMMANDS) == commands.split()
    listed = run("--help").stdout
    for name in COMMANDS:
        shown = run(name, "--help")
        assert shown.exit_code == 0
        assert "--json" in shown.stdout
        assert f"  {name} " in listed


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    assert run().stdout == run("--help").stdout
    assert run("--version").stdout.strip() == f"foveate, version {__version__}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nope"], "No such command 'nope'"),
        (["passes", "--nope"], "No such option"),
        (["eval"], "Missing argument 'MODEL'"),
        (["bench", "digits", "--passes", "fastv", "--backend", "gpu"], "'gpu' is not one of"),
        (["bench", "digits", "--passes", "fastv", "--repeat", "0"], "0 is not in the range"),
        (["bench", "digits", "--passes", "fastv{layer=2"], "not closed"),
        (["bench", "digits", "--passes", "fastv{keep=2}"], "keep=2; allowed: above 0, at most 1"),
        (["optimize", "digits", "--passes", "blur", "-o", "new"], "there is no pass 'blur'"),
        (["eval", "digits", "--passes", "recipe:none"], "there is no recipe 'none'"),
        (["run", "digits", "--prompt", "x", "--passes", "missing.yaml"], "missing.yaml does not exist"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(run: Run, args: list[str], said: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(said_in(result)) == 1
    assert said in result.stderr


def test_in_a_process_of_its_own_too() -> None:
    command = [sys.executable, "-m", "foveate.cli.main", "passes", "--nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: No such option '--nope'. See: foveate passes --help\n"


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command("passes")
    def command() -> None:
        with talking(False) as out:
            out.say("before")
            raise error

    monkeypatch.setattr("foveate.cli.passes.command", command)


def test_an_interrupt_is_130_without_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, KeyboardInterrupt())
    result = run("passes")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_an_error_of_several_lines_is_told_in_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, PassError("first\n  second"))
    assert run("passes").stderr == "error: first second\n"


def test_a_bug_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, ZeroDivisionError())
    assert isinstance(run("passes").exception, ZeroDivisionError)


def test_a_reader_that_goes_away_is_no_failure() -> None:
    code = "from foveate.cli.main import main; main()"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, "passes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    errors = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait() == 141
    assert errors == ""


def test_warnings_of_foveate_are_one_line_others_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("passes")
    def command() -> None:
        warnings.warn("nothing\nchanged", FoveateWarning, stacklevel=1)
        warnings.warn("chatter", UserWarning, stacklevel=1)

    monkeypatch.setattr("foveate.cli.passes.command", command)
    result = run("passes")
    assert (result.exit_code, result.stderr) == (0, "warning: nothing changed\n")


def test_json_is_alone_on_stdout_whatever_others_print(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("passes")
    def command() -> None:
        with talking(True) as out:
            print("noise")
            out.say("for people")
            out.note("a remark")
            out.finish({"value": 1})

    monkeypatch.setattr("foveate.cli.passes.command", command)
    result = run("passes")
    assert json.loads(result.stdout) == {"value": 1}
    assert result.stderr == "noise\na remark\n"


def test_json_is_not_printed_after_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("passes")
    def command() -> None:
        with talking(True) as out:
            out.finish({"value": 1})
            raise PassError("too late")

    monkeypatch.setattr("foveate.cli.passes.command", command)
    result = run("passes")
    assert (result.exit_code, result.stdout) == (2, "")


def test_the_group_can_be_used_without_exiting(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError):
        cli.main(["nope"], standalone_mode=False)
