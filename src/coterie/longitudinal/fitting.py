"""From a panel to the best of several optima."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from coterie.data import counted
from coterie.longitudinal.covariates import terms_of
from coterie.longitudinal.curves import CURVES, Curve
from coterie.longitudinal.estimation import maximize_by_em, maximize_directly
from coterie.longitudinal.growth_mixture import GrowthMixture
from coterie.longitudinal.panel import Panel
from coterie.longitudinal.start import cluster, person_factors, start_from
from coterie.models.estimator import check_at_least, check_choice

if TYPE_CHECKING:
    from coterie.longitudinal.trajectory_moe import TrajectoryMoE

_Array = npt.NDArray[np.float64]
_LEAST_SHARE = 0.01


class DegenerateClassError(ValueError):
    """Some class kept next to nobody, from whatever start."""


@dataclass(frozen=True)
class Fit:
    """The best optimum: model, whether it converged; log-likelihoods of the starts that kept every class."""

    model: GrowthMixture
    converged: bool
    starts: list[float]


def fit_mixture(
    panel: Panel,
    curve: Curve,
    num_classes: int,
    *,
    gate_units: _Array,
    expert_units: _Array,
    joint: bool,
    n_init: int,
    method: str,
    random_state: int,
) -> Fit:
    """Maximum likelihood from several k-means starts; classes in order, class 1 the gate's reference.

    Args:
        panel: passed `check_panel`.
        curve: the functional form.
        num_classes: K.
        gate_units, expert_units: `Covariates.units` of the two designs.
        joint: model the experts' covariates too.
        n_init: starts; the first one is k-means as it is, later ones move the points by half a deviation.
        method: "lbfgs" or "em".
        random_state: of k-means and the moves.

    Raises ValueError for more parameters than persons, DegenerateClassError when no start keeps at least 1%
    of the persons in each class.
    """
    found = person_factors(curve, panel)
    points_TF = np.column_stack([found.factors, found.bend])
    rng = np.random.default_rng(random_state)
    maximize = {"lbfgs": maximize_directly, "em": maximize_by_em}[method]
    best, starts = None, []
    tries = n_init if num_classes > 1 else 1
    for start in counted(range(tries), "starts"):
        model = GrowthMixture(
            curve,
            num_classes,
            gate_units=torch.from_numpy(gate_units),
            expert_units=torch.from_numpy(expert_units),
            scale=torch.from_numpy(found.scale),
            times=panel.time_range,
            num_tvc=panel.tvc.shape[2],
            least_variance=1e-4 * found.variance,
            joint=joint,
        )
        _check_size(model, panel)
        labels_T = cluster(points_TF, num_classes, rng, jitter=0.5 if start else 0.0)
        start_from(model, panel, found, labels_T)
        optimum = maximize(model, panel)
        with torch.no_grad():
            smallest = float(model.posterior(panel).importance.min()) / len(panel)
        kept = smallest >= _LEAST_SHARE and np.isfinite(optimum.log_likelihood)
        if not kept:
            continue
        starts.append(optimum.log_likelihood)
        if best is None or optimum.log_likelihood > best[1].log_likelihood:
            best = model, optimum
    if best is None:
        raise DegenerateClassError(
            f"in each of {tries} starts one of {num_classes} classes kept under 1% of {len(panel)} "
            "persons; use fewer classes, or more starts (n_init)"
        )
    model, optimum = best
    model.reorder(_order(model, panel))
    _warn(model, panel, optimum.converged)
    return Fit(model, optimum.converged, starts)


def check_panel(panel: Panel, curve: Curve) -> None:
    """ValueError when the times cannot tell the parts of the curve apart."""
    occasions = int((panel.seen.sum(0) > 0).sum())
    distinct = len(torch.unique(panel.t[panel.seen > 0]))
    if min(occasions, distinct) < curve.occasions:
        raise ValueError(
            f"{occasions} occasions with {distinct} distinct times; a curve of {', '.join(curve.factors)} "
            f"needs at least {curve.occasions}"
        )
    first, last = panel.time_range
    if curve.from_zero and not (0 <= first < last / 2):
        raise ValueError(
            f"times run from {first:g} to {last:g}; this curve describes growth from time 0 on: subtract "
            "each person's first time, say"
        )


def check_options(model: "TrajectoryMoE") -> None:
    """ValueError for options that are unknown, out of range, or contradict each other."""
    check_choice("curve", model.curve, CURVES)
    check_choice("covariates", model.covariates, ("conditional", "joint"))
    check_choice("method", model.method, ("lbfgs", "em"))
    check_at_least(model, 1, "n_classes", "n_init")
    if model.covariates == "joint":
        both = {*terms_of(model.gate)} & {*terms_of(model.experts)}
        if both or not model.experts:
            raise ValueError(
                f"covariates='joint' with {', '.join(sorted(both))} in gate and experts: the gate would "
                "be conditioned on what the classes model; leave it out of one"
                if both
                else "covariates='joint' models the experts' covariates; give experts="
            )
    if model.gate and model.n_classes == 1:
        raise ValueError("one class needs no gate; leave gate= out or give n_classes ≥ 2")


def _check_size(model: GrowthMixture, panel: Panel) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > len(panel):
        raise ValueError(
            f"{model.num_classes} classes have {parameters} parameters, more than {len(panel)} persons; use "
            "fewer classes or covariates"
        )


def _order(model: GrowthMixture, panel: Panel) -> list[int]:
    """Classes by their bend, or without one by the mean height of their curve."""
    with torch.no_grad():
        if model.bend is not None:
            return [int(k) for k in model.bend_K().argsort()]
        t_J = torch.linspace(*panel.time_range, 21, dtype=torch.float64)
        loadings_KJP = model.curve.loadings(t_J[None], model.bend_K())[0]
        height_K = (loadings_KJP @ model.mean_KPC()[:, :, :1]).mean((1, 2))
        return [int(k) for k in height_K.argsort()]


def _warn(model: GrowthMixture, panel: Panel, converged: bool) -> None:
    if not converged:
        warnings.warn("the optimiser stopped before it converged; its estimates may be off", stacklevel=4)
    if model.curve.bend != "knot":
        return
    both_TJ = panel.seen[:, 1:] * panel.seen[:, :-1] > 0
    step = float((panel.t[:, 1:] - panel.t[:, :-1])[both_TJ].median()) if bool(both_TJ.any()) else 0.0
    first, last = panel.time_range
    for k, knot in enumerate(model.bend_K().tolist(), start=1):
        if not first + step <= knot <= last - step:
            warnings.warn(
                f"the knot of class {k}, {knot:.3g}, lies within one occasion of an end of {first:g} … "
                f"{last:g}; one of its slopes is hardly determined",
                stacklevel=4,
            )
