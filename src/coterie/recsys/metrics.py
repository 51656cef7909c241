"""Losses and figures of rankers: masked cross-entropy, AUC, AUC within a user, NDCG."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F


def masked_bce(logits_TK: Tensor, labels_TK: Tensor) -> Tensor:
    """Binary cross-entropy, summed over tasks; each task's is a mean over the rows that have its label.

    Args:
        logits_TK: [rows, tasks].
        labels_TK: 0, 1, or NaN where a task has no label.

    >>> import torch
    >>> nan = float("nan")
    >>> masked_bce(torch.zeros(2, 2), torch.tensor([[1.0, nan], [0.0, nan]])).item()
    0.693...
    """
    known = ~labels_TK.isnan()
    each = F.binary_cross_entropy_with_logits(logits_TK, labels_TK.nan_to_num(), reduction="none")
    return ((each * known).sum(0) / known.sum(0).clamp(min=1)).sum()


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN labels are left out.

    NaN, with a warning, where there is only one class.

    >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    y, s = _known(labels, scores)
    positives = int(y.sum())
    if positives in (0, len(y)):
        warnings.warn(f"AUC of {len(y)} labels of one class is not defined", RuntimeWarning, stacklevel=2)
        return float("nan")
    ranks = rankdata(s)[y].sum() - positives * (positives + 1) / 2
    return float(ranks / (positives * (len(y) - positives)))


def gauc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> tuple[float, int]:
    """AUC within each user, averaged with the user's rows as weights, and how many users it leaves out.

    Users whose labels are all alike have no AUC. NaN, with a warning, where none has one.

    Args:
        labels: 0, 1, or NaN for rows to leave out.
        scores: any order-preserving prediction.
        groups: the user of each row.

    Source: Zhu et al. 2017 (GAUC).

    >>> gauc([0, 1, 1, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.9], ["a", "a", "b", "b", "c"])
    (0.5, 1)
    """
    y, s, users = _known(labels, scores, groups)
    _, user, rows = np.unique(users, return_inverse=True, return_counts=True)
    # ranks within users: each user's scores are moved above the ones before
    order = rankdata(s, method="dense")
    ranks = rankdata(user * (order.max(initial=0) + 1) + order) - (np.cumsum(rows) - rows)[user]
    positives = np.bincount(user[y], minlength=len(rows)).astype(float)
    pairs = positives * (rows - positives)
    above = np.bincount(user[y], ranks[y], minlength=len(rows)) - positives * (positives + 1) / 2
    has = pairs > 0
    if not has.any():
        warnings.warn(f"no user of {len(rows)} has labels of both classes", RuntimeWarning, stacklevel=2)
        return float("nan"), len(rows)
    return float(np.average(above[has] / pairs[has], weights=rows[has])), int((~has).sum())


def ndcg(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int = 10) -> float:
    """Mean NDCG@k over users (or requests) with a positive; ties are broken by row order.

    >>> ndcg([1, 0, 0, 1], [0.9, 0.1, 0.8, 0.2], ["a", "a", "b", "b"], k=2)
    0.815...
    """
    y, s, users = _known(labels, scores, groups)
    _, user, rows = np.unique(users, return_inverse=True, return_counts=True)
    first = np.cumsum(rows) - rows
    place = np.arange(len(y)) - np.repeat(first, rows)
    order = np.lexsort((-s, user))
    discount = np.where(place < k, 1 / np.log2(place + 2), 0)
    gain = np.bincount(user[order], y[order] * discount, minlength=len(rows))
    positives = np.bincount(user[y], minlength=len(rows))
    best = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(k) + 2))])[np.minimum(positives, k)]
    return float(np.mean(gain[positives > 0] / best[positives > 0])) if positives.any() else float("nan")


def _known(labels: ArrayLike, *others: ArrayLike) -> list[npt.NDArray[Any]]:
    y = np.asarray(labels, dtype=float)
    columns = [np.asarray(other) for other in others]
    if any(len(column) != len(y) for column in columns):
        raise ValueError(f"{len(y)} labels for {[len(column) for column in columns]} rows; should be as many")
    known = ~np.isnan(y)
    wrong = known & (y != 0) & (y != 1)
    if wrong.any():
        raise ValueError(f"label {y[wrong][0]:g} in row {int(wrong.argmax())}; should be 0, 1 or NaN")
    return [y[known] == 1, *(column[known] for column in columns)]
