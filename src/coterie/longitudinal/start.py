"""Where to begin: growth factors person by person, clusters of them, and one M-step at the clusters."""

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from coterie.longitudinal.curves import Curve
from coterie.longitudinal.estimation import m_step
from coterie.longitudinal.growth_mixture import GrowthMixture
from coterie.longitudinal.panel import Panel

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PersonFactors:
    """What `person_factors` finds: factors [T, P], bend [T] (0 without one), residual variance of all."""

    factors: _Array
    bend: _Array
    variance: float

    @property
    def scale(self) -> _Array:
        """[P] spread of the growth factors, the unit of a model's parameters."""
        spread_P = self.factors.std(0)
        return np.where(spread_P > 0, spread_P, 1.0)


def person_factors(curve: Curve, panel: Panel, *, grid: int = 9) -> PersonFactors:
    """Least squares growth factors of each person, at the best bend of a grid.

    Args:
        curve: the functional form.
        panel: T persons; a ridge towards the mean curve stands in for what a person has too few scores for.
        grid: bends that are tried, evenly inside the curve's bounds.

    Raises ValueError when the scores do not vary, or nobody has more scores than the curve has parameters.
    """
    low, high = curve.bounds(*panel.time_range)
    bends_G = torch.linspace(low, high, grid + 2, dtype=torch.float64)[1:-1]
    if not curve.bend:
        bends_G = torch.zeros(1, dtype=torch.float64)
    loadings_TGJP = curve.loadings(panel.t, bends_G) * panel.seen[:, None, :, None]
    sizes_P = loadings_TGJP.square().mean((0, 1, 2)).sqrt()
    scaled_TGJP = loadings_TGJP / sizes_P
    scores_GN = panel.y.flatten().expand(len(bends_G), -1)
    mean_GP = torch.linalg.lstsq(scaled_TGJP.transpose(0, 1).flatten(1, 2), scores_GN[..., None]).solution
    rest_TGJ = panel.y[:, None] - torch.einsum("tgjp,gp->tgj", scaled_TGJP, mean_GP[..., 0])
    factors = len(sizes_P)
    ridge_PP = 1e-3 * torch.eye(factors, dtype=torch.float64)
    normal_TGPP = scaled_TGJP.mT @ scaled_TGJP + ridge_PP
    own_TGP1 = torch.linalg.solve(normal_TGPP, scaled_TGJP.mT @ rest_TGJ[..., None])
    square_TG = (rest_TGJ[..., None] - scaled_TGJP @ own_TGP1).square().sum((-2, -1))
    best_T = square_TG.argmin(1)
    rows_T = torch.arange(len(panel))
    factors_TP = ((mean_GP + own_TGP1)[..., 0] / sizes_P)[rows_T, best_T]
    freedom_T = panel.seen.sum(1) - factors - (1 if curve.bend else 0)
    if not bool((freedom_T > 0).any()):
        raise ValueError(
            f"nobody has more than {int(panel.seen.sum(1).max())} scores; this curve needs persons with at "
            f"least {factors + 2 if curve.bend else factors + 1}"
        )
    variance_T = square_TG[rows_T, best_T][freedom_T > 0] / freedom_T[freedom_T > 0]
    if float(variance_T.median()) <= 0:
        raise ValueError("half of the persons lie on the curve exactly; there is no residual to estimate")
    return PersonFactors(factors_TP.numpy(), bends_G[best_T].numpy(), float(variance_T.median()))


def start_from(
    model: GrowthMixture, panel: Panel, found: PersonFactors, labels_T: npt.NDArray[np.int64]
) -> None:
    """Moves a model to clusters of persons, in place: their means, then one M-step at softened labels."""
    root = model.factor_root
    row, column = torch.tril_indices(found.factors.shape[1], found.factors.shape[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        root[:, row == column] = np.log(0.7)  # part of the persons' spread is their residuals'
        model.log_variance.fill_(np.log(found.variance))
        for k in range(model.num_classes):
            own_T = labels_T == k
            if not own_T.any():  # k-means may leave a cluster empty; everybody's mean is as good a start
                own_T = np.ones_like(own_T)
            model.coefficients[k, :, 0] = torch.from_numpy(found.factors[own_T].mean(0)) / model.scale_P
            if model.bend is not None:
                share = (float(np.median(found.bend[own_T])) - model.bounds[0]) / model.bounds.diff()[0]
                model.bend[k] = torch.logit(share)
    hard_TK = torch.nn.functional.one_hot(torch.from_numpy(labels_T), model.num_classes).double()
    m_step(model, panel, 0.9 * hard_TK + 0.1 / model.num_classes, iterations=15)


def cluster(
    points_TF: _Array, num_classes: int, rng: np.random.Generator, *, jitter: float
) -> npt.NDArray[np.int64]:
    """k-means labels [T] of points that were standardised and moved by `jitter` standard deviations.

    >>> points = np.array([[0.0], [0.1], [9.0], [9.1]])
    >>> labels = cluster(points, 2, np.random.default_rng(0), jitter=0.0)
    >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
    True
    """
    from scipy.cluster.vq import kmeans2

    if num_classes == 1:
        return np.zeros(len(points_TF), dtype=np.int64)
    spread_F = points_TF.std(0)
    standard_TF = (points_TF - points_TF.mean(0)) / np.where(spread_F > 0, spread_F, 1)
    standard_TF = standard_TF + jitter * rng.standard_normal(standard_TF.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cluster that stays empty; `start_from` makes do without it
        labels_T = kmeans2(standard_TF, num_classes, minit="++", seed=rng)[1]
    return np.asarray(labels_T, dtype=np.int64)
