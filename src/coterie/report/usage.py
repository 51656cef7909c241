"""How much each expert of an estimator is used, and by whom, as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from coterie.data import written_whole
from coterie.report.plots import expert_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_usage(usage: Mapping[str, Sequence[float]], file: str | Path, *, title: str = "") -> Path:
    """One bar per expert: its share of rows (or of gate weight), with the even share as a line.

    Args:
        usage: name of a gate → shares of its experts, which sum to 1.
        file: .png, .svg or .pdf; appears whole or not at all.
        title: above the picture.

    Raises ValueError: no gate, or shares that do not sum to 1.

    >>> import tempfile
    >>> draw_usage({"gate": [0.7, 0.3]}, Path(tempfile.mkdtemp()) / "usage.png").stat().st_size > 1000
    True
    """
    from matplotlib.figure import Figure

    if not usage:
        raise ValueError("no gate to draw; give at least one")
    for name, shares in usage.items():
        if not np.isclose(sum(shares), 1, atol=1e-3):
            raise ValueError(f"the shares of {name!r} sum to {sum(shares):.3g}; they should sum to 1")
    figure = Figure(figsize=(7, 1.2 + 1.6 * len(usage)), layout="constrained")
    axes = figure.subplots(len(usage), squeeze=False)[:, 0]
    for axis, (name, shares) in zip(axes, usage.items(), strict=True):
        axis.bar(
            range(len(shares)), shares, color=expert_colours(len(shares)), edgecolor="#555", linewidth=0.5
        )
        axis.axhline(1 / len(shares), color="#555", linestyle=":", linewidth=1)
        axis.set(ylabel="share", xticks=range(len(shares)) if len(shares) <= 24 else [])
        axis.set_title(name if len(usage) > 1 else "", fontsize=9, loc="left")
    axes[-1].set_xlabel("expert (dotted: the even share)")
    figure.suptitle(title, fontsize=10)
    return _save(figure, Path(file))


def draw_gate(weights_GE: ArrayLike, groups: Sequence[str], file: str | Path, *, title: str = "") -> Path:
    """A map of mean gate weights: one row per group of rows (a class, a month, a user segment).

    Args:
        weights_GE: [groups, experts].
        groups: their names.
        file: .png, .svg or .pdf; appears whole or not at all.
        title: above the picture.

    Raises ValueError where names and rows differ in number.
    """
    from matplotlib.figure import Figure

    table = np.asarray(weights_GE, dtype=float)
    if table.ndim != 2 or len(table) != len(groups):
        raise ValueError(
            f"{len(groups)} groups for weights of shape {table.shape}; should be [groups, experts]"
        )
    figure = Figure(figsize=(1.8 + 0.5 * table.shape[1], 1.2 + 0.3 * len(groups)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(table, aspect="auto", cmap="viridis")
    axis.set(xlabel="expert", xticks=range(table.shape[1]), yticks=range(len(groups)), yticklabels=groups)
    figure.colorbar(image, label="mean gate weight")
    figure.suptitle(title, fontsize=10)
    return _save(figure, Path(file))


def _save(figure: "Figure", file: Path) -> Path:
    with written_whole(file) as draft:
        figure.savefig(draft, dpi=130)
    return file
