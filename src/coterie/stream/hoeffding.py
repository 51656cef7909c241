"""Hoeffding trees whose leaves share arrays, so that all trees judge a row in one pass.

Shapes: E trees, S leaves of all trees together, D features, C classes. The leaves' Gaussians are one array
[S, 8, D, C], see `coterie.stream.gaussians`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.stream.gaussians import COUNT, EMPTY, Floats, add_row, log_likelihoods
from coterie.stream.split import FORGET, Split, find_split

Judged = tuple[list[int], Floats]  # each tree's leaf for a row, and the votes of naive Bayes there [E, C]


class HoeffdingTrees:
    """E incremental decision trees of C classes on D numeric features.

    Each is river's `HoeffdingTreeClassifier(grace_period=..., delta=...)`, with its other settings as they
    are there: information gain, Gaussian observers, naive Bayes in a leaf where it has been right more often
    than the majority. They make the same splits and predictions, many times faster, as long as river's trees
    stay below the 100 MiB at which those begin to forget. Missing values (NaN) are skipped by naive Bayes
    and go down the heavier branch.

    Args:
        num_experts: E.
        num_features: D.
        num_classes: C.
        grace_period: rows that a leaf learns between two attempts to split.
        delta: probability of a wrong split.
        max_leaves: of one tree, which then splits no further; None for any number.

    Source: Hulten, Spencer, Domingos, Mining time-changing data streams, KDD 2001; river 0.26.

    >>> trees = HoeffdingTrees(num_experts=2, num_features=1, num_classes=2)
    >>> for value in range(200):
    ...     x_D = np.array([value % 10.0])
    ...     _, judged = trees.judge(x_D)
    ...     trees.teach(x_D, None, [0], [int(value % 10 > 4)], judged)  # only the first tree
    >>> trees.judge(np.array([9.0]))[0].round(2).tolist()
    [[0.0, 1.0], [0.5, 0.5]]
    >>> trees.num_leaves
    [2, 1]
    """

    def __init__(
        self,
        num_experts: int,
        num_features: int,
        num_classes: int,
        *,
        grace_period: int = 50,
        delta: float = 1e-7,
        max_leaves: int | None = None,
    ) -> None:
        self.num_features, self.num_classes = num_features, num_classes
        self.grace_period, self.delta, self.max_leaves = grace_period, delta, max_leaves
        self.roots: list[int] = []
        # a node that splits: its feature, threshold and two children; a leaf: -1 - (its number)
        self.feature: list[int] = []
        self.threshold: list[float] = []
        self.left: list[int] = []
        self.right: list[int] = []
        # of a leaf: its node and tree, weight by class, classes its Gaussians know, rows each rule got right
        self.node: list[int] = []
        self.tree: list[int] = []
        self.weights: list[dict[int, float]] = []
        self.known: list[list[int]] = []
        self.majority_right: list[int] = []
        self.bayes_right: list[int] = []
        self.attempted_at: list[float] = []
        self.num_leaves: list[int] = []
        self.gaussians = np.empty((0, 8, num_features, num_classes))
        self.priors = np.empty((0, 2, num_classes))  # log of class shares: for naive Bayes, for the majority
        self.bayes = np.empty(0, dtype=bool)  # whether the leaf answers by naive Bayes
        for _ in range(num_experts):
            self.add_expert()

    @property
    def num_experts(self) -> int:
        return len(self.roots)

    def add_expert(self) -> None:
        """One more tree, which has seen nothing."""
        self.roots.append(len(self.feature))
        self.num_leaves.append(1)
        self._add_leaf(self._add_node(), self.num_experts - 1, {})

    def grow(self, num_features: int, num_classes: int) -> None:
        """Makes room for features and classes that no tree has seen."""
        leaves, _, features, classes = self.gaussians.shape
        gaussians = np.empty((leaves, 8, num_features, num_classes))
        gaussians[:] = EMPTY
        gaussians[:, :, :features, :classes] = self.gaussians
        self.gaussians, self.num_features, self.num_classes = gaussians, num_features, num_classes
        self.priors = np.zeros((leaves, 2, num_classes))
        for leaf in range(len(self.node)):
            self._set_prior(leaf)

    def judge(self, x_D: Floats, x: Any = None) -> tuple[Floats, Judged]:
        """Probabilities [E, C] of all trees for a row [D], and what `teach` needs to know of them.

        They are uniform where a leaf has no statistics. Trees read no row as it came, `x`.
        """
        leaves = self._leaves(x_D)
        proba_EC, votes_EC = self._predict(x_D, leaves)
        return proba_EC, (leaves, votes_EC)

    def judge_rows(self, trees: Sequence[int], x_ND: Floats, rows: Any) -> Floats:
        """Probabilities [N, C], each row by its tree."""
        proba_NC = np.empty((len(trees), self.num_classes))
        for at in range(0, len(trees), 256):  # leaves' Gaussians are copied
            some = slice(at, at + 256)
            leaves = [self._leaves(x_D, [tree])[0] for tree, x_D in zip(trees[some], x_ND[some], strict=True)]
            proba_NC[some] = self._predict(x_ND[some], leaves)[0]
        return proba_NC

    def teach(self, x_D: Floats, x: Any, trees: Sequence[int], labels: Sequence[int], judged: Judged) -> None:
        """Some trees learn a row.

        Args:
            x_D: [D].
            x: the row as it came, which trees do not read.
            trees: those that learn.
            labels: class of the row for each of them.
            judged: what `judge` said of the row, before any of them learnt it.
        """
        leaves, votes_EC = judged
        learning = [leaves[tree] for tree in trees]
        for tree, leaf, y in zip(trees, learning, labels, strict=True):
            weights = self.weights[leaf]
            if not weights or max(weights, key=weights.__getitem__) == y:
                self.majority_right[leaf] += 1
            if weights and max(weights, key=votes_EC[tree].tolist().__getitem__) == y:
                self.bayes_right[leaf] += 1
            weights[y] = weights.get(y, 0.0) + 1.0
            if y not in self.known[leaf]:
                self.known[leaf].append(y)
        missing_D = np.isnan(x_D) if np.isnan(x_D.sum()) else None
        block_KPD = self.gaussians[learning, :, :, labels]
        add_row(block_KPD, x_D, missing_D)
        self.gaussians[learning, :, :, labels] = block_KPD
        for leaf in learning:
            total = self._set_prior(leaf)
            self.bayes[leaf] = self.bayes_right[leaf] >= self.majority_right[leaf]
            if total - self.attempted_at[leaf] >= self.grace_period and (
                missing_D is None or not self._path_misses(leaf, missing_D)
            ):
                self.attempted_at[leaf] = total
                self._attempt_split(leaf)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All that was learnt."""
        leaves = len(self.node)
        weights = [(leaf, y, w) for leaf, each in enumerate(self.weights) for y, w in each.items()]
        known = [(leaf, y) for leaf, each in enumerate(self.known) for y in each]
        return {
            "roots": np.array(self.roots),
            "nodes": np.array([self.feature, self.left, self.right]),
            "thresholds": np.array(self.threshold),
            "leaves": np.array([self.node, self.tree, self.majority_right, self.bayes_right]),
            "attempted_at": np.array(self.attempted_at),
            "weights": np.array(weights, dtype=float).reshape(-1, 3),
            "known": np.array(known, dtype=int).reshape(-1, 2),
            "gaussians": self.gaussians[:leaves],
            "bayes": self.bayes[:leaves],
        }

    def set_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Takes over what `to_arrays` of trees with the same features and classes gave."""
        self.roots, self.threshold = arrays["roots"].tolist(), arrays["thresholds"].tolist()
        self.feature, self.left, self.right = arrays["nodes"].tolist()
        self.node, self.tree, self.majority_right, self.bayes_right = arrays["leaves"].tolist()
        self.attempted_at = arrays["attempted_at"].tolist()
        self.num_leaves = np.bincount(self.tree, minlength=len(self.roots)).tolist()
        self.gaussians, self.bayes = arrays["gaussians"], arrays["bayes"]
        self.weights, self.known = [{} for _ in self.node], [[] for _ in self.node]
        for leaf, y, weight in arrays["weights"].tolist():
            self.weights[int(leaf)][int(y)] = weight
        for leaf, y in arrays["known"].tolist():
            self.known[leaf].append(y)
        self.priors = np.zeros((len(self.node), 2, self.num_classes))
        for leaf in range(len(self.node)):
            self._set_prior(leaf)

    def _leaves(self, x_D: Floats, trees: Sequence[int] | None = None) -> list[int]:
        """The leaf of each tree that the row falls into, all trees unless some are given."""
        x, feature, threshold, left, right = x_D.tolist(), self.feature, self.threshold, self.left, self.right
        found = []
        for node in self.roots if trees is None else [self.roots[tree] for tree in trees]:
            while (f := feature[node]) >= 0:
                if x[f] <= threshold[node]:
                    node = left[node]
                elif x[f] != x[f]:  # missing
                    heavier = self._weight(left[node]) >= self._weight(right[node])
                    node = left[node] if heavier else right[node]
                else:
                    node = right[node]
            found.append(-1 - f)
        return found

    def _predict(self, x_D: Floats, leaves: Sequence[int]) -> tuple[Floats, Floats]:
        """Probabilities [N, C] and votes of naive Bayes [N, C], for one row at N leaves, or as many rows."""
        priors_NRC = self.priors[leaves]
        votes_NC = log_likelihoods(self.gaussians[leaves, :COUNT], x_D, priors_NRC[:, 0])
        chosen_NC = np.where(self.bayes[leaves][:, None], votes_NC, priors_NRC[:, 1])
        chosen_NC -= chosen_NC.max(1, keepdims=True)
        np.exp(chosen_NC, out=chosen_NC)
        chosen_NC /= chosen_NC.sum(1, keepdims=True)
        return chosen_NC, votes_NC

    def _attempt_split(self, leaf: int) -> None:
        tree = self.tree[leaf]
        if self.max_leaves is not None and self.num_leaves[tree] >= self.max_leaves:
            return
        split = find_split(self.gaussians[leaf], self.weights[leaf], self.known[leaf], self.delta)
        if split is FORGET:
            self.gaussians[leaf] = EMPTY
            self.known[leaf] = []
        elif isinstance(split, Split):
            node = self.node[leaf]
            self.feature[node], self.threshold[node] = split.feature, split.threshold
            self.left[node], self.right[node] = self._add_node(), self._add_node()
            self._set_leaf(leaf, self.left[node], tree, split.left)
            self._add_leaf(self.right[node], tree, split.right)
            self.num_leaves[tree] += 1

    def _set_prior(self, leaf: int) -> float:
        """Class shares from the leaf's weights, whose sum it returns."""
        weights = self.weights[leaf]
        total = sum(weights.values())
        if not total:
            self.priors[leaf] = 0.0
            return total
        prior_C = [-math.inf] * self.num_classes
        for y, weight in weights.items():
            prior_C[y] = math.log(weight / total) if weight > 0 else 0.0  # 0.0 is what river votes there
        self.priors[leaf] = prior_C
        if min(weights.values()) == 0.0:
            self.priors[leaf, 1, [y for y, weight in weights.items() if weight == 0.0]] = -math.inf
        return total

    def _path_misses(self, leaf: int, missing: npt.NDArray[np.bool_]) -> bool:
        """Whether a node above the leaf asks for a missing feature; river tries no split then."""
        parents = {child: n for n, f in enumerate(self.feature) if f >= 0 for child in self._children(n)}
        node = self.node[leaf]
        while node in parents:
            node = parents[node]
            if missing[self.feature[node]]:
                return True
        return False

    def _children(self, node: int) -> tuple[int, int]:
        return self.left[node], self.right[node]

    def _weight(self, node: int) -> float:
        if self.feature[node] >= 0:
            return self._weight(self.left[node]) + self._weight(self.right[node])
        return sum(self.weights[-1 - self.feature[node]].values())

    def _add_node(self) -> int:
        for column, blank in ((self.feature, 0), (self.left, 0), (self.right, 0)):
            column.append(blank)
        self.threshold.append(0.0)
        return len(self.feature) - 1

    def _add_leaf(self, node: int, tree: int, weights: dict[int, float]) -> None:
        leaf = len(self.node)
        if leaf == len(self.gaussians):
            room = max(2 * leaf, 16)
            self.gaussians = np.resize(self.gaussians, (room, *self.gaussians.shape[1:]))
            self.priors = np.resize(self.priors, (room, *self.priors.shape[1:]))
            self.bayes = np.resize(self.bayes, room)
        for column in (self.node, self.tree, self.majority_right, self.bayes_right):
            column.append(0)
        self.attempted_at.append(0.0)
        self.weights.append({})
        self.known.append([])
        self._set_leaf(leaf, node, tree, weights)

    def _set_leaf(self, leaf: int, node: int, tree: int, weights: dict[int, float]) -> None:
        """A leaf that begins with what its parent knows of its classes, and no Gaussians."""
        self.feature[node] = -1 - leaf
        self.node[leaf], self.tree[leaf], self.weights[leaf], self.known[leaf] = node, tree, weights, []
        self.majority_right[leaf] = self.bayes_right[leaf] = 0
        self.gaussians[leaf], self.bayes[leaf] = EMPTY, True
        self.attempted_at[leaf] = self._set_prior(leaf)
