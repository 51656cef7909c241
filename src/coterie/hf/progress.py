"""Progress of a compression: a bar on a terminal, plain lines elsewhere, on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass
class Show:
    """What `showing` yields."""

    total: int
    bar: Progress | None
    lines: bool
    done: int = 0
    said: tuple[str, int] = ("", 0)

    def step(self, text: str) -> None:
        """One piece of the work is done; `text` says which."""
        self.done += 1
        self.say(text)

    def say(self, text: str) -> None:
        """Says what happens; the same words again make a new line only when another tenth is done."""
        said = (text, 10 * self.done // max(self.total, 1))
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, description=text)
        elif self.lines and said != self.said:
            print(f"[{self.done}/{self.total}] {text}", file=sys.stderr)
        self.said = said

    def note(self, text: str) -> None:
        """Says what should stay on the terminal, above the bar if there is one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            self.say(text)


@contextmanager
def showing(total: int, show: bool | None = None) -> Iterator[Show]:
    """Shows `total` pieces of work: True for a bar, False for nothing, None for what suits the output.

    >>> with showing(2, False) as show:
    ...     show.step("model.layers.0.mlp")
    >>> show.done
    1
    """
    console = Console(stderr=True)
    if show or (show is None and console.is_terminal):
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            bar.add_task("", total=total)
            yield Show(total, bar, lines=False)
    else:
        yield Show(total, None, lines=show is None)
