"""COMET for tables: trees choose at most k of n small experts for each row.

Source: Ibrahim et al. 2023 (COMET, KDD 2023). The gate is `coterie.nn.TreeRouter`.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.data import TableEncoder
from coterie.models import load_estimator, save_estimator
from coterie.models.estimator import check_above, check_at_least
from coterie.nn import MLPExperts, MoE, PermuteLabels, Routing, TreeRouter, TreeScore
from coterie.tabular import inputs  # first: it says what to install where scikit-learn is missing
from coterie.tabular.comet_training import train

from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # isort: skip
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d  # isort: skip
from sklearn.utils.multiclass import check_classification_targets  # isort: skip
from sklearn.utils.validation import check_array, check_is_fitted  # isort: skip

_ACTIVE = 1e-5  # a smaller gate weight does not count as a use of the expert


class _COMET(BaseEstimator, ABC):  # type: ignore[misc]
    """What classifier and regressor share: everything but the loss and what comes out."""

    def __init__(
        self,
        num_experts: int = 8,
        k: int = 2,
        *,
        hidden: int = 16,
        gamma: float = 1.0,
        entropy: float = 0.1,
        local_search: bool = False,
        epochs: int = 60,
        batch_size: int = 512,
        lr: float = 1e-2,
        weight_decay: float = 1e-4,
        early_stopping: bool = True,
        patience: int = 10,
        random_state: int | None = None,
    ) -> None:
        self.num_experts, self.k, self.hidden, self.gamma = num_experts, k, hidden, gamma
        self.entropy, self.local_search = entropy, local_search
        self.epochs, self.batch_size, self.lr, self.weight_decay = epochs, batch_size, lr, weight_decay
        self.early_stopping, self.patience, self.random_state = early_stopping, patience, random_state

    def experts_of(self, X: Any) -> npt.NDArray[np.float32]:
        """Gate weights [rows, num_experts], rows sum to 1: which experts answered for a row, how much."""
        return self._route(X).weights_TE.numpy()

    def save(self, folder: str | Path) -> Path:
        """Writes estimator.json and weights.safetensors; `load` reads them. No pickle.

        Raises NotFittedError before `fit`; ValueError when the folder holds something else.
        """
        check_is_fitted(self)
        learnt = {
            "encoder": self._encoder.to_dict(),
            "named": hasattr(self, "feature_names_in_"),
            "usage": self.expert_usage_.tolist(),
            "epochs": self.n_iter_,
            **self._learnt(),
        }
        parameters, tensors = self.get_params(), self._model.state_dict()
        kind = type(self).__name__
        return save_estimator(folder, kind, parameters=parameters, learnt=learnt, tensors=tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Any:
        """The estimator that `save` wrote. ValueError for a folder that holds another kind, or none."""
        parameters, learnt, tensors = load_estimator(folder, cls.__name__)
        estimator = cls(**parameters)
        estimator._restore(learnt)
        inputs.set_encoder(estimator, TableEncoder.from_dict(learnt["encoder"]), named=learnt["named"])
        estimator.expert_usage_ = np.array(learnt["usage"])
        estimator.n_iter_ = learnt["epochs"]
        estimator._model = estimator._build()
        estimator._model.load_state_dict(tensors)
        estimator._model.eval()
        return estimator

    def _fit(self, X: Any, y: Any) -> None:
        _check_settings(self)
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        frame, y = inputs.as_frame(self, X, reset=True), _column(y)
        check_consistent_length(frame, y)
        self._encoder = TableEncoder().fit(frame)
        x_TD = torch.from_numpy(inputs.encode(self._encoder, frame))
        target_T = self._learn_target(y)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model = self._build()
            self.loss_curve_ = train(
                self._model,
                x_TD,
                target_T,
                self._loss,
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                weight_decay=self.weight_decay,
                entropy=self.entropy,
                patience=self.patience if self.early_stopping else None,
                seed=seed,
            )
        self.n_iter_ = len(self.loss_curve_)
        self._model.eval()
        with torch.no_grad():
            used_TE = self._model.router(x_TD).weights_TE
        self.expert_usage_ = used_TE.mean(0).double().numpy()
        self.experts_per_row_ = (used_TE > _ACTIVE).sum(1).double().mean().item()

    def _build(self) -> MoE:
        dim = len(self._encoder.feature_names)
        router: TreeRouter | PermuteLabels = TreeRouter(
            TreeScore(dim, self.num_experts, self.k, gamma=self.gamma)
        )
        if self.local_search:
            router = PermuteLabels(router)
        experts = MLPExperts(self.num_experts, dim, self.hidden, dim_out=self._outputs(), activation="relu")
        return MoE(router, experts)

    def _encode(self, X: Any) -> Tensor:
        """Standardised features [T, D]: splits are undecided in a window of width γ around 0."""
        check_is_fitted(self)
        return torch.from_numpy(inputs.encode(self._encoder, inputs.as_frame(self, X, reset=False)))

    @torch.no_grad()
    def _forward(self, X: Any) -> Tensor:
        x_TD = self._encode(X)  # first: it refuses what is not fitted
        output: Tensor = self._model(x_TD)[0]
        return output

    @torch.no_grad()
    def _route(self, X: Any) -> Routing:
        x_TD = self._encode(X)
        routing: Routing = self._model.router(x_TD)
        return routing

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    @abstractmethod
    def _learn_target(self, y: npt.NDArray[Any]) -> Tensor:
        """What `_loss` compares outputs with [rows]; keeps what turns them back."""

    @abstractmethod
    def _outputs(self) -> int:
        """How many numbers an expert gives."""

    @abstractmethod
    def _learnt(self) -> dict[str, Any]:
        """What else `save` writes."""

    @abstractmethod
    def _restore(self, learnt: dict[str, Any]) -> None:
        """Takes back what `_learnt` gave."""

    @abstractmethod
    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss."""


class COMETRegressor(RegressorMixin, _COMET):  # type: ignore[misc]
    """Regression by a mixture of small MLPs, of which two trees choose at most two for each row.

    Args:
        num_experts: E, experts (leaves of a tree), at least 2.
        k: trees, 1 ≤ k ≤ E: the most experts of a row once every split is certain.
        hidden: units of an expert's hidden layer.
        gamma: width of the window around 0 in which a split is undecided, > 0; features are standardised.
        entropy: λ of the loss that makes splits certain. Larger: fewer experts per row, and sooner.
        local_search: learn over the first tenth of training which expert stands behind which leaf (COMET+).
        epochs: passes over the rows, at most.
        batch_size: rows per step.
        lr: of Adam.
        weight_decay: of matrices (decoupled).
        early_stopping: hold a tenth of the rows out, stop when they get no better for `patience` epochs, and
            keep the best weights. Only with 100 rows and more; otherwise all epochs are run.
        patience: epochs.
        random_state: an int gives the same result every time.

    X is a numeric array or a pandas frame; its text columns become categories, its missing numbers the mean
    with a flag, and unseen categories are all zero later on.

    Attributes after `fit`: `expert_usage_` [E], mean gate weight over the training rows; `experts_per_row_`,
    how many experts answer for a row; `n_iter_`, epochs run; `loss_curve_`, per epoch, of the held-out rows
    where there are some.

    Raises ValueError for settings out of range and for data that scikit-learn refuses.

    Source: Ibrahim et al. 2023 (COMET, KDD 2023).

    >>> from sklearn.datasets import make_friedman1
    >>> X, y = make_friedman1(500, random_state=0)
    >>> model = COMETRegressor(random_state=0).fit(X, y)
    >>> bool(model.score(X, y) > 0.9), model.experts_of(X).shape
    (True, (500, 8))
    """

    def fit(self, X: Any, y: Any) -> "COMETRegressor":
        """X [rows, features], y [rows]."""
        self._fit(X, y)
        return self

    def predict(self, X: Any) -> npt.NDArray[np.float64]:
        """y [rows]."""
        scaled = self._forward(X).squeeze(1).double().numpy()
        return scaled * self._y_deviation + self._y_mean

    def _learn_target(self, y: npt.NDArray[Any]) -> Tensor:
        y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        self._y_mean, self._y_deviation = float(y.mean()), float(y.std()) or 1.0
        return torch.from_numpy((y - self._y_mean) / self._y_deviation).float()

    def _outputs(self) -> int:
        return 1

    def _learnt(self) -> dict[str, Any]:
        return {"y": [self._y_mean, self._y_deviation]}

    def _restore(self, learnt: dict[str, Any]) -> None:
        self._y_mean, self._y_deviation = learnt["y"]

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.squeeze(1), target)


class COMETClassifier(ClassifierMixin, _COMET):  # type: ignore[misc]
    """Classification by a mixture of small MLPs, of which two trees choose at most two for each row.

    Arguments, inputs and attributes are those of `COMETRegressor`; `classes_` besides.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True, as_frame=True)
    >>> model = COMETClassifier(random_state=0).fit(X, y)
    >>> bool(model.score(X, y) > 0.9), model.predict_proba(X[:2]).shape
    (True, (2, 3))
    """

    def fit(self, X: Any, y: Any) -> "COMETClassifier":
        """X [rows, features], y [rows] of any labels."""
        self._fit(X, y)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Probabilities [rows, classes], in the order of `classes_`."""
        return self._forward(X).double().softmax(1).numpy()

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The most probable class of each row."""
        chosen = self.predict_proba(X).argmax(1)
        return self.classes_[chosen]  # type: ignore[no-any-return]

    def _learn_target(self, y: npt.NDArray[Any]) -> Tensor:
        check_classification_targets(y)
        self.classes_, target = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has 1 class, {self.classes_[0]!r}; a classifier needs at least 2")
        return torch.from_numpy(target)

    def _outputs(self) -> int:
        return len(self.classes_)

    def _learnt(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str}

    def _restore(self, learnt: dict[str, Any]) -> None:
        self.classes_ = np.array(learnt["classes"], dtype=learnt["dtype"])

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)


def _column(y: Any) -> npt.NDArray[Any]:
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    return column_or_1d(y, warn=True)  # type: ignore[no-any-return]


def _check_settings(estimator: _COMET) -> None:
    check_at_least(estimator, 1, "hidden", "epochs", "batch_size", "patience")
    check_at_least(estimator, 0, "entropy", "weight_decay")
    check_above(estimator, 0, "lr")
