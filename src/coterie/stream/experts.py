"""Any river classifiers as experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from river import base

Floats = npt.NDArray[np.float64]


class RiverExperts:
    """Copies of a river classifier behind the interface of `HoeffdingTrees`.

    They see the row as it came, categories included. Labels are the numbers 0 to C-1.

    Args:
        expert: cloned `num_experts` times.
        num_experts: E.
        num_features: D.
        num_classes: C.

    >>> from river.naive_bayes import GaussianNB
    >>> experts = RiverExperts(GaussianNB(), num_experts=2, num_features=1, num_classes=3)
    >>> x, x_D = {"a": 1.0}, np.array([1.0])
    >>> experts.teach(x_D, x, [0], [2], None)
    >>> experts.judge(x_D, x)[0].round(2).tolist()
    [[0.0, 0.0, 1.0], [0.33, 0.33, 0.33]]
    """

    def __init__(
        self, expert: base.Classifier, num_experts: int, num_features: int, num_classes: int
    ) -> None:
        self.expert, self.num_features, self.num_classes = expert, num_features, num_classes
        self.models = [expert.clone() for _ in range(num_experts)]

    @property
    def num_experts(self) -> int:
        return len(self.models)

    def add_expert(self) -> None:
        """One more expert, which has seen nothing."""
        self.models.append(self.expert.clone())

    def grow(self, num_features: int, num_classes: int) -> None:
        """Makes room for classes that no expert has seen."""
        self.num_features, self.num_classes = num_features, num_classes

    def judge(self, x_D: Floats, x: Any) -> tuple[Floats, None]:
        """Probabilities [E, C] of all experts for a row."""
        return np.array([self._proba(expert, x) for expert in range(self.num_experts)]), None

    def judge_rows(self, experts: Sequence[int], x_ND: Floats, rows: Sequence[Any]) -> Floats:
        """Probabilities [N, C], each row by its expert."""
        judged = [self._proba(expert, x) for expert, x in zip(experts, rows, strict=True)]
        return np.array(judged).reshape(len(judged), self.num_classes)

    def teach(self, x_D: Floats, x: Any, experts: Sequence[int], labels: Sequence[int], judged: None) -> None:
        """Some experts learn a row."""
        for expert, y in zip(experts, labels, strict=True):
            self.models[expert].learn_one(x, y)

    def _proba(self, expert: int, x: Any) -> Floats:
        """Uniform before the expert has learnt anything."""
        given = self.models[expert].predict_proba_one(x)
        proba_C = np.array([given.get(y, 0.0) for y in range(self.num_classes)])
        return proba_C if proba_C.sum() > 0 else np.full(self.num_classes, 1 / self.num_classes)
