"""Progress of a run: a bar on a terminal, a plain line now and then elsewhere."""

import math
import sys
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from coterie.train.history import History

_WINDOW = 20  # steps the shown numbers are averaged over
_LINES = 20  # plain lines per run


class TrainingProgress:
    """Context manager that shows a growing history.

    Args:
        history: what to show; its last entry is the newest step.
        steps: of the whole run.
        show: True for a bar, False for nothing, None for a bar on a terminal and plain lines on stderr
            elsewhere.
        bits_label: what to call cross-entropy / ln 2.

    >>> with TrainingProgress(History(), steps=10, show=False) as progress:
    ...     progress.update()
    """

    def __init__(
        self, history: History, steps: int, *, show: bool | None = None, bits_label: str = "bits per byte"
    ) -> None:
        self.history, self.steps, self.bits_label = history, steps, bits_label
        console = Console(stderr=True)
        self._lines = show is None and not console.is_terminal
        self._bar: Progress | None = None
        if show or (show is None and console.is_terminal):
            columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console)
            self._task = self._bar.add_task(history.label or "training", total=steps, completed=history.steps)
            # a line of its own for the numbers, which a bar beside them would not fit in 80 columns
            self._live = Live(self._bar, console=console, refresh_per_second=4)

    def __enter__(self) -> "TrainingProgress":
        if self._bar is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._live.stop()

    def update(self) -> None:
        """Shows the newest step."""
        done = self.history.steps
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            self._live.update(Group(self._bar, Text(self._numbers())))
        elif self._lines and (done == self.steps or done % max(self.steps // _LINES, 1) == 0):
            name = f"{self.history.label}: " if self.history.label else ""
            left = _mean(self.history.seconds) * (self.steps - done)
            print(f"{name}step {done}/{self.steps}, {self._numbers()}, {left:.0f} s left", file=sys.stderr)

    def _numbers(self) -> str:
        history = self.history
        bits = _mean(history.cross_entropy) / math.log(2)
        parts = [f"loss {_mean(history.loss):.3f}", f"{bits:.3f} {self.bits_label}"]
        tokens, seconds = (sum(values[-_WINDOW:]) for values in (history.tokens, history.seconds))
        parts.append(f"{tokens / max(seconds, 1e-9):,.0f} tokens/s")
        loads = [value for value in history.imbalance[-_WINDOW:] if value is not None]
        if loads:
            parts.append(f"load max/mean {_mean(loads):.2f}")
        return ", ".join(parts)


def _mean(values: list[float]) -> float:
    recent = values[-_WINDOW:]
    return math.fsum(recent) / len(recent) if recent else math.nan
