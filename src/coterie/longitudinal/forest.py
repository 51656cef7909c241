"""Which covariates matter, before a gate or an expert gets them: a forest of one-class growth models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from coterie.data import import_pandas
from coterie.longitudinal.covariates import Covariates
from coterie.longitudinal.curves import CURVES, CurveName
from coterie.longitudinal.estimation import evaluate_at, maximize_directly
from coterie.longitudinal.fitting import check_panel, fit_mixture
from coterie.longitudinal.panel import Layout, Panel, read_panel

if TYPE_CHECKING:
    import pandas as pd

_Array = npt.NDArray[np.float64]
_QUANTILES = np.linspace(0.1, 0.9, 9)


@dataclass(frozen=True)
class Leaf:
    """A one-class growth model, as its parameters [V]."""

    parameters: Tensor


@dataclass(frozen=True)
class Split:
    """Persons whose covariate is at most `cut` go to `low`, the others to `high`."""

    column: int
    cut: float
    low: "Leaf | Split"
    high: "Leaf | Split"


class SemForest:
    """Trees that split persons by a covariate wherever two growth models fit better than one.

    A node tries nine quantiles of every covariate (each category against the rest). The score statistic of
    the node's own model ranks the cuts; the best one is fitted on both sides, and stays if its likelihood
    ratio is significant at `alpha` over the number of cuts tried. Each tree sees 63% of the persons, drawn
    without replacement, since copies of a person would inflate likelihood ratios.

    Args:
        curve: of the one-class model, as in `TrajectoryMoE`.
        n_trees: trees.
        depth: splits from the root to a leaf.
        min_leaf: fewest persons of a leaf.
        alpha: level of the test, before Bonferroni.
        y: where the scores are, as in `TrajectoryMoE`.
        t: where their times are.
        person: the column of persons of a long table.
        random_state: of the draws and permutations.

    After `fit`: `importances_`, a series by covariate, largest first: the mean loss of log-likelihood per
    person, nats, when the covariate is permuted among the persons that a tree did not see; `trees_`.

    Source: Brandmaier et al. 2016 (SEM forests), as used by Liu & Perera 2022 to find covariates; the
    ranking by score statistic is Arnold et al. 2021's.

    >>> from coterie.longitudinal import simulate_trajectories
    >>> forest = SemForest(n_trees=2, depth=1).fit(simulate_trajectories(300), ["ex2", "gx1"])
    >>> list(forest.importances_.index)
    ['ex2', 'gx1']
    """

    def __init__(
        self,
        curve: CurveName = "bilinear",
        *,
        n_trees: int = 64,
        depth: int = 2,
        min_leaf: int = 50,
        alpha: float = 0.05,
        y: str = "Y",
        t: str = "T",
        person: str | None = None,
        random_state: int = 0,
    ) -> None:
        if curve not in CURVES:
            raise ValueError(f"curve={curve!r}; use one of {', '.join(CURVES)}")
        if min(n_trees, depth, min_leaf) < 1 or not 0 < alpha < 1:
            raise ValueError(
                f"n_trees={n_trees}, depth={depth}, min_leaf={min_leaf}, alpha={alpha}; should be at least "
                "1, and alpha between 0 and 1"
            )
        self.curve, self.n_trees, self.depth, self.min_leaf = curve, n_trees, depth, min_leaf
        self.alpha, self.y, self.t, self.person, self.random_state = alpha, y, t, person, random_state

    def fit(self, frame: "pd.DataFrame", covariates: Sequence[str]) -> "SemForest":
        """Grows the trees; returns itself.

        Args:
            frame: the table, as `TrajectoryMoE.fit` takes it.
            covariates: columns to try.

        Raises ValueError for a bad table, or no covariates.
        """
        if not covariates:
            raise ValueError("no covariates to try; name columns of the table")
        design = Covariates(" + ".join(covariates))
        panel = read_panel(frame, Layout(self.y, self.t, self.person), design, Covariates(""), learn=True)
        check_panel(panel, CURVES[self.curve])
        if len(panel) < 3 * self.min_leaf:  # a tree sees 63%, and two leaves have to fit in
            raise ValueError(
                f"{len(panel)} persons for leaves of min_leaf={self.min_leaf}; give three times as many"
            )
        x_TD = panel.gate[:, 1:].numpy()
        owner_D = [
            next(c for c in covariates if name == c or name.startswith(f"{c}=")) for name in design.names[1:]
        ]
        panel = replace(panel, gate=panel.gate[:, :1])  # the model of a node has no covariates
        one = np.eye(1)
        self._model = fit_mixture(
            panel,
            CURVES[self.curve],
            1,
            gate_units=one,
            expert_units=one,
            joint=False,
            n_init=1,
            method="lbfgs",
            random_state=self.random_state,
        ).model
        root_V = parameters_to_vector(self._model.parameters()).detach()
        rng = np.random.default_rng(self.random_state)
        self.trees_: list[Leaf | Split] = []
        losses = dict.fromkeys(covariates, 0.0)
        for _ in range(self.n_trees):
            shuffled = rng.permutation(len(panel))
            drawn, unseen = np.split(shuffled, [round(0.632 * len(panel))])
            tree = self._grow(panel, x_TD, drawn, self._fit_leaf(panel, drawn, root_V), self.depth)
            self.trees_.append(tree)
            before = self._log_likelihood(tree, panel.take(unseen), x_TD[unseen])
            for name in {owner_D[split.column] for split in _splits(tree)}:
                columns = [column for column, owner in enumerate(owner_D) if owner == name]
                permuted_TD = x_TD[unseen].copy()
                permuted_TD[:, columns] = permuted_TD[rng.permutation(len(unseen))][:, columns]
                losses[name] += before - self._log_likelihood(tree, panel.take(unseen), permuted_TD)
        importances = import_pandas().Series(losses, name="importance") / self.n_trees
        self.importances_ = importances.sort_values(ascending=False, kind="stable")
        return self

    def _grow(
        self, panel: Panel, x_TD: _Array, rows: npt.NDArray[Any], parameters_V: Tensor, depth: int
    ) -> Leaf | Split:
        own = panel.take(rows)
        cuts = [(c, cut) for c in range(x_TD.shape[1]) for cut in self._cuts(x_TD[rows, c])] if depth else []
        if not cuts:
            return Leaf(parameters_V)
        from scipy.stats import chi2

        below_CT = np.array([x_TD[rows, column] <= cut for column, cut in cuts])
        best = int(_score_statistics(self._scores(own, parameters_V), below_CT).argmax())
        sides = [rows[below_CT[best]], rows[~below_CT[best]]]
        fitted = [self._fit_leaf(panel, side, parameters_V) for side in sides]
        apart = sum(
            float(self._densities(panel.take(side), p).sum()) for side, p in zip(sides, fitted, strict=True)
        )
        ratio = 2 * (apart - float(self._densities(own, parameters_V).sum()))
        if chi2.sf(ratio, len(parameters_V)) * len(cuts) > self.alpha:
            return Leaf(parameters_V)
        low, high = (
            self._grow(panel, x_TD, side, p, depth - 1) for side, p in zip(sides, fitted, strict=True)
        )
        return Split(*cuts[best], low, high)

    def _cuts(self, x_T: _Array) -> list[float]:
        """Quantiles with at least `min_leaf` persons on both sides."""
        cuts = np.unique(np.quantile(x_T, _QUANTILES, method="lower"))
        below = (x_T[:, None] <= cuts).sum(0)
        return cuts[(below >= self.min_leaf) & (len(x_T) - below >= self.min_leaf)].tolist()  # type: ignore[no-any-return]

    def _fit_leaf(self, panel: Panel, rows: npt.NDArray[Any], start_V: Tensor) -> Tensor:
        vector_to_parameters(start_V.clone(), self._model.parameters())
        maximize_directly(self._model, panel.take(rows))
        return parameters_to_vector(self._model.parameters()).detach()

    def _densities(self, panel: Panel, parameters_V: Tensor) -> Tensor:
        vector_to_parameters(parameters_V.clone(), self._model.parameters())
        with torch.no_grad():
            return self._model.log_density(panel)[:, 0]

    def _scores(self, panel: Panel, parameters_V: Tensor) -> _Array:
        """[T, V] derivative of each person's log-likelihood."""

        def of_one(flat_V: Tensor, own: dict[str, Tensor]) -> Tensor:
            person = Panel(**{name: tensor[None] for name, tensor in own.items()}, persons=(0,))
            return evaluate_at(self._model, flat_V, lambda moved: moved.log_density(person)[0, 0])

        tensors = {name: tensor for name, tensor in vars(panel).items() if name != "persons"}
        scores_TV: _Array = vmap(grad(of_one), in_dims=(None, 0))(parameters_V, tensors).numpy()
        return scores_TV

    def _log_likelihood(self, tree: Leaf | Split, panel: Panel, x_TD: _Array) -> float:
        """Per person, nats."""
        total = 0.0
        for leaf, rows in _leaves(tree, x_TD, np.arange(len(panel))):
            if len(rows):
                total += float(self._densities(panel.take(rows), leaf.parameters).sum())
        return total / len(panel)


def _score_statistics(scores_TV: _Array, below_CT: npt.NDArray[np.bool_]) -> _Array:
    """[C] Lagrange multiplier statistic of a cut: does the model's score add up to 0 on both sides?"""
    sums_CV = below_CT @ scores_TV
    below_C = below_CT.sum(1)
    moved_CV = sums_CV @ np.linalg.pinv(scores_TV.T @ scores_TV, hermitian=True)
    persons = len(scores_TV)
    return (moved_CV * sums_CV).sum(1) * persons**2 / (below_C * (persons - below_C))  # type: ignore[no-any-return]


def _splits(tree: Leaf | Split) -> Iterator[Split]:
    if isinstance(tree, Split):
        yield tree
        yield from _splits(tree.low)
        yield from _splits(tree.high)


def _leaves(
    tree: Leaf | Split, x_TD: _Array, rows: npt.NDArray[Any]
) -> Iterator[tuple[Leaf, npt.NDArray[Any]]]:
    if isinstance(tree, Leaf):
        yield tree, rows
        return
    below = x_TD[rows, tree.column] <= tree.cut
    yield from _leaves(tree.low, x_TD, rows[below])
    yield from _leaves(tree.high, x_TD, rows[~below])
