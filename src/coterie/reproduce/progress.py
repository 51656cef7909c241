"""Progress over arms and seeds: a bar on a terminal, a plain line per finished arm elsewhere."""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from coterie.data import Shown, progress_bar
from coterie.report import format_duration


@contextmanager
def arm_progress(title: str, arms: Sequence[str], *, show: bool | None = None) -> Iterator["ArmProgress"]:
    """Shows which arm runs and how much time is left, on standard error.

    Args:
        title: of the whole.
        arms: the arm of each piece of work, in order; the same arm comes again for every seed.
        show: True for a bar, False for nothing, None for a bar on a terminal and plain lines elsewhere.

    >>> with arm_progress("a paper", ["ours"], show=False) as progress:
    ...     progress.begin("ours", seed=0)
    ...     progress.end(seconds=0.1)
    """
    with progress_bar(title, len(arms), show=show) as shown:
        yield ArmProgress(title, arms, shown)


class ArmProgress:
    """What `arm_progress` yields."""

    def __init__(self, title: str, arms: Sequence[str], shown: Shown) -> None:
        self.title, self.arms, self.done = title, arms, 0
        self._shown, self._left, self._seconds = shown, "", dict[str, list[float]]()

    def begin(self, arm: str, seed: int) -> None:
        """Says which arm runs now."""
        self._now = f"{self.title}: {arm}, seed {seed}"
        self._shown.update(self.done, self._now, left=self._left)

    def end(self, seconds: float, *, loaded: bool = False) -> None:
        """Says that it is finished, in `seconds`; or that it was already, in an earlier run."""
        self._seconds.setdefault(self.arms[self.done], []).append(seconds)
        self.done += 1
        self._left = "" if self.done == len(self.arms) else format_duration(self.seconds_left())
        self._shown.update(self.done, left=self._left)
        took = "done earlier" if loaded else format_duration(seconds)
        left = f", {self._left} left" if self._left else ""
        self._shown.line(f"{self._now}: {took} ({self.done}/{len(self.arms)}{left})")

    def seconds_left(self) -> float:
        """What the arms to come took for other seeds; the mean of all arms for one that has not run yet."""
        known = {arm: statistics.fmean(each) for arm, each in self._seconds.items()}
        typical = statistics.fmean(known.values())
        return math.fsum(known.get(arm, typical) for arm in self.arms[self.done :])
