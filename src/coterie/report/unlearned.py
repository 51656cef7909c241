"""What became of a checkpoint that was made to forget: on the terminal, and as a page."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.report.paper import Drawing, PaperPage, Table, write_paper_page
from coterie.report.plots import Line, line_plot
from coterie.report.tables import MISSING, format_bytes, format_count, format_number, format_rate, print_table

if TYPE_CHECKING:
    from coterie.tune.result import Known, Unlearned

BOUND = (
    "A low accuracy on this text does not prove that the knowledge is gone: ask about it in other words, and "
    "test what should have stayed."
)


def print_unlearned(done: "Unlearned") -> None:
    """Prints the experts that know the text, and one table of before and after."""
    print_table("Experts that know the text", *_targets(done))
    print()
    print_table(_title(done), ["", "before", "after"], _rows(done))
    print()
    if done.reached is False:
        print(f"The accuracy to stop at, {done.stop_forget:g}, was not reached.")
    if done.out is None:
        print("This was a dry run: nothing was trained, and nothing was written.")
    else:
        print(f"{BOUND}\nwritten to {done.out}")


def write_unlearned_page(path: str | os.PathLike[str], done: "Unlearned") -> Path:
    """Writes the same as one self-contained HTML file; returns its path."""
    forgotten, kept = done.texts
    page = PaperPage(
        title=f"{Path(done.source).name}, made to forget",
        kicker=f"coterie, {done.method}",
        headline=_title(done),
        lead=[BOUND],
        claims=[],
        tables=[
            Table("Before and after", ["", "before", "after"], _rows(done)),
            Table("Experts that know the text", *_targets(done)),
        ],
        measured_note=f"On {done.heldout_tokens[0]} held-out tokens of the text to forget and "
        f"{done.heldout_tokens[1]} of the text to keep; speed is of forward passes on this machine, the two "
        "models by turns.",
        drawings=[
            Drawing(
                "Accuracy by step",
                "The text to keep should stay where it is.",
                _curves(done, width=8.0, height=3.8),
                _curves(done, width=4.4, height=3.6),
            )
        ],
        provenance={
            "checkpoint": done.source,
            "to forget": f"{forgotten}, {done.tokens[0]} tokens",
            "to keep": f"{kept}, {done.tokens[1]} tokens",
            "method": f"{done.method}, scope {done.scope}, {done.history[-1].step} steps",
        },
    )
    return write_paper_page(path, page)


def _title(done: "Unlearned") -> str:
    return f"{done.method}, trained: {_SCOPES[done.scope]}"


_SCOPES = {
    "expert": "the target and its router",
    "experts": "all experts",
    "router": "all routers",
    "all": "all parameters",
}


def _targets(done: "Unlearned") -> tuple[list[str], list[list[str]]]:
    rows = [[t.block, str(t.expert), format_number(t.affinity, 3)] for t in done.targets]
    rows.append(["ahead of the next by", "", f"{done.margin:.0%}"])
    return ["layer", "expert", "affinity"], rows


def _rows(done: "Unlearned") -> list[list[str]]:
    rows: list[tuple[str, Callable[[Known], str]]] = [
        ("text to forget: next-token accuracy", lambda known: f"{known.forget.accuracy:.1%}"),
        ("text to forget: perplexity", lambda known: f"{known.forget.perplexity:.5g}"),
        ("text to keep: next-token accuracy", lambda known: f"{known.retain.accuracy:.1%}"),
        ("text to keep: perplexity", lambda known: f"{known.retain.perplexity:.5g}"),
        ("on disk", lambda known: format_bytes(known.disk)),
    ]
    if done.out is not None:
        rows.append(("tokens/s", lambda known: format_rate(known.speed)))
    cells = [
        [name, show(done.before), MISSING if done.after is None else show(done.after)] for name, show in rows
    ]
    if done.overlap is not None and done.trained_share is not None:
        share = f"{format_count(done.trained)} ({done.trained_share:.2%})"
        cells.append(["experts of the text to forget still chosen", "", f"{done.overlap:.1%}"])
        cells.append(["parameters trained", "", share])
        cells.append(["steps", "", str(done.history[-1].step)])
    return cells


def _curves(done: "Unlearned", *, width: float, height: float) -> str:
    seen = [step for step in done.history if step.measured]
    steps = [float(step.step) for step in seen]
    lines = [
        Line(f"text to {word}", steps, [step.measured[key] for step in seen])
        for word, key in (("forget", "forget"), ("keep", "retain"))
    ]
    return line_plot(lines, x="step", y="next-token accuracy", width=width, height=height)
