"""Progress over arms and seeds: a bar on a terminal, a plain line per finished arm elsewhere."""

import math
import statistics
import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from coterie.report import format_duration


class ArmProgress:
    """Context manager that shows which arm runs and how much time is left, on standard error.

    Args:
        title: of the whole.
        arms: the arm of each piece of work, in order; the same arm comes again for every seed.
        show: True for a bar, False for nothing, None for a bar on a terminal and plain lines elsewhere.

    >>> with ArmProgress("a paper", ["ours"], show=False) as progress:
    ...     progress.begin("ours", seed=0)
    ...     progress.end(seconds=0.1)
    """

    def __init__(self, title: str, arms: Sequence[str], *, show: bool | None = None) -> None:
        self.title, self.arms, self.done = title, arms, 0
        self._seconds: dict[str, list[float]] = {}
        console = Console(stderr=True)
        self._lines = show is None and not console.is_terminal
        self._bar: Progress | None = None
        if show or (show is None and console.is_terminal):
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            left = TextColumn("{task.fields[left]}")
            self._bar = Progress(*columns, TimeElapsedColumn(), left, console=console)
            self._task = self._bar.add_task(title, total=len(arms), left="")

    def __enter__(self) -> "ArmProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, arm: str, seed: int) -> None:
        """Says which arm runs now."""
        self._now = f"{self.title}: {arm}, seed {seed}"
        if self._bar is not None:
            self._bar.update(self._task, description=self._now)

    def end(self, seconds: float, *, loaded: bool = False) -> None:
        """Says that it is finished, in `seconds`; or that it was already, in an earlier run."""
        self._seconds.setdefault(self.arms[self.done], []).append(seconds)
        self.done += 1
        left = "" if self.done == len(self.arms) else f"{format_duration(self.seconds_left())} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, left=left)
        elif self._lines:
            took = "done earlier" if loaded else format_duration(seconds)
            line = f"{self._now}: {took} ({self.done}/{len(self.arms)}{left and ', '}{left})"
            print(line, file=sys.stderr)

    def seconds_left(self) -> float:
        """What the arms to come took for other seeds; the mean of all arms for one that has not run yet."""
        known = {arm: statistics.fmean(each) for arm, each in self._seconds.items()}
        typical = statistics.fmean(known.values())
        return math.fsum(known.get(arm, typical) for arm in self.arms[self.done :])
