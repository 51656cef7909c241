"""Progress of the estimators' loops: shown where a command asks for it, silent in a library call."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")

_SHOWN: ContextVar[bool] = ContextVar("_SHOWN", default=False)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Inside, `counted` draws bars on standard error where that is a terminal."""
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
    if not _SHOWN.get() or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, label, total, console=Console(stderr=True), transient=True)
