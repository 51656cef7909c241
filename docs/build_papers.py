"""The site's pages that are not files of docs/: README.md and CONTRIBUTING.md, and a page per paper.

A paper's page comes from its file and from `results/SLUG.json`, its newest committed run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from coterie.reproduce import Card, Experiment, load, search
from coterie.reproduce.page import draw, measured_note
from coterie.reproduce.results import Result, arm_tables, format_measured, lines_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"

STYLE = """<style>
.paper { --ink: var(--md-default-fg-color); --soft: var(--md-default-fg-color--light);
  --line: var(--md-default-fg-color--lightest); --arm0: #3f6fa8; --arm1: #c9591c; --arm2: #2f8a6b;
  --arm3: #8a63a8; --arm4: #94802a; --arm5: #a8486b; }
[data-md-color-scheme=slate] .paper { --arm0: #7fb0e8; --arm1: #f0935a; --arm2: #5fc7a0; --arm3: #c3a0e0;
  --arm4: #d6c260; --arm5: #ee8fb0; }
.paper svg { width: 100%; height: auto; }
</style>"""


def on_config(config: Any) -> Any:
    """The entry `Papers` of the navigation becomes a section with a page per paper."""
    for entry in config.nav:
        if "Papers" in entry:
            pages = [{card.slug: f"papers/{card.slug}.md"} for card in search()]
            entry["Papers"] = [{"All papers": "papers/index.md"}, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    cards = [escaped(card) for card in search()]
    pages = {"papers/index.md": index_page(cards)}
    pages |= {f"papers/{card.slug}.md": paper_page(card) for card in cards}
    for name, source in {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}.items():
        text = (ROOT / source).read_text("utf-8")
        pages[name] = text.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def index_page(cards: Sequence[Card]) -> str:
    """All papers in a table, with the verdicts of their newest runs."""
    rows = []
    for card in cards:
        result = newest_result(card.slug)
        verdicts = "not run yet" if result is None else result.headline
        rows.append([f"[{card.slug}]({card.slug}.md)", f"{card.title} ({card.year})", card.area, verdicts])
    return "\n".join(
        [
            "# Papers",
            "",
            "Each is re-run by one command, `coterie reproduce SLUG`: the method beside its baselines, and a "
            "verdict on each of the paper's claims.",
            "",
            *table(["slug", "paper", "area", "claims"], rows),
        ]
    )


def paper_page(card: Card) -> str:
    """One paper: card, verdicts, arms, plots, and how it was run."""
    experiment, result = load(card.slug), newest_result(card.slug)
    return "\n".join(
        [
            f"# {card.title}",
            "",
            f"{card.authors}, {card.year}, {card.venue}" + (f", [code]({card.code})" if card.code else ""),
            "",
            card.problem,
            "",
            f"**As published.** {card.headline}",
            "",
            "```bash",
            f"coterie reproduce {card.slug}",
            "```",
            "",
            *(measured(experiment, result) if result else ["No standard run is committed yet."]),
            "",
            "## How it is re-run here",
            "",
            experiment.about,
        ]
    )


def measured(experiment: Experiment, result: Result) -> Iterator[str]:
    """The sections that come from a run."""
    yield from ["## Claims", "", result.headline, ""]
    now = [(claim.text, claim.required) for claim in experiment.claims]
    if now != [(outcome.text, outcome.required) for outcome in result.claims]:
        yield from ["!!! warning", "    The claims have changed since this run.", ""]
    rows = [[o.text, o.verdict, format_measured(o.measured), o.required] for o in result.claims]
    yield from table(["claim", "verdict", "measured", "required"], rows)
    for outcome in result.claims:
        if outcome.note:
            yield from ["", f"*{outcome.text}*: {outcome.note}"]
    yield from ["", "## What was measured", "", measured_note(result), ""]
    for title, columns, rows in arm_tables(result.arms):
        yield from [f"### {title}", ""] if title else []
        yield from [*table(columns, rows), ""]
    yield STYLE
    for plot in experiment.plots:
        if lines_of(plot, result.arms):
            yield from ["", f"### {plot.curve[0].upper()}{plot.curve[1:]}", "", plot.note, ""]
            yield f'<div class="paper">{draw(plot, result)}</div>'
    yield from ["", "## How this was made", ""]
    for name, value in {**result.provenance, "wall time": result.wall_time}.items():
        yield f"- {name}: " + (f"`{value}`" if name == "command" else value)


def escaped(card: Card) -> Card:
    """The card with text that Markdown does not take for HTML."""
    texts = {f.name: getattr(card, f.name) for f in fields(card) if isinstance(getattr(card, f.name), str)}
    return replace(card, **{name: escape(text, quote=False) for name, text in texts.items()})


def newest_result(slug: str) -> Result | None:
    """The committed run, if there is one."""
    file = RESULTS / f"{slug}.json"
    return Result.from_json(file.read_text("utf-8")) if file.exists() else None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        columns,
        ["---", *["---:"] * (len(columns) - 1)] if columns[0] == "" else ["---"] * len(columns),
        *rows,
    ]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
