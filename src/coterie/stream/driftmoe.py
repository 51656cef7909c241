"""DriftMoE: incremental trees under a router that learns online which of them are right.

Shapes: E experts, C classes, D features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from river import base

from coterie.stream.columns import StreamColumns, rows_of
from coterie.stream.experts import RiverExperts
from coterie.stream.hoeffding import HoeffdingTrees
from coterie.stream.labels import StreamLabels
from coterie.stream.modes import DataMode, TaskMode
from coterie.stream.router import OnlineRouter
from coterie.stream.saving import load, save
from coterie.stream.settings import check_settings

if TYPE_CHECKING:
    import pandas as pd

Label = Any  # bool, int or str


class DriftMoEClassifier(base.Classifier):
    """Online mixture of Hoeffding trees with a co-trained neural router, for streams that drift.

    There is no drift detector: the router moves rows to other experts, and only those that it ranks highest
    learn, so that they come to differ. Two modes:

    - "data": `n_experts` trees of all classes. A row is answered by the one tree that the router ranks first.
      Once its label is known, the `top_k` trees ranked highest learn it, and the router learns which trees
      were right about it, all of them, before any had learnt it.
    - "task": one tree per class, which learns every row as its class or not. The router learns the class.

    It is a river classifier (`learn_one`, `predict_one`, `predict_proba_one`), and takes arrays and frames as
    scikit-learn's do (`partial_fit`, `predict`, `predict_proba`). Categories are one 0/1 column per value
    seen. A feature that is absent is skipped by the trees and is the mean for the router.

    Args:
        n_experts: E, in mode "data".
        top_k: experts that learn a row, 1 ≤ top_k ≤ n_experts. All of them become one tree.
        mode: "data" or "task".
        mask: the router's target in mode "data": "multi_hot", every expert that was right, and the least
            wrong one if none was; or "best", only the expert with the highest probability of the label.
        task_predict: in mode "task", "router" answers with the router's first class, as the authors' code
            does; "product" multiplies its score with the probability from the class's tree.
        hidden: widths of the router's hidden layers.
        lr: Adam's, of the router.
        router_batch: rows of one router step; None for 32 in mode "data", 1 in mode "task". The paper's 256
            begin slowly on short streams.
        dropout: in the router's steps.
        grace_period: rows that a leaf learns between two attempts to split.
        delta: probability of a wrong split.
        max_leaves: of each tree, which grows no further then; None for any number.
        expert: a river classifier to have copies of, in place of the Hoeffding trees. Slower, sees
            categories as they are, and is saved as a pickle.
        scale: standardise what the router sees, online.
        classes: the labels, where they are known; None to take them as they come.
        grow_classes: add a label outside `classes` instead of refusing it.
        impute: take NaN for an absent feature instead of refusing it.
        seed: of the router's initial weights; the same seed gives the same predictions.

    After the first row: `router_`, `experts_`, `classes_`; `usage_`, share of learnt rows that each expert
    answered; `expert_accuracy_`, share of learnt rows that each was right about beforehand.

    Raises ValueError: sizes out of range, fewer than two classes, an unknown label, NaN or infinity (row and
    feature). Warns in mode "task" when a class has under 5% of the rows: it tends to be ignored.

    Source: DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts, arXiv 2507.18464.

    >>> from river.datasets.synth import SEA
    >>> model = DriftMoEClassifier(n_experts=4, top_k=2, hidden=(16,), seed=0)
    >>> right = 0
    >>> for x, y in SEA(seed=1).take(1000):
    ...     right += model.predict_one(x) == y
    ...     model.learn_one(x, y)
    >>> right > 850, model.usage_.shape
    (True, (4,))
    """

    def __init__(
        self,
        n_experts: int = 12,
        top_k: int = 3,
        mode: Literal["data", "task"] = "data",
        mask: Literal["multi_hot", "best"] = "multi_hot",
        task_predict: Literal["router", "product"] = "router",
        hidden: Sequence[int] = (256, 128),
        lr: float = 2e-3,
        router_batch: int | None = None,
        dropout: float = 0.0,
        grace_period: int = 50,
        delta: float = 1e-7,
        max_leaves: int | None = None,
        expert: base.Classifier | None = None,
        scale: bool = True,
        classes: tuple[Any, ...] | None = None,
        grow_classes: bool = False,
        impute: bool = False,
        seed: int | None = None,
    ) -> None:
        self.n_experts, self.top_k, self.mode, self.mask = n_experts, top_k, mode, mask
        self.task_predict, self.hidden, self.lr, self.router_batch = task_predict, hidden, lr, router_batch
        self.dropout, self.grace_period, self.delta = dropout, grace_period, delta
        self.max_leaves, self.expert, self.scale, self.classes = max_leaves, expert, scale, classes
        self.grow_classes, self.impute, self.seed = grow_classes, impute, seed
        check_settings(self)
        self.rows_seen_ = 0
        self.experts_: HoeffdingTrees | RiverExperts | None = None
        self.router_: OnlineRouter | None = None
        self._labels, self._columns = StreamLabels(classes, grow=grow_classes), StreamColumns(impute=impute)
        self._mode = DataMode(n_experts, top_k, mask) if mode == "data" else TaskMode(task_predict)
        self._rng = np.random.default_rng(seed)
        self._answered_E = self._right_E = np.zeros(0, dtype=np.int64)
        self._features: list[Any] | None = None  # of tables
        self._last: tuple[dict[Any, Any], npt.NDArray[np.float64], npt.NDArray[np.float32]] | None = None

    def learn_one(self, x: Mapping[Any, Any], y: Label) -> None:
        """Learns one row: which experts were right about it, then the row itself.

        With delayed labels, call it with the row that the label belongs to.

        Args:
            x: feature → number, truth value, text, or None for absent.
            y: its label.
        """
        self._labels.check(y, self.rows_seen_)
        self._columns.learn(x, self.rows_seen_)
        label = self._labels.number(y)
        self._make_room()
        row_D, logits_E = self._judged(x)
        assert self.experts_ is not None
        assert self.router_ is not None
        judged: Any
        proba_EC, judged = self.experts_.judge(row_D, x)
        learning, labels_E = self._mode.lesson(logits_E, label)
        right_E = proba_EC.argmax(1) == labels_E
        self._answered_E[self._mode.first(logits_E, proba_EC)] += 1
        self._right_E += right_E
        self.experts_.teach(row_D, x, learning, labels_E[learning].tolist(), judged)
        self.rows_seen_ += 1
        if self.router_.learn(row_D, self._mode.target(right_E, proba_EC, label)):
            self._last = None
        if self.mode == "task":
            self._labels.warn_of_rare_ones(self.rows_seen_)

    def predict_one(self, x: Mapping[Any, Any], **kwargs: Any) -> Label | None:
        """The label; None before any label is known."""
        proba_C = self._proba(x)
        return self.classes_[int(proba_C.argmax())] if len(proba_C) else None

    def predict_proba_one(self, x: Mapping[Any, Any], **kwargs: Any) -> dict[Label, float]:
        """Label → probability; uniform before anything is learnt, empty before any label is known."""
        return dict(zip(self.classes_, self._proba(x).tolist(), strict=True))

    def partial_fit(
        self, X: "pd.DataFrame | npt.ArrayLike", y: npt.ArrayLike, classes: Sequence[Any] | None = None
    ) -> "DriftMoEClassifier":
        """Learns rows one after the other.

        Args:
            X: a frame, or an array [rows, features], whose features are then named 0, 1, …
            y: labels [rows].
            classes: all labels, with the first rows; None to take them as they come.

        Raises ValueError: other features than before (which row), lengths that differ, what `learn_one`
        raises.
        """
        if classes is not None:
            self._labels.fix(np.asarray(classes).tolist())
        rows, labels = self._rows(X), np.asarray(y).tolist()
        if len(rows) != len(labels):
            raise ValueError(f"{len(rows)} rows and {len(labels)} labels; should be as many")
        for x, label in zip(rows, labels, strict=True):
            self.learn_one(x, label)
        return self

    def predict(self, X: "pd.DataFrame | npt.ArrayLike") -> npt.NDArray[Any]:
        """Labels [rows], as `predict_one` gives them, the router judging all rows at once."""
        proba_NC = self.predict_proba(X)
        if not proba_NC.shape[1]:
            raise ValueError("no label is known yet; call partial_fit first, or give classes=")
        labels: npt.NDArray[Any] = np.array(self.classes_)[proba_NC.argmax(1)]
        return labels

    def predict_proba(self, X: "pd.DataFrame | npt.ArrayLike") -> npt.NDArray[np.float64]:
        """Probabilities [rows, classes], in the order of `classes_`."""
        rows = self._rows(X)
        if self.router_ is None or self.experts_ is None or self.mode == "task":
            return np.array([self._proba(x) for x in rows]).reshape(len(rows), len(self.classes_))
        x_ND = np.array([self._columns.vector(x, i) for i, x in enumerate(rows)])
        first_N = self.router_.logits(x_ND.reshape(len(rows), -1)).argmax(1).tolist()
        return self.experts_.judge_rows(first_N, x_ND, rows)

    def save(self, folder: str | Path) -> Path:
        """Writes everything learnt, so that a loaded model goes on as if there had been no break.

        JSON and safetensors, no pickle: river's trees have no such form, the trees used here do. Experts
        given by `expert` are written as a pickle among the tensors, which `load` opens only when told to.

        Raises ValueError when the folder holds something else.
        """
        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, *, trusted: bool = False) -> "DriftMoEClassifier":
        """What `save` wrote.

        Args:
            folder: of `save`.
            trusted: open the pickle of experts that were given by `expert`. A pickle can run any program:
                only for folders of your own.

        Raises ValueError: no such folder, or a pickle in it and not `trusted`.
        """
        return load(cls, folder, trusted=trusted)

    @property
    def classes_(self) -> list[Label]:
        return self._labels.known

    @property
    def usage_(self) -> npt.NDArray[np.float64]:
        return self._answered_E / max(self.rows_seen_, 1)

    @property
    def expert_accuracy_(self) -> npt.NDArray[np.float64]:
        return self._right_E / max(self.rows_seen_, 1)

    @property
    def _multiclass(self) -> bool:
        return True

    def _judged(self, x: Mapping[Any, Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        """The row and the router's logits for it; kept between predicting a row and learning it."""
        if self._last is not None and x == self._last[0] and len(self._last[1]) == len(self._columns):
            return self._last[1:]
        assert self.router_ is not None
        row_D = self._columns.vector(x, self.rows_seen_)
        logits_E = self.router_.logits(row_D)
        self._last = (dict(x), row_D, logits_E)
        return row_D, logits_E

    def _proba(self, x: Mapping[Any, Any]) -> npt.NDArray[np.float64]:
        if self.router_ is None or self.experts_ is None:
            return np.full(len(self.classes_), 1 / max(len(self.classes_), 1))
        row_D, logits_E = self._judged(x)
        return self._mode.proba(logits_E, self.experts_, row_D, x)

    def _make_room(self) -> None:
        """Makes everything large enough for the features and labels there are."""
        features, (experts, classes) = len(self._columns), self._mode.sizes(len(self.classes_))
        if self.router_ is None or self.experts_ is None:
            self.router_ = self._new_router(features, experts)
            self.experts_ = self._new_experts(experts, features, classes)
        if (self.router_.num_features, self.router_.num_experts) != (features, experts):
            self.router_.grow(features, experts)
            self._last = None
        while self.experts_.num_experts < experts:
            self.experts_.add_expert()
        if (self.experts_.num_features, self.experts_.num_classes) != (features, classes):
            self.experts_.grow(features, classes)
        if room := experts - len(self._answered_E):
            self._answered_E = np.pad(self._answered_E, (0, room))
            self._right_E = np.pad(self._right_E, (0, room))

    def _new_router(self, features: int, experts: int) -> OnlineRouter:
        return OnlineRouter(
            features,
            experts,
            tuple(self.hidden),
            lr=self.lr,
            batch=self.router_batch or self._mode.router_batch,
            dropout=self.dropout,
            scale=self.scale,
            rng=self._rng,
        )

    def _new_experts(self, experts: int, features: int, classes: int) -> HoeffdingTrees | RiverExperts:
        if self.expert is not None:
            return RiverExperts(self.expert, experts, features, classes)
        return HoeffdingTrees(
            experts,
            features,
            classes,
            grace_period=self.grace_period,
            delta=self.delta,
            max_leaves=self.max_leaves,
        )

    def _rows(self, X: "pd.DataFrame | npt.ArrayLike") -> list[dict[Any, Any]]:
        rows, self._features = rows_of(X, self._features, self.rows_seen_)
        return rows
