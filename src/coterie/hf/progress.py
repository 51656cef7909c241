"""Progress of a compression: how many of its pieces are done, and which one is next."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from coterie.data import Shown, progress_bar


@dataclass
class Show:
    """What `showing` yields."""

    total: int
    shown: Shown
    done: int = 0
    said: tuple[str, int] = ("", 0)

    def step(self, text: str) -> None:
        """One piece of the work is done; `text` says which."""
        self.done += 1
        self.say(text)

    def say(self, text: str) -> None:
        """Says what happens; the same words again make a new line only when another tenth is done."""
        said = (text, 10 * self.done // max(self.total, 1))
        self.shown.update(self.done, text)
        if said != self.said:
            self.shown.line(f"[{self.done}/{self.total}] {text}")
        self.said = said

    def note(self, text: str) -> None:
        """Says what should stay on the terminal, above the bar if there is one."""
        self.shown.line(f"[{self.done}/{self.total}] {text}")
        self.shown.above(text)


@contextmanager
def showing(total: int, show: bool | None = None) -> Iterator[Show]:
    """Shows `total` pieces of work: True for a bar, False for nothing, None for what suits the output.

    >>> with showing(2, False) as show:
    ...     show.step("model.layers.0.mlp")
    >>> show.done
    1
    """
    with progress_bar("", total, show=show) as shown:
        yield Show(total, shown)
