"""The routing explorer: which experts of a checkpoint took which tokens, as one page that opens offline."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.report.attraction import END_TEXT, Attracted, Passage
from coterie.report.html import fill_template, write_whole
from coterie.report.page import flat_choices, tint
from coterie.report.plots import expert_colours


@dataclass
class ExplorerLayer:
    """What the page shows of one MoE block with E experts.

    Args:
        name: a short one, such as the number of its decoder layer.
        load: one list of E per text, multiples of the fair share.
        weights: mean combine weight of each expert where it was used, [E], None where it was not.
        norms: mean length of its output, in the same way.
        partners: of each expert, those it shared most tokens with, and the share of its tokens.
        tokens: what each expert attracts.
    """

    name: str
    load: Sequence[Sequence[float]]
    weights: Sequence[float | None]
    norms: Sequence[float | None]
    partners: Sequence[Sequence[tuple[int, float]]]
    tokens: Sequence[Sequence[Attracted]]


@dataclass
class Explorer:
    """Everything on the page.

    Args:
        title: the model.
        headline: a sentence.
        texts: names of the calibration texts.
        columns: heads of the overview table, as `print_table` takes them.
        rows: its rows.
        layers: in order of depth.
        passage: tokens and where each of the layers sent them.
        overlap: columns and rows of the table of how alike the texts' experts are, or None for a single text.
        overlap_note: what its figures are.
        provenance: how it was made, in the order shown.
    """

    title: str
    headline: str
    texts: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    layers: Sequence[ExplorerLayer]
    passage: Passage
    overlap: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    overlap_note: str = ""
    provenance: dict[str, str] = field(default_factory=dict)


def write_explorer(path: str | os.PathLike[str], explorer: Explorer) -> Path:
    """Writes the page as one self-contained HTML file, whole or not at all; returns the path.

    Raises:
        ValueError: the passage has another number of layers.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> layer = ExplorerLayer("0", [[1.5, 0.5]], [0.6, 0.4], [2.0, 1.0], [[(1, 0.5)], [(0, 0.5)]], [[], []])
    >>> passage = Passage(["<b>"], [[[1]]], [[[1.0]]])
    >>> page = Explorer("m", "h", ["t"], ["layer"], [["0"]], [layer], passage)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     "&lt;b&gt;" in write_explorer(f"{folder}/page.html", page).read_text("utf-8")
    True
    """
    if len(explorer.passage.experts) != len(explorer.layers):
        raise ValueError(
            f"the passage has {len(explorer.passage.experts)} layers; should be {len(explorer.layers)}"
        )
    page = fill_template(
        "explorer.html",
        page=explorer,
        colours=expert_colours(max(len(layer.weights) for layer in explorer.layers)),
        num_layers=len(explorer.layers),
        layer_names=[layer.name for layer in explorer.layers],
        end_text=END_TEXT,
        choices=flat_choices(explorer.passage),
        unit="token",
        slots="all",
        tint=tint,
    )
    write_whole(Path(path), page)
    return Path(path)
