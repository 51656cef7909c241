"""A run of a paper as a page."""

import os
from pathlib import Path

from coterie.report.paper import ClaimRow, Drawing, PaperPage, Table, write_paper_page
from coterie.report.plots import line_plot
from coterie.reproduce.experiment import Experiment, Plot
from coterie.reproduce.results import Result, arm_tables, format_measured, lines_of


def write_page(path: str | os.PathLike[str], experiment: Experiment, result: Result) -> Path:
    """Writes the run as one self-contained HTML page."""
    return write_paper_page(path, paper_page(experiment, result))


def paper_page(experiment: Experiment, result: Result) -> PaperPage:
    """What the page shows."""
    card = experiment.card
    return PaperPage(
        title=f"{card.slug} · Coterie",
        kicker=f"Coterie · {card.slug} · {result.budget} budget",
        headline=result.headline,
        lead=[
            f"{card.authors}, {card.title}. {card.venue}, {card.year}.",
            card.problem,
            f"As published: {card.headline}",
        ],
        claims=[
            ClaimRow(o.text, o.verdict, format_measured(o.measured), o.required, o.note)
            for o in result.claims
        ],
        tables=[Table(*table) for table in arm_tables(result.arms)],
        measured_note=measured_note(result),
        drawings=[
            Drawing(plot.curve, plot.note, draw(plot, result), draw(plot, result, width=4.4, height=3.6))
            for plot in experiment.plots
            if lines_of(plot, result.arms)
        ],
        about=[" ".join(paragraph.split()) for paragraph in experiment.about.split("\n\n")],
        provenance={**result.provenance, "wall time": result.wall_time},
    )


def measured_note(result: Result) -> str:
    """What the figures in the tables are."""
    if len(result.seeds) == 1:
        return f"{result.budget.capitalize()} budget, one seed."
    return f"{result.budget.capitalize()} budget, mean ± standard deviation over {len(result.seeds)} seeds."


def draw(plot: Plot, result: Result, *, width: float = 8.0, height: float = 3.8) -> str:
    """A plot of the result as SVG, in the page's colours."""
    return line_plot(
        lines_of(plot, result.arms),
        x=plot.x,
        y=plot.y,
        log_x=plot.log_x,
        log_y=plot.log_y,
        points=plot.points,
        width=width,
        height=height,
    )
