"""The `foveate` command: finds the subcommand, and turns every expected failure into one line on stderr.

Exit codes: 0 fine; 1 a gate failed; 2 wrong use or unsupported input; 130 interrupted; 141 nobody reads.
Nothing here imports torch, transformers or rich: `foveate --help` must answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from foveate import __version__
from foveate.errors import FoveateError, FoveateWarning

COMMANDS: dict[str, str] = {
    "passes": "List the passes, their options and where they come from.",
    "cost": "What a model costs before and after passes, predicted from its graphs.",
    "snapshot": "Write a stable picture of a model's graphs, to be committed and compared.",
    "diff": "What differs between two snapshots or models, with gates for CI.",
    "calibrate": "Count what heads and neurons do with images, for passes to use.",
    "inspect": "Draw what calibration found: attention by distance, by layer, active heads.",
    "optimize": "Optimize a model and save it in a new folder.",
    "export": "Write a model, its passes inside the graphs, for ONNX Runtime.",
    "run": "Ask a question about an image.",
    "train": "Fine-tune a pruned model, so that it recovers what it lost.",
    "bench": "Time a model against its dense form and against Hugging Face.",
    "eval": "Accuracy before and after, on digits or on any images, prompts and answers.",
    "demo": "The whole story on the bundled model, in three minutes.",
}
"""Command -> its line in `foveate --help`; the command itself is `foveate.cli.<command>.command`."""

WRONG_USE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class Commands(click.Group):
    """A group that imports a command only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which one meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"foveate.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader of stdout that has gone away is no failure of ours."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still buffered would fail again when the interpreter closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(BROKEN_PIPE) from None
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit with its code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            with _one_line_warnings():
                code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "foveate"
            code = _complain(f"{error.format_message()} See: {where} --help")
        except click.ClickException as error:
            code = _complain(error.format_message())
        except FoveateError as error:
            code = _complain(str(error))
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> int:
    click.echo(f"error: {_one_line(message)}", err=True)
    return WRONG_USE


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """foveate's warnings as one line each; other packages' warnings are not for users of a command."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **also: Any) -> None:
        click.echo(f"warning: {_one_line(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FoveateWarning)
        warnings.showwarning = show
        yield


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="foveate")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Really remove the visual work of a multimodal LLM, and measure what that gains.

    MODEL is "digits" (bundled), a folder, a Hugging Face hub id, or "random:llava" (random weights).
    Every command takes --json: then stdout carries exactly one JSON object.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """The console script."""
    cli(prog_name="foveate")


if __name__ == "__main__":
    main()
