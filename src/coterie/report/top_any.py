"""What `coterie top-any` says: on the terminal, and as a page."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.report.paper import PaperPage, Table, write_paper_page
from coterie.report.tables import (
    MISSING,
    format_bytes,
    format_count,
    format_number,
    format_rate,
    print_table,
)

if TYPE_CHECKING:
    from coterie.shrink.top_any_result import Masked

_LAYERS = ["layer", "experts per token", "kept", "share"]
IGNORED = "plain transformers reads it, too, and applies no mask"


def print_masked(masked: "Masked") -> None:
    """Prints what each layer keeps, and one table of before, after and the rule of MC."""
    print_table("Experts per token", _LAYERS, _layers(masked))
    print()
    columns, rows = _compared(masked)
    print_table(_title(masked), columns, rows)
    if masked.out is None:
        print("\nThis was a dry run: nothing was written, and speed was not measured.")
        return
    print(f"\nwritten to {masked.out}; coterie.hf.load reads it" + ("" if masked.packed else f"; {IGNORED}"))


def write_masked_page(path: str | os.PathLike[str], masked: "Masked") -> Path:
    """Writes the same as one self-contained HTML file; returns its path."""
    page = PaperPage(
        title=f"{Path(masked.source).name}, with fewer experts per token",
        kicker="coterie, top-any",
        headline=_title(masked),
        lead=["The masks were trained on one text. Test the model on what it will be used for."],
        claims=[],
        tables=[
            Table("Before and after", *_compared(masked)),
            Table("Experts per token", _LAYERS, _layers(masked)),
        ],
        measured_note=f"Perplexity and experts are on {masked.heldout_tokens} held-out tokens of the "
        "calibration files; speed is of forward passes on this machine, the two models by turns.",
        provenance={
            "checkpoint": masked.source,
            "calibration": f"{masked.calibration_tokens} tokens",
            "sparsity": f"{masked.sparsity:g}",
        },
    )
    return write_paper_page(path, page)


def _title(masked: "Masked") -> str:
    before, after = masked.experts()
    return f"{format_number(after)} of {before:g} experts per token"


def _layers(masked: "Masked") -> list[list[str]]:
    return [
        [name, str(k), format_number(k * masked.kept[name]), f"{masked.kept[name]:.1%}"]
        for name, k in masked.top_k.items()
    ]


def _compared(masked: "Masked") -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of before, after and the rule."""
    before, after, rule = masked.before, masked.after, masked.rule
    experts = masked.experts()
    rows = [
        [
            "experts per token",
            *map(format_number, experts),
            format_number(rule.kept * experts[0] if rule else None),
        ],
        [
            "perplexity on held-out text",
            *(format_number(m.perplexity, 3) for m in (before, after)),
            format_number(rule.perplexity if rule else None, 3),
        ],
        ["active parameters", *(format_count(m.sizes.active) for m in (before, after)), MISSING],
        ["parameters", *(format_count(m.sizes.total) for m in (before, after)), MISSING],
        ["on disk", *(format_bytes(m.disk) for m in (before, after)), MISSING],
        ["in memory", *(format_bytes(m.sizes.memory) for m in (before, after)), MISSING],
    ]
    if masked.out is not None:
        rows.append(["tokens/s", *(format_rate(m.speed) for m in (before, after)), MISSING])
    return ["", "before", "after", _rule_name(masked)], rows


def _rule_name(masked: "Masked") -> str:
    return "by rule (ODP)" if masked.rule is None or masked.rule.protects else "by rule, none protected"
