"""The page of a paper that was re-run: claims with verdicts, tables of arms, drawings; opens offline."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.report.html import fill_template, write_whole


@dataclass
class ClaimRow:
    """A claim on the page, figures as text; verdicts "holds" and "does not hold" are coloured."""

    text: str
    verdict: str
    measured: str
    required: str
    note: str = ""


@dataclass
class Table:
    """Columns and rows as `print_table` takes them, with a title or ""."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Drawing:
    """An SVG element of `line_plot`, wide, and narrow for small screens."""

    title: str
    note: str
    svg: str
    narrow_svg: str


@dataclass
class PaperPage:
    """Everything on the page, in its order.

    Args:
        title: of the browser's tab.
        kicker: the small line on top.
        headline: a sentence.
        lead: paragraphs under it.
        claims, tables, drawings: see there.
        measured_note: what the figures of the tables are.
        about: paragraphs on how it is re-run, with `code` and *emphasis*.
        provenance: how the run was made, in the order shown.
    """

    title: str
    kicker: str
    headline: str
    lead: Sequence[str]
    claims: Sequence[ClaimRow]
    tables: Sequence[Table]
    measured_note: str
    drawings: Sequence[Drawing] = ()
    about: Sequence[str] = ()
    provenance: dict[str, str] = field(default_factory=dict)


def write_paper_page(path: str | os.PathLike[str], page: PaperPage) -> Path:
    """Writes the page as one self-contained HTML file, whole or not at all; returns the path.

    >>> import tempfile
    >>> page = PaperPage("a", "b", "c", [], [ClaimRow("x < y", "holds", "1", "≤ 2")], [], "means")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     "x &lt; y" in write_paper_page(f"{folder}/page.html", page).read_text("utf-8")
    True
    """
    write_whole(Path(path), render_paper_page(page))
    return Path(path)


def render_paper_page(page: PaperPage) -> str:
    """The page as text. The drawings are trusted as SVG; everything else is escaped."""
    from markupsafe import Markup

    drawings = [
        Drawing(d.title, d.note, Markup(d.svg), Markup(d.narrow_svg))
        for d in page.drawings  # Markup of our own SVG, whose labels matplotlib has escaped
    ]
    about = [_marked(text) for text in page.about]
    return fill_template("paper.html", page=PaperPage(**{**vars(page), "drawings": drawings, "about": about}))


def _marked(text: str) -> str:
    from markupsafe import Markup, escape

    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"(?<!\w)\*(\w[^*]*)\*(?!\w)", r"<em>\1</em>", text))  # escaped before
