"""Progress on standard error: a bar on a terminal, plain lines elsewhere, nothing where none is asked for."""

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

_SHOWN: ContextVar[bool] = ContextVar("_SHOWN", default=False)


class Shown:
    """What `progress_bar` yields: a bar to move, or a place for lines, or neither."""

    def __init__(self, bar: "Progress | None", lines: bool) -> None:
        self._bar, self._lines = bar, lines

    def update(self, done: int, label: str | None = None, *, left: str = "", note: str = "") -> None:
        """Moves the bar.

        Args:
            done: pieces of work.
            label: in front of the bar from now on; None for the one it has.
            left: time to go, where the caller knows better than the pace so far.
            note: a line beneath the bar.
        """
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=done, description=label, left=left, note=note)

    def line(self, text: str) -> None:
        """Prints a line where there is no bar and silence is not asked for."""
        if self._lines:
            print(text, file=sys.stderr)

    def above(self, text: str) -> None:
        """Prints a line above the bar, where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)


@contextmanager
def progress_bar(
    label: str, total: int | None, *, done: int = 0, show: bool | None = None, transient: bool = False
) -> Iterator[Shown]:
    """Shows how much of some work is done.

    Args:
        label: in front of the bar.
        total: pieces of work; None for a bar without an end.
        done: of them, at the start.
        show: True for a bar, False for nothing, None for a bar on a terminal and lines elsewhere.
        transient: the bar goes away at the end.

    >>> with progress_bar("layers", 2, show=False) as shown:
    ...     shown.update(1)
    ...     shown.line("layer 1 is done")
    """
    if show is False:
        yield Shown(None, lines=False)
        return
    from coterie.data.bar import draw_bar, is_terminal

    if show or is_terminal():
        with draw_bar(label, total, done, transient) as bar:
            yield Shown(bar, lines=False)
    else:
        yield Shown(None, lines=True)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Inside, `counted` draws bars on standard error where that is a terminal; outside it is silent."""
    token = _SHOWN.set(True)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def counted(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar that counts them inside `progress_shown`.

    Args:
        items: what a loop goes over: epochs, starts, chunks of rows.
        label: in front of the bar.
        total: how many there are, where `items` has no length; None for a bar without an end.

    >>> list(counted(range(3), "epochs"))
    [0, 1, 2]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(label, total, show=None if _SHOWN.get() else False, transient=True) as shown:
        for done, item in enumerate(items, 1):
            yield item
            shown.update(done)
