"""Group fairness: gaps between groups of decisions, and the same as differentiable penalties.

A gap is the largest less the smallest value over groups; with two groups the absolute difference. A group (or
a group's rows of one label) without rows has no value and is left out; with fewer than two values the gap is
NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Fairness = Literal["dp", "eo", "burden"]
GroupGap = Literal["range", "variance"]


def demographic_parity_gap(yhat: ArrayLike, sensitive: ArrayLike) -> float:
    """How much the rate of positive decisions differs between groups.

    Args:
        yhat: [n] decisions, 1 for positive and 0 for negative.
        sensitive: [n] the group of each row.

    Raises ValueError for lengths that differ or decisions other than 0 and 1.

    >>> demographic_parity_gap([1, 1, 1, 0], ["a", "a", "b", "b"])
    0.5
    """
    yhat, sensitive = _rows(yhat=yhat, sensitive=sensitive)
    return _gap(_means(yhat, sensitive))


def equalized_odds_gap(y: ArrayLike, yhat: ArrayLike, sensitive: ArrayLike) -> float:
    """The larger of two differences between groups: of true positive rates, and of false positive rates.

    Args:
        y: [n] labels, 1 or 0.
        yhat: [n] decisions, 1 or 0.
        sensitive: [n] the group of each row.

    Raises ValueError for lengths that differ, or labels or decisions other than 0 and 1.

    Source: Hardt et al. 2016.

    >>> equalized_odds_gap([1, 0, 1, 0], [1, 1, 1, 0], ["a", "a", "b", "b"])
    1.0
    """
    y, yhat, sensitive = _rows(y=y, yhat=yhat, sensitive=sensitive)
    gaps = [_gap(_means(yhat[y == label], sensitive[y == label])) for label in (0, 1)]
    known = [gap for gap in gaps if not np.isnan(gap)]
    return max(known) if known else float("nan")


def burden_gap(yhat: ArrayLike, distance: ArrayLike, sensitive: ArrayLike) -> float:
    """How much the mean distance to a positive decision differs between the rejected of each group.

    Args:
        yhat: [n] decisions, 1 for the favourable one.
        distance: [n] how far each row is from it, such as `FEAMOEClassifier.recourse_distance`.
        sensitive: [n] the group of each row.

    Raises ValueError for lengths that differ or decisions other than 0 and 1.

    Source: Sharma et al. 2020 (CERTIFAI), burden.

    >>> burden_gap([0, 0, 1, 0], [2.0, 4.0, 0.0, 1.0], ["a", "a", "b", "b"])
    2.0
    """
    yhat, sensitive = _rows(yhat=yhat, sensitive=sensitive)
    distance = np.asarray(distance, dtype=float)
    if distance.shape != yhat.shape:
        raise ValueError(f"distance has shape {distance.shape}; should be {yhat.shape}, one per decision")
    return _gap(_means(distance[yhat == 0], sensitive[yhat == 0]))


def fairness_report(
    y: ArrayLike,
    yhat: ArrayLike,
    sensitive: ArrayLike,
    scores: ArrayLike | None = None,
    distance: ArrayLike | None = None,
) -> dict[str, float]:
    """Accuracy and gaps of binary decisions.

    Args:
        y: [n] labels, 1 or 0.
        yhat: [n] decisions, 1 for the favourable one.
        sensitive: [n] the group of each row.
        scores: [n] the larger, the more favourable; then there is an "auc" (NaN where y is constant).
        distance: [n] of `burden_gap`; then there is a "burden gap".

    Raises ValueError as the gaps do.

    >>> fairness_report([1, 0, 1, 0], [1, 1, 1, 0], ["a", "a", "b", "b"], scores=[0.9, 0.6, 0.8, 0.1])
    {'accuracy': 0.75, 'dp gap': 0.5, 'eo gap': 1.0, 'auc': 1.0}
    """
    labels, decisions = _rows(y=y, yhat=yhat)
    report = {
        "accuracy": float((labels == decisions).mean()),
        "dp gap": demographic_parity_gap(decisions, sensitive),
        "eo gap": equalized_odds_gap(labels, decisions, sensitive),
    }
    if scores is not None:
        report["auc"] = _auc(labels, np.asarray(scores, dtype=float))
    if distance is not None:
        report["burden gap"] = burden_gap(decisions, distance, sensitive)
    return report


def penalty(kind: Fairness, p_T: Tensor, y_T: Tensor, group_T: Tensor, how: GroupGap = "range") -> Tensor:
    """A gap of probabilities that gradient descent can close.

    "dp" compares mean probabilities between groups; "eo" the same among rows of one label, summed over both
    labels; "burden" the mean of relu(0.5 - p), a stand-in for the distance that the rejected have to go. The
    gradient goes through every group's mean. Terms that no two groups have rows for are 0.

    Args:
        kind: "dp", "eo" or "burden".
        p_T: [T] probability of the favourable decision.
        y_T: [T] label, 1 or 0.
        group_T: [T] int64 group of each row; -1 for rows that are left out.
        how: "range" for the largest less the smallest group mean, "variance" for the sum of squared
            deviations from the mean over all rows.

    >>> p, group = torch.tensor([0.9, 0.7, 0.3]), torch.tensor([0, 0, 1])
    >>> round(float(penalty("dp", p, torch.ones(3), group)), 4)
    0.5
    """
    if kind == "dp":
        return _spread(p_T, group_T, how)
    if kind == "burden":
        return _spread((0.5 - p_T).relu(), group_T, how)
    return torch.stack([_spread(p_T, group_T.masked_fill(y_T != label, -1), how) for label in (0, 1)]).sum()


def _spread(value_T: Tensor, group_T: Tensor, how: GroupGap) -> Tensor:
    groups, member_T = torch.unique(group_T[group_T >= 0], return_inverse=True)
    if len(groups) < 2:
        return value_T.sum() * 0
    value_T = value_T[group_T >= 0]
    sums_G = value_T.new_zeros(len(groups)).index_add(0, member_T, value_T)
    means_G: Tensor = sums_G / member_T.bincount()
    spread: Tensor = means_G.max() - means_G.min()
    if how == "variance":
        spread = (means_G - value_T.mean()).square().sum()
    return spread


def _rows(**columns: ArrayLike) -> Sequence[NDArray[Any]]:
    """The columns as arrays [n]; all but `sensitive` as 0 and 1."""
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"shapes {shapes}; should be one value per row in each")
    for name, array in arrays.items():
        if name != "sensitive" and not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name} holds {np.unique(array)[:5].tolist()}; should be 0 and 1")
    return [array if name == "sensitive" else array.astype(int) for name, array in arrays.items()]


def _means(values: NDArray[Any], sensitive: NDArray[Any]) -> list[float]:
    return [float(values[sensitive == group].mean()) for group in np.unique(sensitive)]


def _gap(means: Sequence[float]) -> float:
    return max(means) - min(means) if len(means) > 1 else float("nan")


def _auc(y: NDArray[Any], scores: NDArray[Any]) -> float:
    from scipy.stats import rankdata

    positive = int(y.sum())
    if not 0 < positive < len(y):
        return float("nan")
    rank_sum = rankdata(scores)[y == 1].sum()
    return float((rank_sum - positive * (positive + 1) / 2) / (positive * (len(y) - positive)))


METRICS: dict[Fairness, Callable[..., float]] = {
    "dp": lambda y, yhat, distance, sensitive: demographic_parity_gap(yhat, sensitive),
    "eo": lambda y, yhat, distance, sensitive: equalized_odds_gap(y, yhat, sensitive),
    "burden": lambda y, yhat, distance, sensitive: burden_gap(yhat, distance, sensitive),
}
