"""The bar that `coterie.data.progress_bar` draws. A file of its own, as rich takes a while to import."""

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def is_terminal() -> bool:
    """Whether a bar on standard error would be seen."""
    return Console(stderr=True).is_terminal


def draw_bar(label: str, total: int | None, done: int, transient: bool) -> Progress:
    """A bar with one task, which is drawn while inside of it; its fields are `left` and `note`."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn())
    bar = _NotedBar(*columns, TimeElapsedColumn(), _Left(), console=Console(stderr=True), transient=transient)
    bar.add_task(label, total=total, completed=done, left="", note="")
    return bar


class _NotedBar(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:  # a line of its own: beside a bar it would not fit in 80 columns
                yield Text(task.fields["note"])


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """The caller's estimate of the time to go, or what the pace so far says."""
        if task.fields["left"]:
            return Text(f"{task.fields['left']} left", style="progress.remaining")
        return Text() if task.total is None else super().render(task).append(" left")
