"""Persons from a known mixture of growth curves: to try an analysis on, and to plan a study's size."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.data import import_pandas

if TYPE_CHECKING:
    import pandas as pd

# of the two classes: mean (intercept, slope 1, slope 2), knot, effects of ex1 and ex2 on the growth factors
MEANS = np.array([[100.0, -5.0, -2.6], [100.0, -5.0, -3.4]])
KNOTS = np.array([3.5, 5.5])
EFFECTS = np.array(
    [
        [[0.8849, 1.3274], [0.1770, 0.2655], [0.1770, 0.2655]],
        [[1.2515, 1.8773], [0.2503, 0.3755], [0.2503, 0.3755]],
    ]
)
FACTOR_COVARIANCE = np.array([[25.0, 1.5, 1.5], [1.5, 1.0, 0.3], [1.5, 0.3, 1.0]])
COVARIATE_COVARIANCE = np.array([[1.0, 0.3], [0.3, 1.0]])
LOG_ODDS = np.log([1.5, 1.7])
RESIDUAL_VARIANCE = 1.0


def simulate_trajectories(num_persons: int = 500, *, occasions: int = 10, seed: int = 0) -> "pd.DataFrame":
    """The paper's simulated study as a wide table: two classes of bilinear growth, covariates in both roles.

    Persons are measured at about 0, 1, … occasions - 1. gx1 and gx2 multiply the odds of class 2 by 1.5 and
    1.7; ex1 and ex2 explain 13% (class 1) and 26% (class 2) of the growth factors' variance. Knots: 3.5, 5.5.

    Args:
        num_persons: T.
        occasions: J ≥ 8, so that both knots lie inside.
        seed: of numpy's default generator.

    Returns columns id, Y1 … YJ, T1 … TJ, gx1, gx2, ex1, ex2, class (1 or 2).

    Source: Liu & Perera 2022, demonstration data BLS_dat2; the constants of this module.

    >>> simulate_trajectories(3).columns[[0, 1, -1]].tolist()
    ['id', 'Y1', 'class']
    """
    if occasions < 8:
        raise ValueError(f"occasions={occasions}; give at least 8, the later knot is at 5.5")
    rng = np.random.default_rng(seed)
    gate_TD = rng.standard_normal((num_persons, 2))
    experts_TC = rng.multivariate_normal(np.zeros(2), COVARIATE_COVARIANCE, num_persons)
    class_T = (rng.random(num_persons) < 1 / (1 + np.exp(-gate_TD @ LOG_ODDS))).astype(int)
    factors_TP = MEANS[class_T] + np.einsum("tpc,tc->tp", EFFECTS[class_T], experts_TC)
    for k, covariance_PP in enumerate(unexplained_covariance()):
        own_T = class_T == k
        factors_TP[own_T] += rng.multivariate_normal(np.zeros(3), covariance_PP, int(own_T.sum()))
    t_TJ = np.tile(np.arange(occasions, dtype=float), (num_persons, 1))
    t_TJ[:, 1:-1] += rng.uniform(-0.25, 0.25, (num_persons, occasions - 2))
    after_TJ = np.maximum(t_TJ - KNOTS[class_T][:, None], 0)
    y_TJ = factors_TP[:, :1] + factors_TP[:, 1:2] * (t_TJ - after_TJ) + factors_TP[:, 2:] * after_TJ
    y_TJ += rng.normal(0, RESIDUAL_VARIANCE**0.5, y_TJ.shape)
    columns: dict[str, Any] = {"id": np.arange(1, num_persons + 1)}
    columns |= {f"Y{j + 1}": y_TJ[:, j] for j in range(occasions)}
    columns |= {f"T{j + 1}": t_TJ[:, j] for j in range(occasions)}
    columns |= {"gx1": gate_TD[:, 0], "gx2": gate_TD[:, 1], "ex1": experts_TC[:, 0], "ex2": experts_TC[:, 1]}
    return import_pandas().DataFrame(columns | {"class": class_T + 1})


def unexplained_covariance() -> npt.NDArray[np.float64]:
    """[2, 3, 3] covariance of the growth factors that the covariates leave: Ψ = total - B Φ B'."""
    explained: npt.NDArray[np.float64] = EFFECTS @ COVARIATE_COVARIANCE @ EFFECTS.transpose(0, 2, 1)
    return FACTOR_COVARIANCE - explained
