"""Learning from chunk to chunk: score first, look for drift, grow where there is some, then train."""

import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.tabular.fairness import METRICS, penalty
from coterie.tabular.growth import GrowingMixture, NewExpert, fit_expert, unfair_errors
from coterie.tabular.linear_mixture import Mixed, classification_loss

FEWEST_ROWS = 20  # of a group in a chunk; below that its rates say nothing


class PrequentialLearner:
    """A growing mixture, what was measured chunk by chunk, and what drift is measured against.

    Args:
        wants_first: whether the first of the two classes is the favourable one.

    `history` has a dict per chunk; `reference` is the accuracy and the gap after the mixture last grew, which
    stays until it grows again: against a reference that moves, slow drift would not show. `background_D` is
    the features' mean over all `rows` learnt from.
    """

    mixture: GrowingMixture
    background_D: Tensor

    def __init__(self, *, wants_first: bool) -> None:
        self.wants_first = wants_first
        self.history: list[dict[str, Any]] = []
        self.reference: dict[str, float | None] = {}
        self.rows = 0

    def begin(self, dim: int, num_experts: int, *, seed: int, asked: Any) -> None:
        """Makes the mixture for D features.

        Args:
            dim: D.
            num_experts: E to begin with.
            seed: of all that is random.
            asked: the estimator, for its arguments.
        """
        self.mixture = GrowingMixture(
            dim, num_experts, asked.mix, learning_rate=asked.learning_rate, seed=seed
        )

    def learn(self, x_TD: Tensor, y_T: Tensor, groups: NDArray[Any] | None, *, asked: Any) -> None:
        """One chunk.

        Args:
            x_TD: features, float64.
            y_T: 1.0 for the second class, 0.0 for the first.
            groups: name of each row's group [T]; None for none.
            asked: the estimator, for its arguments.
        """
        group_T = number_groups(groups if asked.fairness else None, len(x_TD))
        first = not self.history
        entry: dict[str, Any] = {"chunk": len(self.history), "rows": len(x_TD)}
        entry |= {"accuracy": None, "gap": None} if first else self.measure(x_TD, y_T, group_T, asked)
        entry |= {"accuracy_drift": False, "fairness_drift": False} if first else self._drift(entry, asked)
        drifted = entry["accuracy_drift"] or entry["fairness_drift"]
        entry |= {"grown": drifted and asked.max_experts > 1, "merged": [], "removed": None}
        if entry["grown"]:
            start = self._new_expert(x_TD, y_T, group_T, asked, wrong=entry["accuracy_drift"])
            entry |= self.mixture.grow(
                x_TD, max_experts=asked.max_experts, merge_above=asked.merge, start=start
            )
        self.history = [*self.history, entry]
        if first or drifted or asked.update == "always":
            self.mixture.train(
                x_TD,
                lambda mixed: self._loss(mixed, y_T, group_T, asked),
                steps=asked.n_iter,
                l2=asked.l2,
                only_newest=asked.refit == "new" and any(entry["grown"] for entry in self.history),
            )
        self.mixture.remember(x_TD)
        after = self.measure(x_TD, y_T, group_T, asked)
        entry |= {f"{name}_after": value for name, value in after.items()}
        entry["experts"] = self.mixture.model.num_experts
        if first or entry["grown"]:
            self.reference = after
        elif self.reference["gap"] is None:  # no two groups were large enough until now
            self.reference["gap"] = after["gap"]
        self._warn_of_one_answer(x_TD, asked)
        weight = len(x_TD) / (self.rows + len(x_TD))
        before_D = torch.zeros_like(x_TD[0]) if first else self.background_D
        self.background_D = (1 - weight) * before_D + weight * x_TD.mean(0)
        self.rows += len(x_TD)

    def to_dict(self) -> dict[str, Any]:
        """What was learnt beside tensors, as JSON can hold it."""
        return {
            "n_experts": self.mixture.model.num_experts,
            "seed": self.mixture.seed,
            "chunks": self.mixture.chunks,
            "shares": self.mixture.shares,
            "rows": self.rows,
            "reference": self.reference,
            "history": self.history,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Those of the mixture, and the background."""
        return {**self.mixture.tensors(), "background": self.background_D}

    def restore(self, learnt: dict[str, Any], tensors: dict[str, Tensor], *, asked: Any) -> None:
        """Takes what `to_dict` and `tensors` gave."""
        self.rows, self.reference, self.history = learnt["rows"], learnt["reference"], learnt["history"]
        self.background_D = tensors["background"]
        self.begin(len(self.background_D), learnt["n_experts"], seed=learnt["seed"], asked=asked)
        self.mixture.chunks, self.mixture.shares = learnt["chunks"], learnt["shares"]
        self.mixture.load_tensors(tensors)

    def measure(self, x_TD: Tensor, y_T: Tensor, group_T: Tensor, asked: Any) -> dict[str, float | None]:
        """Accuracy, and the gap between groups of hard decisions; None where it is not watched or known."""
        with torch.no_grad():
            mixed = self.mixture.model(x_TD)
        decided_T, counted_T = (mixed.log_odds_T >= 0).double(), group_T >= 0
        gap = math.nan
        if asked.fairness is not None:
            columns = self._wanted(y_T), self._wanted(decided_T), self.distance(mixed), group_T
            gap = METRICS[asked.fairness](*(column_T[counted_T].numpy() for column_T in columns))
        accuracy = float((decided_T == y_T).double().mean())
        return {"accuracy": accuracy, "gap": None if math.isnan(gap) else gap}

    def distance(self, mixed: Mixed) -> Tensor:
        """[T] max(0, -S) / |Σ g_i w_i|, S being the score for the favourable class and the gate held."""
        weight_TD = mixed.routing.weights @ self.mixture.model.experts.weight.detach().squeeze(1)
        unfavourable_T = mixed.score_T if self.wants_first else -mixed.score_T
        distance_T: Tensor = unfavourable_T.relu() / weight_TD.norm(dim=1).clamp(min=1e-12)
        return distance_T

    def _drift(self, measured: dict[str, Any], asked: Any) -> dict[str, bool]:
        then, gap, gap_then = self.reference["accuracy"], measured["gap"], self.reference["gap"]
        return {
            "accuracy_drift": measured["accuracy"] < then - asked.eps_acc,
            "fairness_drift": None not in (gap, gap_then) and gap > gap_then + asked.eps_fair,
        }

    def _loss(self, mixed: Mixed, y_T: Tensor, group_T: Tensor, asked: Any) -> Tensor:
        loss = classification_loss(mixed, y_T, localized=asked.loss == "localized")
        if asked.fairness is None or not asked.lam:
            return loss
        wanted_T = self._wanted(mixed.log_odds_T.sigmoid())
        gap = penalty(asked.fairness, wanted_T, self._wanted(y_T), group_T, asked.group_gap)
        return torch.add(loss, gap, alpha=asked.lam)

    def _new_expert(
        self, x_TD: Tensor, y_T: Tensor, group_T: Tensor, asked: Any, *, wrong: bool
    ) -> NewExpert:
        start = self.mixture.small_expert()
        if asked.new_expert == "random":
            return start
        with torch.no_grad():
            decided_T = (self.mixture.model(x_TD).log_odds_T >= 0).double()
        rows_T = decided_T != y_T
        if not wrong:
            rows_T = unfair_errors(self._wanted(y_T), self._wanted(decided_T), group_T)
        if len(torch.unique(y_T[rows_T])) < 2:  # nothing that a regression could tell apart
            return start
        options = {"steps": asked.n_iter, "learning_rate": asked.learning_rate, "l2": asked.l2}
        return fit_expert(start, x_TD[rows_T], y_T[rows_T], **options)

    def _wanted(self, positive_T: Tensor) -> Tensor:
        """From the second class to the favourable one: the same, or 1 less that."""
        return 1 - positive_T if self.wants_first else positive_T

    def _warn_of_one_answer(self, x_TD: Tensor, asked: Any) -> None:
        if asked.fairness is None or not asked.lam:
            return
        with torch.no_grad():
            rate = float((self.mixture.model(x_TD).log_odds_T >= 0).double().mean())
        if not 0.02 <= rate <= 0.98:
            warnings.warn(
                f"{rate:.1%} of a chunk's decisions are positive: a gap closes also where all are alike; "
                f"lam={asked.lam} may be too much",
                stacklevel=5,
            )


def number_groups(groups: NDArray[Any] | None, rows: int) -> Tensor:
    """Groups as numbers [T]; -1 in one of fewer than 20 rows, with a warning, and where there are none."""
    if groups is None:
        return torch.full((rows,), -1)
    names, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    small = counts < FEWEST_ROWS
    if small.any():
        found = ", ".join(f"{n!r} ({c} rows)" for n, c in zip(names[small], counts[small], strict=True))
        warnings.warn(
            f"group {found} has fewer than {FEWEST_ROWS} rows in a chunk and is left out of its gap",
            stacklevel=5,
        )
    return torch.from_numpy(np.where(small[numbers], -1, numbers))
