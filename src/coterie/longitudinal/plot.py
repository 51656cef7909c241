"""Spaghetti plots: what persons did, class by class, under the class's mean curve."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from coterie.longitudinal.panel import Panel

if TYPE_CHECKING:
    import pandas as pd


def draw_trajectories(
    panel: Panel,
    weights_TK: npt.NDArray[np.float64],
    curves: "pd.DataFrame",
    knots: list[float],
    file: str | Path,
    *,
    persons: int,
) -> Path:
    """One picture per class: its persons' scores as thin lines, its mean curve, a dotted line at its knot.

    Args:
        panel: T persons.
        weights_TK: their class probabilities; a person is drawn in its most probable class, paler when
        unsure.
        curves: of `TrajectoryMoE.mean_curves`.
        knots: one per class, or none.
        file: .png, .svg or .pdf.
        persons: the most per class, spread evenly over the table.
    """
    from matplotlib.figure import Figure

    classes = weights_TK.shape[1]
    figure = Figure(figsize=(1 + 3.6 * classes, 3.6), layout="constrained")
    axes = figure.subplots(1, classes, sharex=True, sharey=True, squeeze=False)[0]
    label_T = weights_TK.argmax(1)
    for k, axis in enumerate(axes):
        own = np.flatnonzero(label_T == k)
        shown = own[np.linspace(0, len(own) - 1, min(persons, len(own))).astype(int)]
        for row in shown:
            seen_J = panel.seen[row].numpy() > 0
            t_J, y_J = panel.t[row].numpy()[seen_J], panel.y[row].numpy()[seen_J]
            axis.plot(t_J, y_J, color=f"C{k % 10}", alpha=0.35 * weights_TK[row, k], linewidth=0.8)
        mean = curves[curves["class"] == k + 1]
        axis.plot(mean["t"], mean["y"], color="black", linewidth=2)
        if knots:
            axis.axvline(knots[k], color="black", linestyle=":", linewidth=1)
        axis.set(xlabel="time", title=f"class {k + 1}: {len(own)} of {len(panel)} persons")
    axes[0].set_ylabel("score")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    return file
