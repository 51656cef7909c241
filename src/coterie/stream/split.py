"""Where a leaf of a Hoeffding tree splits."""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy.special import erf

from coterie.stream.gaussians import COUNT, HIGH, LOW, MEAN, SQUARES, Floats

FORGET: Final = "forget"

# river's defaults
_CANDIDATES = 10
_TIE = 0.05  # a bound below it forces the best split
_SMALLEST_BRANCH = 0.01  # share of the weight
_LARGEST_CLASS = 0.99


@dataclass(frozen=True)
class Split:
    """At most `threshold` in `feature` goes left; the classes' weights on both sides."""

    feature: int
    threshold: float
    left: dict[int, float]
    right: dict[int, float]


def find_split(
    gaussians_PDC: Floats, weights: dict[int, float], known: list[int], delta: float
) -> Split | Literal["forget"] | None:
    """The split of largest information gain, if it leads the second by the Hoeffding bound.

    Args:
        gaussians_PDC: the leaf's planes [8, D, C], see `coterie.stream.gaussians`.
        weights: of its classes.
        known: classes that its Gaussians have seen, in the order they came.
        delta: probability of a wrong split.

    Returns: the split; None to wait; "forget" where river drops the leaf's Gaussians and begins anew: one
    class has nearly all the weight, or no split divides the rows.
    """
    total, positive = sum(weights.values()), [w for w in weights.values() if w != 0]
    if len(positive) < 2:
        return None
    if max(positive) / total > _LARGEST_CLASS:
        return FORGET
    thresholds_DT, left_DTC = _candidates(gaussians_PDC)
    count_DC = gaussians_PDC[COUNT]
    gain_DT = _entropy(np.array(positive)) - _entropy_of_sides(left_DTC, count_DC[:, None] - left_DTC)
    gain_DT[np.isnan(thresholds_DT)] = -math.inf
    best_D = gain_DT.argmax(1)
    gain_D = gain_DT[np.arange(len(best_D)), best_D]
    order = np.argsort(gain_D, kind="stable")
    first = int(order[-1])
    second_gain = gain_D[order[-2]] if len(order) > 1 else -math.inf
    bits = math.log2(max(len(weights), 2))
    bound = math.sqrt(bits * bits * math.log(1 / delta) / (2 * total))
    leads = gain_D[first] > -math.inf and gain_D[first] - second_gain > bound
    if not leads and bound >= _TIE:
        return None
    if gain_D[first] == -math.inf:
        return FORGET
    left, right = {}, {}
    threshold = float(thresholds_DT[first, best_D[first]])
    for y in known:
        count, low, high = (float(gaussians_PDC[plane, first, y]) for plane in (COUNT, LOW, HIGH))
        if count == 0:
            continue
        if threshold < low:
            right[y] = count
        elif threshold >= high:
            left[y] = count
        else:
            left[y] = float(left_DTC[first, best_D[first], y])
            right[y] = count - left[y]
    return Split(first, threshold, left, right)


def _candidates(gaussians_PDC: Floats) -> tuple[Floats, Floats]:
    """Ten thresholds per feature, NaN outside its range, and each class's weight below them."""
    mean_DC, count_DC, squares_DC, low_DC, high_DC = gaussians_PDC[[MEAN, COUNT, SQUARES, LOW, HIGH]]
    low_D1, high_D1 = low_DC.min(1, keepdims=True), high_DC.max(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        step_D1 = (high_D1 - low_D1) / (_CANDIDATES + 1.0)
        thresholds_DT = low_D1 + step_D1 * np.arange(1, _CANDIDATES + 1)
        inside = (low_D1 < thresholds_DT) & (thresholds_DT < high_D1)
        thresholds_DT = np.where(inside, thresholds_DT, np.nan)
        deviation_DC = np.sqrt(squares_DC / (count_DC - 1.0))
        at_DTC = thresholds_DT[:, :, None]
        share_DTC = 0.5 * (1.0 + erf((at_DTC - mean_DC[:, None]) / deviation_DC[:, None] / math.sqrt(2.0)))
    left_DTC = np.where(at_DTC >= high_DC[:, None], count_DC[:, None], share_DTC * count_DC[:, None])
    return thresholds_DT, np.where((at_DTC < low_DC[:, None]) | (count_DC[:, None] == 0), 0.0, left_DTC)


def _entropy_of_sides(left_DTC: Floats, right_DTC: Floats) -> Floats:
    """Mean entropy after the split, in bits, [D, T]; infinite where a side is too small."""
    left_DT, right_DT = left_DTC.sum(2), right_DTC.sum(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_DT = (left_DT * _entropy(left_DTC) + right_DT * _entropy(right_DTC)) / (left_DT + right_DT)
        small = np.minimum(left_DT, right_DT) / (left_DT + right_DT) <= _SMALLEST_BRANCH
    return np.where(small, math.inf, mean_DT)


def _entropy(weights: Floats) -> Floats:
    """Over the last axis, in bits."""
    total = weights.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        terms = np.where(weights > 0, weights * np.log2(weights), 0.0)
        entropy = (total * np.log2(total) - terms.sum(-1)) / total
    return np.where(total > 0, entropy, 0.0)
