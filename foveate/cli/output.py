"""How commands talk: tables for people, one JSON object for machines, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from threading import Timer
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID
    from rich.table import Table

PATIENCE_S = 2.0
"""Work that is done sooner needs no line about its progress."""


class Out:
    """What a command says. With `--json` only `finish` reaches stdout."""

    def __init__(self, as_json: bool, stdout: TextIO) -> None:
        self.as_json = as_json
        self.data: dict[str, Any] | None = None
        self.stdout = stdout
        self._console = _console(stdout)
        self._errors = _console(sys.stderr)
        self._progress: Progress | None = None
        self._label: str | None = None
        self._task: TaskID | None = None
        self._later: Timer | None = None

    @property
    def console(self) -> Console:
        """The console on stdout."""
        return self._console

    def say(self, *parts: RenderableType) -> None:
        """Something for people, wrapped to the width of the terminal: on stdout, left out with `--json`."""
        self._clear()
        if not self.as_json:
            for part in parts:
                self._console.print(part)
            self.stdout.flush()

    def line(self, text: str) -> None:
        """The same for text that must stay as it is: answers, paths."""
        self._clear()
        if not self.as_json:
            click.echo(text, file=self.stdout)

    def note(self, text: str) -> None:
        """A remark on stderr."""
        self._clear()
        click.echo(text, err=True)

    def tick(self, label: str, done: int, total: int) -> None:
        """Progress: a bar on a terminal, else one line for each kind of work that takes over two seconds."""
        if not self._errors.is_terminal:
            if label != self._label:
                self._clear()
                self._label = label
                self._later = Timer(PATIENCE_S, lambda: click.echo(f"{label} ...", err=True))
                self._later.daemon = True
                self._later.start()
            return
        if self._progress is None or label != self._label:
            self._clear()
            self._progress, self._label = _bar(self._errors), label
            self._progress.start()
            self._task = self._progress.add_task(label, total=total)
        assert self._task is not None  # made with the bar
        self._progress.update(self._task, completed=done)
        if done >= total:
            self._clear()

    def finish(self, data: dict[str, Any]) -> None:
        """The command's result, the one object that `--json` prints."""
        self.data = data

    def close(self) -> None:
        """Take the bar away and print the JSON."""
        self._clear()
        if self.as_json and self.data is not None:
            self.stdout.write(json.dumps(self.data, allow_nan=False) + "\n")
            self.stdout.flush()

    def _clear(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None
        self._label = None


@contextmanager
def talking(as_json: bool) -> Iterator[Out]:
    """An `Out` for one command; with `--json`, whatever others print goes to stderr."""
    out = Out(as_json, sys.stdout)
    try:
        if as_json:
            with redirect_stdout(sys.stderr):
                yield out
        else:
            yield out
    except BaseException:
        out.data = None
        raise
    finally:
        out.close()


def table(title: str | None, *columns: str, left: int = 1) -> Table:
    """An empty table; the first `left` columns hold words and may fold, the others hold figures."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    made.pad_edge, made.padding = False, (0, 1, 0, 0)
    for place, name in enumerate(columns):
        if place < left:
            made.add_column(name, overflow="fold")
        else:
            made.add_column(name, justify="right", no_wrap=True)
    return made


def _console(file: TextIO) -> Console:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the command line, which knows the exit code."""
            raise BrokenPipeError

    return Plain(file=file, highlight=False, markup=False, emoji=False)


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)
