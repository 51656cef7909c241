"""What became of a checkpoint that was made smaller: on the terminal, and as a page."""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import coterie
from coterie.report.paper import PaperPage, Table, write_paper_page
from coterie.report.tables import format_bytes, format_count, format_number, format_rate, print_table

if TYPE_CHECKING:
    from coterie.shrink.result import Measured, Shrunk

BOUND = (
    "The result is bound to the text it was calibrated on: on other domains it can be far worse. "
    "Test it on what it will be used for."
)

STREAMED = "Streamed, one layer at a time: perplexity and speed were not measured."


def print_shrunk(shrunk: "Shrunk") -> None:
    """Prints one table of before and after; of a dry run, what would be kept, too."""
    if shrunk.out is None:
        print_table("What would be left", ["layer", "experts"], _experts(shrunk))
        print()
    print_table(_title(shrunk), ["", "before", _after(shrunk)], _rows(shrunk))
    print(f"\n{BOUND}")
    if shrunk.out is None:
        print("This was a dry run: nothing was written, and no loss was measured.")
    else:
        if shrunk.after.perplexity is None:
            print(STREAMED)
        print(f"written to {shrunk.out}")


def write_shrunk_page(path: str | os.PathLike[str], shrunk: "Shrunk", command: str = "") -> Path:
    """Writes the same as one self-contained HTML file; returns its path."""
    tables = [
        Table("Before and after", ["", "before", _after(shrunk)], _rows(shrunk)),
        Table("What is left", ["layer", "experts, by their old ids"], _experts(shrunk)),
    ]
    page = PaperPage(
        title=f"{Path(shrunk.source).name}, made smaller",
        kicker=f"coterie, {shrunk.method}",
        headline=_title(shrunk),
        lead=[BOUND],
        claims=[],
        tables=tables,
        measured_note=f"Perplexity is on {shrunk.heldout_tokens} held-out tokens of the calibration files; "
        "speed is of forward passes on this machine, the two models by turns."
        if shrunk.after.perplexity is not None
        else STREAMED,
        provenance={
            "checkpoint": shrunk.source,
            "calibration": "; ".join(
                f"{path}, {tokens} tokens"
                for path, tokens in zip(shrunk.domains, shrunk.calibration_tokens, strict=True)
            ),
            **({"command": command} if command else {}),
            "versions": f"coterie {coterie.__version__}, Python {platform.python_version()}",
        },
    )
    return write_paper_page(path, page)


def _title(shrunk: "Shrunk") -> str:
    left, all_ = ({*map(len, shrunk.experts.values())}, {*shrunk.num_experts.values()})
    return f"{_span(left)} of {_span(all_)} experts in each layer, by {shrunk.method}"


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def _after(shrunk: "Shrunk") -> str:
    return "estimated after" if shrunk.out is None else "after"


def _rows(shrunk: "Shrunk") -> list[list[str]]:
    rows: list[tuple[str, Callable[[Measured], str]]] = [
        ("on disk", lambda m: format_bytes(m.disk)),
        ("in memory", lambda m: format_bytes(m.sizes.memory)),
        ("parameters", lambda m: format_count(m.sizes.total)),
        ("active per token", lambda m: format_count(m.sizes.active)),
    ]
    if shrunk.after.perplexity is not None:
        rows += [
            ("perplexity on held-out text", lambda m: format_number(m.perplexity, 3)),
            ("tokens/s", lambda m: format_rate(m.speed)),
        ]
    return [[name, show(shrunk.before), show(shrunk.after)] for name, show in rows]


def _experts(shrunk: "Shrunk") -> Sequence[Sequence[str]]:
    return [
        [layer, " ".join("+".join(map(str, members)) for members in groups)]
        for layer, groups in shrunk.experts.items()
    ]
