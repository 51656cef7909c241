"""Losses of one day's cross-section: scores and labels of the N instruments of a day, [N] each."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

MIN_NAMES = 5
"""A correlation over fewer names says nothing; such days are skipped."""

_EPS = 1e-8

DayLoss = Callable[[Tensor, Tensor], Tensor]


def information_coefficient(score_N: Tensor, label_N: Tensor) -> Tensor:
    """Pearson correlation of scores and labels within a day; 0 where either is constant.

    >>> import torch
    >>> day = torch.tensor([1.0, 2.0, 4.0])
    >>> round(float(information_coefficient(-3 * day, day)), 4)
    -1.0
    """
    score_N, label_N = score_N - score_N.mean(), label_N - label_N.mean()
    ic: Tensor = (score_N * label_N).sum() / (score_N.norm() * label_N.norm() + _EPS)
    return ic


def concordance(score_N: Tensor, label_N: Tensor) -> Tensor:
    """Concordance correlation (CCC): 1 only where scores equal labels, in scale too.

    Source: Lin 1989.
    """
    apart = score_N.mean() - label_N.mean()
    shared = ((score_N - score_N.mean()) * (label_N - label_N.mean())).mean()
    spread = score_N.var(correction=0) + label_N.var(correction=0) + apart.square()
    return 2 * shared / (spread + _EPS)


LOSSES: dict[str, DayLoss] = {
    "ic": lambda score_N, label_N: -information_coefficient(score_N, label_N),
    "ccc": lambda score_N, label_N: -concordance(score_N, label_N),
    "mse": F.mse_loss,
}


def standardised(label_N: Tensor) -> Tensor | None:
    """The day's labels with mean 0 and deviation 1; None where the day teaches nothing.

    That is a day of fewer than `MIN_NAMES` names, or of one and the same label.

    >>> import torch
    >>> standardised(torch.ones(6)) is None
    True
    """
    if len(label_N) < MIN_NAMES:
        return None
    centred_N = label_N - label_N.mean()
    deviation = centred_N.square().mean().sqrt()
    if float(deviation) <= _EPS * max(1.0, float(label_N.abs().max())):
        return None
    return centred_N / deviation
