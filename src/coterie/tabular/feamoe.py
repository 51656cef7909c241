"""FEAMOE: logistic experts behind a gate, fair by a penalty, grown when accuracy or fairness drifts.

Source: Sharma, Henderson, Ghosh 2023, "FEAMOE: Fair, Explainable and Adaptive Mixture of Experts" (IJCAI).
    Its abstract fixes the idea; formulas and thresholds are this project's reading of it.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from coterie.data import TableEncoder
from coterie.models import load_estimator, save_estimator
from coterie.models.estimator import check_choice
from coterie.tabular import inputs  # first: it says what to install where scikit-learn is missing
from coterie.tabular.attribution import Explanation, explain_with_gate, explain_with_gate_held
from coterie.tabular.fairness import Fairness, GroupGap
from coterie.tabular.linear_mixture import Mix, Mixed
from coterie.tabular.prequential import PrequentialLearner

from sklearn.base import BaseEstimator, ClassifierMixin  # isort: skip
from sklearn.utils import check_random_state  # isort: skip
from sklearn.utils.validation import check_is_fitted  # isort: skip


class FEAMOEClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A binary classifier that is a gated mixture of logistic regressions: fair, adaptive, explained exactly.

    `partial_fit` scores each chunk before it learns from it. Where accuracy fell by more than `eps_acc`, or
    the gap between groups rose by more than `eps_fair`, against what they were after the mixture last grew,
    it adds an expert. `explain` gives exact Shapley values of each decision's score, at the price of one
    multiplication.

    Frames are taken as they are: numbers are standardised, texts and categories become one-hot features, a
    missing number is the mean and says so in a feature of its own, an unseen category is no category; all as
    the first chunk had them. An array has numbers.

    Args:
        n_experts: to begin with.
        max_experts: at most; when there is no room, the least used over three chunks goes.
        fairness: the gap between groups that is penalised and watched: "dp" demographic parity, "eo"
            equalized odds, "burden" the distance of the rejected to a favourable decision; None for none.
            Demographic parity and equalized odds contradict each other where base rates differ; there is one
            at a time.
        lam: weight of the penalty, at least 0; with 0 the gap is only watched.
        group_gap: with more than two groups, "range" penalises the largest less the smallest mean, "variance"
            the sum of squared deviations from the overall mean.
        eps_acc: fall of accuracy that counts as drift; infinity for never.
        eps_fair: rise of the gap that counts as drift, in the gap's units; infinity for never.
        refit: "all" trains every expert on each chunk; "new", once the mixture has grown, only the newest and
            the gate, and leaves experts that were audited as they are.
        update: "always" trains on every chunk, "on_drift" only on those with drift.
        new_expert: what a new one starts from: "random" small weights, or a fit to the "errors": after
            accuracy drift the rows that are decided wrongly, otherwise false negatives of the group with the
            fewest favourable decisions and false positives of the others.
        merge: experts whose weights have a cosine above this become one when the mixture grows; None for
            never.
        mix: "prob" mixes probabilities, "logit" scores.
        loss: "mixture" is the cross-entropy of the mixture, "localized" the gate-weighted sum of the experts'
            own.
        favourable: the class that a person would want; None for the larger one. Burden depends on it.
        chunk_size: about how many rows at a time `fit` goes through, in their order; None for all at once.
        n_iter: full-batch steps of Adam per chunk.
        learning_rate: of Adam.
        l2: weight of the squared weights of experts and gate.
        random_state: an integer for the same result each time. torch's own generator is not used.

    After fitting: `classes_`; `n_experts_`; `coef_` [E, D] and `intercept_` [E] of the experts;
    `expert_usage_` [E], mean share of the gate in the last chunk; `columns_`, the columns that `explain`
    speaks of, and `features_`, what they became; `background_` [D], the features' mean over everything seen;
    `history_`, a dict per chunk: accuracy and gap before it was learnt from and after, which drift there was,
    whether an expert was added, removed or merged, and experts afterwards.

    Raises (from fit and partial_fit) ValueError: an argument out of range, labels of one or more than two
    classes, no `sensitive` although a gap is watched, one that is constant or misses a value, an infinite
    number. Warns of a group with fewer than 20 rows in a chunk, which is left out of the gap, and of a
    penalty so strong that nearly all decisions are alike.

    Source: Sharma et al. 2023.

    >>> import numpy as np, pandas as pd
    >>> rng = np.random.default_rng(0)
    >>> X = pd.DataFrame({"income": rng.normal(50, 10, 400), "job": rng.choice(["a", "b"], 400)})
    >>> group = rng.choice(["x", "y"], 400)
    >>> y = (X["income"] + 5 * (group == "x") > 52).map({True: "lend", False: "decline"})
    >>> model = FEAMOEClassifier(lam=1.0, favourable="lend", random_state=0).fit(X, y, sensitive=group)
    >>> phi, phi0, per_expert = model.explain(X[:3])
    >>> model.columns_, phi.shape, per_expert.shape
    (['income', 'job'], (3, 2), (3, 2, 2))
    """

    def __init__(
        self,
        n_experts: int = 2,
        max_experts: int = 6,
        fairness: Fairness | None = "dp",
        lam: float = 0.5,
        group_gap: GroupGap = "range",
        eps_acc: float = 0.03,
        eps_fair: float = 0.05,
        refit: Literal["all", "new"] = "all",
        update: Literal["always", "on_drift"] = "always",
        new_expert: Literal["random", "errors"] = "random",
        merge: float | None = None,
        mix: Mix = "prob",
        loss: Literal["mixture", "localized"] = "mixture",
        favourable: int | str | bool | None = None,
        chunk_size: int | None = None,
        n_iter: int = 150,
        learning_rate: float = 0.05,
        l2: float = 1e-4,
        random_state: int | None = None,
    ) -> None:
        self.n_experts, self.max_experts = n_experts, max_experts
        self.fairness, self.lam, self.group_gap, self.favourable = fairness, lam, group_gap, favourable
        self.eps_acc, self.eps_fair, self.refit, self.update = eps_acc, eps_fair, refit, update
        self.new_expert, self.merge, self.mix, self.loss, self.l2 = new_expert, merge, mix, loss, l2
        self.chunk_size, self.n_iter, self.learning_rate = chunk_size, n_iter, learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: ArrayLike, sensitive: ArrayLike | None = None) -> "FEAMOEClassifier":
        """Learns from scratch.

        Args:
            X: frame or array [n, columns].
            y: [n] labels of two classes.
            sensitive: [n] the group of each row; not a feature unless it is in X too.
        """
        frame = inputs.as_frame(self, X, reset=True)
        labels, classes = inputs.binary_classes(y)
        self._start(classes)
        y_n = inputs.encode_labels(labels, classes, len(frame))
        groups = inputs.group_names(sensitive, len(frame), watched=self.fairness, constant_is_wrong=True)
        size = self.chunk_size or len(frame)
        for rows in np.array_split(np.arange(len(frame)), max(round(len(frame) / size), 1)):
            self._learn(frame.iloc[rows], y_n[rows], None if groups is None else groups[rows])
        return self

    def partial_fit(
        self,
        X: Any,
        y: ArrayLike,
        sensitive: ArrayLike | None = None,
        classes: ArrayLike | None = None,
    ) -> "FEAMOEClassifier":
        """Learns from the next chunk, at best a few hundred rows or more.

        Args:
            X: frame or array [n, columns].
            y: [n] labels.
            sensitive: [n] the group of each row; groups may come and go between chunks.
            classes: the two classes, for a first chunk in which one is missing.
        """
        first = not hasattr(self, "background_")
        frame = inputs.as_frame(self, X, reset=first)
        if first:
            self._start(inputs.binary_classes(y if classes is None else classes)[1])
        y_n = inputs.encode_labels(y, self.classes_, len(frame))
        groups = inputs.group_names(sensitive, len(frame), watched=self.fairness, constant_is_wrong=first)
        self._learn(frame, y_n, groups)
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """[n] classes: the second one where its probability is at least 0.5."""
        positive_T = self._mixed(X).log_odds_T >= 0
        classes: NDArray[Any] = self.classes_[positive_T.long().numpy()]
        return classes

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """[n, 2] probabilities of `classes_`."""
        log_odds_T = self._mixed(X).log_odds_T
        return torch.stack([(-log_odds_T).sigmoid(), log_odds_T.sigmoid()], 1).numpy()

    def encode(self, X: Any) -> NDArray[np.float64]:
        """[n, D] the features that experts and gate see, in the order of `features_`."""
        return self._features(X).numpy()

    def gate_weights(self, X: Any) -> NDArray[np.float64]:
        """[n, E] how much each expert has to say about each row."""
        return self._mixed(X).routing.weights.numpy()

    def recourse_distance(self, X: Any) -> NDArray[np.float64]:
        """[n] how far each row is from a favourable score, in standard deviations; 0 for those beyond it.

        max(0, -S(x)) / |Σ g_i w_i|, with the gate held at its value at x.
        """
        mixed = self._mixed(X)
        return self._learner.distance(mixed).numpy()

    @torch.no_grad()
    def explain(
        self,
        X: Any,
        *,
        by: Literal["column", "feature"] = "column",
        include_gate: bool = False,
        n_permutations: int = 100,
    ) -> Explanation:
        """Shapley values of the score S(x) = Σ g_i(x) s_i(x); with `mix="logit"` it is the log-odds.

        With the gate held at its value at x they are exact, φ_j = Σ_i g_i w_ij (x_j - μ_j), against the mean
        of all that was learnt from, taking columns to be independent. They are on the scale of the score also
        where probabilities are mixed, and leave out that the gate itself depends on x.

        Args:
            X: frame or array [n, columns].
            by: "column" sums the features that a column became, such as the values of a category.
            include_gate: let the gate follow the columns too; then phi0 is the score of the mean row, and the
                values are means over sampled orders of the columns, the same for the same random_state.
            n_permutations: how many orders, with `include_gate`.
        """
        check_choice("by", by, ("column", "feature"))
        x_TD, model = self._features(X), self._learner.mixture.model
        blocks = self._encoder.blocks if by == "column" else [[j] for j in range(len(self.features_))]
        background_D = self._learner.background_D
        if include_gate:
            generator = torch.Generator().manual_seed(self._learner.mixture.seed)
            return explain_with_gate(model, x_TD, background_D, blocks, n_permutations, generator)
        return explain_with_gate_held(model, x_TD, background_D, blocks)

    def save(self, folder: str | Path) -> Path:
        """Writes everything, the optimiser included, as JSON and safetensors; `load` goes on from there.

        Raises ValueError when the folder holds something else, or `random_state` is a generator.
        """
        check_is_fitted(self, "background_")
        if not isinstance(self.random_state, int | np.integer | None):
            raise ValueError(f"random_state={self.random_state!r} cannot be saved; use an integer or None")
        learnt = {
            "classes": self.classes_.tolist(),
            "dtype": self.classes_.dtype.str,
            "encoder": self._encoder.to_dict(),
            "named": hasattr(self, "feature_names_in_"),
            **self._learner.to_dict(),
        }
        parameters, tensors = self.get_params(), self._learner.tensors()
        kind = type(self).__name__
        return save_estimator(folder, kind, parameters=parameters, learnt=learnt, tensors=tensors)

    @classmethod
    def load(cls, folder: str | Path) -> "FEAMOEClassifier":
        """The estimator that `save` wrote. ValueError for a folder that it did not write."""
        parameters, learnt, tensors = load_estimator(folder, cls.__name__)
        self = cls(**parameters)
        self._start(np.array(learnt["classes"], dtype=learnt["dtype"]))
        inputs.set_encoder(self, TableEncoder.from_dict(learnt["encoder"]), named=learnt["named"])
        self._learner.restore(learnt, tensors, asked=self)
        self._publish()
        return self

    def _start(self, classes: NDArray[Any]) -> None:
        inputs.check_feamoe(self, classes)
        self.classes_ = classes
        self._learner = PrequentialLearner(wants_first=bool(self.favourable == classes[0]))

    def _learn(self, frame: Any, y_n: NDArray[np.int64], groups: NDArray[Any] | None) -> None:
        if not self._learner.history:
            self._encoder = TableEncoder().fit(frame)
            features = self._encoder.feature_names
            if not features:
                raise ValueError("no column holds a value; give features")
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            self._learner.begin(len(features), self.n_experts, seed=seed, asked=self)
        self._learner.learn(self._encode(frame), torch.from_numpy(y_n).double(), groups, asked=self)
        self._publish()

    def _publish(self) -> None:
        """What was learnt, under the names that scikit-learn's users look for."""
        model, shares = self._learner.mixture.model, self._learner.mixture.shares[-1]
        self.history_, self.n_experts_ = self._learner.history, model.num_experts
        assert model.experts.bias is not None
        self.coef_: NDArray[np.float64] = model.experts.weight.detach().squeeze(1).clone().numpy()
        self.intercept_: NDArray[np.float64] = model.experts.bias.detach().squeeze(1).clone().numpy()
        self.expert_usage_ = np.array(shares, dtype=float)
        self.columns_, self.features_ = self._encoder.columns, self._encoder.feature_names
        self.background_: NDArray[np.float64] = self._learner.background_D.numpy()

    def _encode(self, frame: Any) -> Tensor:
        return torch.from_numpy(inputs.encode(self._encoder, frame)).double()

    def _features(self, X: Any) -> Tensor:
        check_is_fitted(self, "background_")
        return self._encode(inputs.as_frame(self, X, reset=False))

    @torch.no_grad()
    def _mixed(self, X: Any) -> Mixed:
        x_TD = self._features(X)  # first: it refuses what is not fitted
        mixed: Mixed = self._learner.mixture.model(x_TD)
        return mixed

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.allow_nan = True
        return tags
