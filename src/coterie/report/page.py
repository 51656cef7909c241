"""The report of a run as one HTML page that needs nothing else: no network, no other file."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.report.attraction import END_TEXT, Attracted, Passage
from coterie.report.comparison import Arm, headline
from coterie.report.html import fill_template, write_whole
from coterie.report.plots import expert_colours, loss_curves


@dataclass
class Report:
    """Everything the page and `--json` show.

    Args:
        title: of the page.
        arms: the baseline first, the method last.
        columns: heads of the table printed on the terminal; see `compare`.
        rows: its rows.
        load: `[L, E]`, multiples of the fair share; see `load_by_layer`.
        words: `[L][E]`, what each expert attracts; see `attracted_words`.
        bytes: the same in bytes; see `attracted_bytes`.
        passage: a held-out passage; None to leave it out.
        prompt: what the method was given to go on from.
        sample: what it wrote after it.
        provenance: how the run was made, in the order shown: command, versions, machine, seed, corpus …
    """

    title: str
    arms: list[Arm]
    columns: list[str]
    rows: list[list[str]]
    load: Sequence[Sequence[float]] | NDArray[np.float64] = field(default_factory=list)
    words: list[list[list[Attracted]]] = field(default_factory=list)
    bytes: list[list[list[Attracted]]] = field(default_factory=list)
    passage: Passage | None = None
    prompt: str = ""
    sample: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.load = [[float(share) for share in row] for row in self.load]

    @property
    def headline(self) -> str:
        """The sentence on top of the page; see `coterie.report.headline`."""
        return headline(self.arms)

    def to_json(self) -> str:
        """The same content as a JSON object, with the headline.

        Raises:
            ValueError: a number is NaN or infinite, which JSON cannot say.

        >>> arm = Arm("MoE", 20, 10, 1000, 1.8, 8430.0)
        >>> json.loads(Report("Run", [arm], ["", "MoE"], []).to_json())["headline"]
        'The MoE reaches 1.800 bits per byte on held-out text.'
        """
        content = {"headline": self.headline, **asdict(self)}
        return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Writes the report as one self-contained HTML page, whole or not at all.

    Args:
        path: of the page; folders above it are created, a page already there is replaced.
        report: the same report gives the same bytes.

    Returns: the path.

    Raises:
        ValueError: the parts disagree about the number of layers, experts or characters.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> report = Report("Run", [Arm("MoE", 20, 10, 1000, 1.8, 8430.0)], ["", "MoE"], [["tokens", "1 000"]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(f"{folder}/report.html", report).read_text("utf-8")[:15]
    '<!DOCTYPE html>'
    """
    path = Path(path)
    write_whole(path, render(report))
    return path


def render(report: Report) -> str:
    """The page as text; see `write_report`."""
    from markupsafe import Markup

    _check(report)
    num_layers = max(len(report.load), len(report.passage.experts) if report.passage else 0)
    return fill_template(
        "page.html",
        report=report,
        curves=Markup(loss_curves(report.arms)),
        narrow_curves=Markup(loss_curves(report.arms, width=4.4, height=3.6)),
        colours=expert_colours(_num_experts(report)),
        num_layers=num_layers,
        layer_names=[str(layer) for layer in range(num_layers)],
        end_text=END_TEXT,
        choices=flat_choices(report.passage),
        unit="character",
        slots="first",
        tint=tint,
    )


def flat_choices(shown: Passage | None) -> list[list[list[Any]]]:
    """[L][C]: [expert, weight in thousandths, …] of each character, flat because it is most of the page."""
    if shown is None:
        return []
    return [
        [
            [n for e, w in zip(experts, weights, strict=True) for n in (e, round(1000 * w))]
            for experts, weights in zip(experts_C, weights_C, strict=True)
        ]
        for experts_C, weights_C in zip(shown.experts, shown.weights, strict=True)
    ]


def tint(load: float) -> str:
    """A heat-map cell's colour: none at 1, full at a quarter of the fair share and at four times it."""
    strength = max(-1.0, min(1.0, math.log2(max(load, 1e-3)) / 2))
    return f"--c:var({'--over' if strength > 0 else '--under'});--p:{abs(strength):.0%}"


def _num_experts(report: Report) -> int:
    layers = report.passage.experts if report.passage else []
    named = [expert for layer in layers for experts in layer for expert in experts]
    return max([len(report.load[0]) if report.load else 0, *(expert + 1 for expert in named)])


def _check(report: Report) -> None:
    for row in report.rows:
        if len(row) != len(report.columns):
            raise ValueError(f"a table row has {len(row)} cells under {len(report.columns)} columns")
    layers, experts = len(report.load), len(report.load[0]) if report.load else 0
    for name, part in (("load", report.load), ("words", report.words), ("bytes", report.bytes)):
        if part and [len(row) for row in part] != [experts] * layers:
            raise ValueError(
                f"{name} has {[len(row) for row in part]} experts per layer; "
                f"should be {experts} in each of {layers} layers, as load"
            )
    if report.passage and report.load:
        if len(report.passage.experts) != layers:
            raise ValueError(
                f"the passage has {len(report.passage.experts)} layers; should be {layers}, as load"
            )
        if _num_experts(report) > experts:
            raise ValueError(f"the passage names expert {_num_experts(report) - 1}; load has only {experts}")
    if report.passage:
        characters = len(report.passage.texts)
        for layer in report.passage.experts:
            if len(layer) != characters:
                raise ValueError(f"a layer routes {len(layer)} characters of a passage of {characters}")
