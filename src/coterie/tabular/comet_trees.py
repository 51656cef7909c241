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

from coterie.data import TableEncoder, import_pandas
from coterie.models import load_estimator, save_estimator
from coterie.nn import MLPExperts, MoE, PermuteLabels, Routing, TreeRouter, TreeScore
from coterie.tabular.comet_training import train

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_consistent_length, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, check_random_state, validate_data
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "coterie.tabular needs scikit-learn and pandas; install them with: pip install 'coterie[tables]'"
    ) from None

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
        self.num_experts = num_experts
        self.k = k
        self.hidden = hidden
        self.gamma = gamma
        self.entropy = entropy
        self.local_search = local_search
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.patience = patience
        self.random_state = random_state

    def experts_of(self, X: Any) -> npt.NDArray[np.float32]:
        """Gate weights [rows, num_experts], rows sum to 1: which experts answered for a row, how much."""
        return self._route(X).weights_TE.numpy()

    def save(self, folder: str | Path) -> Path:
        """Writes estimator.json and weights.safetensors; `load` reads them. No pickle.

        Raises NotFittedError before `fit`; ValueError when the folder holds something else.
        """
        check_is_fitted(self)
        learnt = {
            "features": self.n_features_in_,
            "names": [*map(str, getattr(self, "feature_names_in_", []))],
            "encoder": None if self._encoder is None else self._encoder.to_dict(),
            "usage": self.expert_usage_.tolist(),
            "epochs": self.n_iter_,
            **self._learnt(),
        }
        tensors = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        tensors |= {"mean": self._mean, "deviation": self._deviation}
        return save_estimator(
            folder, type(self).__name__, parameters=self.get_params(), learnt=learnt, tensors=tensors
        )

    @classmethod
    def load(cls, folder: str | Path) -> Any:
        """The estimator that `save` wrote. ValueError for a folder that holds another kind, or none."""
        parameters, learnt, tensors = load_estimator(folder, cls.__name__)
        estimator = cls(**parameters)
        estimator._restore(learnt)
        estimator.n_features_in_ = learnt["features"]
        if learnt["names"]:
            estimator.feature_names_in_ = np.array(learnt["names"], dtype=object)
        encoder = learnt["encoder"]
        estimator._encoder = None if encoder is None else TableEncoder.from_dict(encoder)
        estimator.expert_usage_ = np.array(learnt["usage"])
        estimator.n_iter_ = learnt["epochs"]
        estimator._mean, estimator._deviation = tensors.pop("mean"), tensors.pop("deviation")
        estimator._model = estimator._build(len(estimator._mean))
        estimator._model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items()})
        estimator._model.eval()
        return estimator

    def _fit(self, X: Any, y: Any) -> None:
        _check_settings(self)
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        x_TD = self._encode(X, fitting=True)
        y = _column(y)
        check_consistent_length(x_TD, y)
        target_T = self._learn_target(y)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model = self._build(x_TD.shape[1])
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
        used_TE = self._route(X).weights_TE
        self.expert_usage_ = used_TE.mean(0).double().numpy()
        self.experts_per_row_ = (used_TE > _ACTIVE).sum(1).double().mean().item()

    def _build(self, dim: int) -> MoE:
        router: TreeRouter | PermuteLabels = TreeRouter(
            TreeScore(dim, self.num_experts, self.k, gamma=self.gamma)
        )
        if self.local_search:
            router = PermuteLabels(router)
        experts = MLPExperts(self.num_experts, dim, self.hidden, dim_out=self._outputs(), activation="relu")
        return MoE(router, experts)

    def _encode(self, X: Any, *, fitting: bool = False) -> Tensor:
        """Standardised features [T, D]: splits are undecided in a window of width γ around 0."""
        named = hasattr(X, "iloc") and all(isinstance(name, str) for name in X.columns)
        frame = X if named else None
        if fitting:
            self._encoder = None if frame is None else TableEncoder()
        if self._encoder is None:
            values = validate_data(
                self, X, dtype=np.float64, reset=fitting, ensure_min_samples=2 if fitting else 1
            )
            x_TD = torch.as_tensor(np.ascontiguousarray(values))
            if fitting:
                self._mean, deviation = x_TD.mean(0), x_TD.std(0, correction=0)
                self._deviation = torch.where(deviation > 0, deviation, 1.0)
            return ((x_TD - self._mean) / self._deviation).float()
        if fitting:
            validate_data(self, frame, skip_check_array=True)
            self._encoder.fit(frame)
        elif frame is None:
            values = validate_data(self, X, dtype=None, reset=False)
            frame = import_pandas().DataFrame(values, columns=self._encoder.columns)
        x_TD = torch.from_numpy(self._encoder.transform(frame))
        if fitting:
            self._mean, self._deviation = torch.zeros(x_TD.shape[1]), torch.ones(x_TD.shape[1])
        return x_TD

    @torch.no_grad()
    def _forward(self, X: Any) -> Tensor:
        check_is_fitted(self)
        output: Tensor = self._model(self._encode(X))[0]
        return output

    @torch.no_grad()
    def _route(self, X: Any) -> Routing:
        check_is_fitted(self)
        routing: Routing = self._model.router(self._encode(X))
        return routing

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

    X is a numeric array without missing values, or a pandas frame, whose text columns become categories,
    whose missing numbers become the mean with a flag, and whose unseen categories are all zero later on.

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
    for name in ("hidden", "epochs", "batch_size", "patience"):
        if getattr(estimator, name) < 1:
            raise ValueError(f"{name}={getattr(estimator, name)}; should be at least 1")
    for name in ("entropy", "weight_decay"):
        if getattr(estimator, name) < 0:
            raise ValueError(f"{name}={getattr(estimator, name)}; should be at least 0")
    if not estimator.lr > 0:
        raise ValueError(f"lr={estimator.lr}; should be > 0")
