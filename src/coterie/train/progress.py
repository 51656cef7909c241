"""Progress of a run: a bar with its newest numbers on a terminal, a plain line now and then elsewhere."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from coterie.data import progress_bar
from coterie.train.history import History

_WINDOW = 20  # steps the shown numbers are averaged over
_LINES = 20  # plain lines per run


@contextmanager
def training_progress(
    history: History, steps: int, *, show: bool | None = None, bits_label: str = "bits per byte"
) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step, and then shows the history's newest.

    Args:
        history: what to show; its last entry is the newest step.
        steps: of the whole run.
        show: True for a bar, False for nothing, None for a bar on a terminal and plain lines on stderr
            elsewhere.
        bits_label: what to call cross-entropy / ln 2.

    >>> with training_progress(History(), steps=10, show=False) as update:
    ...     update()
    """
    with progress_bar(history.label or "training", steps, done=history.steps, show=show) as shown:

        def update() -> None:
            done, numbers = history.steps, _numbers(history, bits_label)
            shown.update(done, note=numbers)
            if done == steps or done % max(steps // _LINES, 1) == 0:
                name = f"{history.label}: " if history.label else ""
                left = _mean(history.seconds) * (steps - done)
                shown.line(f"{name}step {done}/{steps}, {numbers}, {left:.0f} s left")

        yield update


def _numbers(history: History, bits_label: str) -> str:
    bits = _mean(history.cross_entropy) / math.log(2)
    parts = [f"loss {_mean(history.loss):.3f}", f"{bits:.3f} {bits_label}"]
    tokens, seconds = (sum(values[-_WINDOW:]) for values in (history.tokens, history.seconds))
    parts.append(f"{tokens / max(seconds, 1e-9):,.0f} tokens/s")
    loads = [value for value in history.imbalance[-_WINDOW:] if value is not None]
    if loads:
        parts.append(f"load max/mean {_mean(loads):.2f}")
    return ", ".join(parts)


def _mean(values: list[float]) -> float:
    recent = values[-_WINDOW:]
    return math.fsum(recent) / len(recent) if recent else math.nan
