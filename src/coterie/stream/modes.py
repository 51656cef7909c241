"""The two modes of DriftMoE: which experts there are, what they learn, who answers, what the router is told.

Shapes: E experts, C classes; in mode "task" E = C, and each expert tells its class (1) from the others (0).
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from coterie.stream.experts import RiverExperts
from coterie.stream.hoeffding import HoeffdingTrees

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class DataMode:
    """Experts of all classes: those that the router ranks highest learn a row, and the first one answers.

    Args:
        n_experts: E.
        top_k: experts that learn a row.
        mask: the router's target: "multi_hot" or "best", see `DriftMoEClassifier`.

    >>> mode = DataMode(3, 2, "multi_hot")
    >>> mode.lesson(np.float32([0.1, 0.9, 0.5]), label=4)
    ([1, 2], array([4, 4, 4]))
    """

    router_batch = 32

    def __init__(self, n_experts: int, top_k: int, mask: Literal["multi_hot", "best"]) -> None:
        self.n_experts, self.top_k, self.mask = n_experts, top_k, mask

    def sizes(self, classes: int) -> tuple[int, int]:
        """How many experts, and classes of each."""
        return self.n_experts, classes

    def lesson(self, logits_E: Singles, label: int) -> tuple[list[int], npt.NDArray[np.int64]]:
        """Which experts learn a row, and its class for each of all."""
        return np.argsort(-logits_E, kind="stable")[: self.top_k].tolist(), np.full(len(logits_E), label)

    def first(self, logits_E: Singles, proba_EC: Floats) -> int:
        """The expert that answers."""
        return int(logits_E.argmax())

    def proba(
        self, logits_E: Singles, experts: HoeffdingTrees | RiverExperts, row_D: Floats, x: Mapping[Any, Any]
    ) -> Floats:
        """The answer: probabilities [C]."""
        proba_C: Floats = experts.judge_rows([int(logits_E.argmax())], row_D[None], [x])[0]
        return proba_C

    def target(self, right_E: Bools, proba_EC: Floats, label: int) -> Bools:
        """What the router is told, always at least one expert: the right ones, or the least wrong one."""
        if self.mask == "multi_hot" and right_E.any():
            return right_E
        return _only(int(proba_EC[:, label].argmax()), len(right_E))


class TaskMode:
    """An expert per class. All learn every row; the router learns the class, and answers alone or with them.

    Args:
        predict: "router" or "product", see `DriftMoEClassifier`.

    >>> TaskMode("router").lesson(np.float32([0.1, 0.9, 0.5]), label=2)
    ([0, 1, 2], array([0, 0, 1]))
    """

    router_batch = 1

    def __init__(self, predict: Literal["router", "product"]) -> None:
        self.predict = predict

    def sizes(self, classes: int) -> tuple[int, int]:
        return classes, 2

    def lesson(self, logits_E: Singles, label: int) -> tuple[list[int], npt.NDArray[np.int64]]:
        return list(range(len(logits_E))), _only(label, len(logits_E)).astype(np.int64)

    def first(self, logits_E: Singles, proba_EC: Floats) -> int:
        if self.predict == "router":
            return int(logits_E.argmax())
        return int((expit(logits_E.astype(np.float64)) * proba_EC[:, 1]).argmax())

    def proba(
        self, logits_E: Singles, experts: HoeffdingTrees | RiverExperts, row_D: Floats, x: Mapping[Any, Any]
    ) -> Floats:
        score_C: Floats = expit(logits_E.astype(np.float64))
        if self.predict == "product":
            score_C = score_C * experts.judge(row_D, x)[0][:, 1]
        total = score_C.sum()
        return score_C / total if total > 0 else np.full(len(score_C), 1 / len(score_C))

    def target(self, right_E: Bools, proba_EC: Floats, label: int) -> Bools:
        return _only(label, len(right_E))


def _only(one: int, size: int) -> Bools:
    only_E: Bools = np.arange(size) == one
    return only_E
