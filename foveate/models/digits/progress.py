"""Progress of a training run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Counts steps and prints lines; on a terminal the bar stays below the lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def steps(self, label: str, total: int) -> Iterator[int]:
        """0 .. total - 1, shown as a bar where there is a terminal."""
        if not self.console.is_terminal:
            yield from range(total)
            return
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bar(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bar:
            yield from bar.track(range(total))

    def line(self, text: str) -> None:
        """One line of plain text, written at once."""
        self.console.print(text, markup=False)
        self.console.file.flush()
