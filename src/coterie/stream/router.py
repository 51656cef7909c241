"""A router that learns online which experts are right, from targets that come from outside.

In numpy, with the gradient and Adam written out: one row through torch takes several times as long, and a
stream has one row at a time.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

_BETAS, _EPS = (0.9, 0.999), 1e-8  # of Adam, as everywhere


class OnlineRouter:
    """An MLP with one independent logit per expert, trained by Adam on the binary cross-entropy of targets.

    Rows and their targets are kept until there are `batch` of them; then there is one step, with the mean
    loss over rows and experts. Between two steps neither the network nor the scaler changes, so that rows
    may be judged one by one or many at once.

    Args:
        num_features: D.
        num_experts: E.
        hidden: widths of the hidden layers, with ReLU.
        lr: Adam's.
        batch: rows of one step.
        dropout: after the first hidden layer, in the step only.
        scale: standardise features by the mean and deviation of all rows up to the last step.
        rng: of the initial weights (Xavier, biases 0) and of the dropout.

    >>> router = OnlineRouter(2, 3, (8,), lr=2e-3, batch=2, rng=np.random.default_rng(0))
    >>> router.logits(np.zeros(2)).shape, router.logits(np.zeros((5, 2))).shape
    ((3,), (5, 3))
    >>> [router.learn(np.ones(2), np.array([1, 0, 0])) for _ in range(4)]  # was there a step?
    [False, True, False, True]
    """

    def __init__(
        self,
        num_features: int,
        num_experts: int,
        hidden: Sequence[int],
        *,
        lr: float,
        batch: int,
        dropout: float = 0.0,
        scale: bool = True,
        rng: np.random.Generator,
    ) -> None:
        self.widths = [num_features, *hidden, num_experts]
        self.lr, self.batch, self.dropout, self.scale, self.rng = lr, batch, dropout, scale, rng
        # weights and biases of all layers in one array, Adam's two moments in another two
        self.state = np.zeros((3, _size(self.widths)), dtype=np.float32)
        for weight, _ in _layers(self.state[0], self.widths):
            bound = math.sqrt(6 / sum(weight.shape))
            weight[:] = rng.uniform(-bound, bound, weight.shape)
        self.steps = 0
        self.filled = 0  # how many of the next step's rows are there
        self.rows_BD = np.zeros((batch, num_features))
        self.targets_BE = np.zeros((batch, num_experts), dtype=np.float32)
        self.moments_3D = np.zeros((3, num_features))  # of the features: rows, mean, summed squares
        self._view()

    @property
    def num_features(self) -> int:
        return self.widths[0]

    @property
    def num_experts(self) -> int:
        return self.widths[-1]

    def logits(self, x: Floats) -> Singles:
        """Logits [E] of a row [D], or [N, E] of rows [N, D]; a missing value (NaN) counts as the mean."""
        return self._forward(self._scaled(x))[-1]

    def learn(self, x_D: Floats, target_E: npt.NDArray[Any]) -> bool:
        """Keeps the row, and makes a step if it completes a batch, which it then says."""
        self.rows_BD[self.filled], self.targets_BE[self.filled] = x_D, target_E
        self.filled += 1
        if self.filled < self.batch:
            return False
        self.filled = 0
        if self.scale:
            self._observe(self.rows_BD)
        self._step(self._scaled(self.rows_BD))
        return True

    def grow(self, num_features: int, num_experts: int) -> None:
        """Makes room: weights of new features are 0, those of new experts as in a new network."""
        old, widths = self.widths, [num_features, *self.widths[1:-1], num_experts]
        state = np.zeros((3, _size(widths)), dtype=np.float32)
        for kept, room in zip(self.state, state, strict=True):
            for (w, b), (wider_w, wider_b) in zip(_layers(kept, old), _layers(room, widths), strict=True):
                wider_w[: w.shape[0], : w.shape[1]], wider_b[: len(b)] = w, b
        fresh = [weight for weight, _ in _layers(state[0], widths)][-1][:, old[-1] :]
        bound = math.sqrt(6 / (widths[-2] + widths[-1]))
        fresh[:] = self.rng.uniform(-bound, bound, fresh.shape)
        self.widths, self.state = widths, state
        features, experts = num_features - old[0], num_experts - old[-1]
        self.rows_BD = np.pad(self.rows_BD, ((0, 0), (0, features)), constant_values=np.nan)
        self.targets_BE = np.pad(self.targets_BE, ((0, 0), (0, experts)))
        self.moments_3D = np.pad(self.moments_3D, ((0, 0), (0, features)))
        self._view()

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All that was learnt, the rows of the step to come included."""
        return {
            "state": self.state,
            "rows": self.rows_BD,
            "targets": self.targets_BE,
            "moments": self.moments_3D,
            "counts": np.array([self.steps, self.filled]),
        }

    def set_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Takes over what `to_arrays` of a router of the same widths gave."""
        self.state, self.rows_BD, self.targets_BE = arrays["state"], arrays["rows"], arrays["targets"]
        self.moments_3D = arrays["moments"]
        self.steps, self.filled = map(int, arrays["counts"])
        self._view()

    def _view(self) -> None:
        self._layers = list(_layers(self.state[0], self.widths))
        count_D, self._mean_D, squares_D = self.moments_3D
        deviation_D = np.sqrt(squares_D / np.maximum(count_D, 1))
        self._inverse_D = 1 / np.where(deviation_D > 0, deviation_D, 1.0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view()  # what was pickled apart shares memory again

    def _scaled(self, x: Floats) -> Singles:
        x = (x - self._mean_D) * self._inverse_D
        if np.isnan(x.sum()):
            x = np.nan_to_num(x, nan=0.0)
        return x.astype(np.float32)

    def _forward(self, x: Singles, kept: Singles | None = None) -> list[Singles]:
        """The input, every hidden layer, the logits; `kept` multiplies the first hidden layer."""
        outputs = [x]
        for layer, (weight, bias) in enumerate(self._layers):
            x = x @ weight
            x += bias
            if layer < len(self._layers) - 1:
                np.maximum(x, 0, out=x)
            if layer == 0 and kept is not None:
                x *= kept
            outputs.append(x)
        return outputs

    def _step(self, x_BD: Singles) -> None:
        gradient = np.zeros_like(self.state[0])
        self._backward(x_BD, list(_layers(gradient, self.widths)))
        self.steps += 1
        weights, mean, square = self.state
        mean += (1 - _BETAS[0]) * (gradient - mean)
        gradient *= gradient
        square += (1 - _BETAS[1]) * (gradient - square)
        correct_mean, correct_square = (1 - beta**self.steps for beta in _BETAS)
        root = np.sqrt(square, out=gradient)
        root /= math.sqrt(correct_square)
        root += _EPS
        weights -= (self.lr / correct_mean) * (mean / root)

    def _backward(self, x_BD: Singles, gradients: list[tuple[Singles, Singles]]) -> None:
        """Writes the loss's gradient by every weight and bias."""
        kept = None
        if self.dropout:
            survives = self.rng.random((len(x_BD), self.widths[1])) >= self.dropout
            kept = (survives / (1 - self.dropout)).astype(np.float32)
        outputs = self._forward(x_BD, kept)
        by = (expit(outputs[-1]) - self.targets_BE) / np.float32(self.targets_BE.size)
        for layer in reversed(range(len(self._layers))):
            by_weight, by_bias = gradients[layer]
            np.matmul(outputs[layer].T, by, out=by_weight)
            by.sum(0, out=by_bias)
            if layer:
                by = by @ self._layers[layer][0].T
                by *= outputs[layer] > 0
                if layer == 1 and kept is not None:
                    by *= kept

    def _observe(self, rows_BD: Floats) -> None:
        """Adds rows to the mean and the summed squares of the features, missing values left out (Chan)."""
        known = ~np.isnan(rows_BD)
        count_D, mean_D, squares_D = self.moments_3D
        added_D = known.sum(0)
        new_D = np.where(known, rows_BD, 0.0).sum(0) / np.maximum(added_D, 1)
        spread_D = np.where(known, (rows_BD - new_D) ** 2, 0.0).sum(0)
        total_D = np.maximum(count_D + added_D, 1)
        squares_D += spread_D + (new_D - mean_D) ** 2 * count_D * added_D / total_D
        mean_D += (new_D - mean_D) * added_D / total_D
        count_D += added_D
        self._view()


def _size(widths: Sequence[int]) -> int:
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))


def _layers(flat: Singles, widths: Sequence[int]) -> Iterator[tuple[Singles, Singles]]:
    """Views of each layer's weight [in, out] and bias [out]."""
    at = 0
    for fan_in, fan_out in pairwise(widths):
        weight = flat[at : at + fan_in * fan_out].reshape(fan_in, fan_out)
        at += fan_in * fan_out
        yield weight, flat[at : at + fan_out]
        at += fan_out
