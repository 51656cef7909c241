"""Solutions side by side: entropy, alignment, agreement, information criteria, the number of classes."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from coterie.data import import_pandas
from coterie.longitudinal.fitting import DegenerateClassError
from coterie.nn.permutation import round_to_permutation

if TYPE_CHECKING:
    import pandas as pd

    from coterie.longitudinal.trajectory_moe import TrajectoryMoE


def entropy_index(weights_TK: Tensor) -> float:
    """1 for certain classes (a single one is), 0 for even ones: 1 - Σ -r log r / (T log K).

    >>> round(entropy_index(torch.tensor([[1.0, 0.0], [0.5, 0.5]])), 3)
    0.5
    """
    persons, classes = weights_TK.shape
    if classes == 1:
        return 1.0
    return 1 - float(torch.special.entr(weights_TK).sum()) / (persons * float(np.log(classes)))


def align_classes(reference_TK: Tensor, other_TK: Tensor) -> list[int]:
    """For each class of a solution, the class of another one over the same persons that means the same.

    Args:
        reference_TK: responsibilities of the one solution.
        other_TK: of the other.

    >>> align_classes(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    [1, 0]
    """
    if reference_TK.shape != other_TK.shape:
        raise ValueError(
            f"responsibilities of shapes {tuple(reference_TK.shape)} and {tuple(other_TK.shape)}; "
            "align solutions with equally many classes over the same persons"
        )
    return [int(k) for k in round_to_permutation(reference_TK.mT @ other_TK)]


def latent_kappa(model_a: "TrajectoryMoE", model_b: "TrajectoryMoE", frame: "pd.DataFrame") -> float:
    """Agreement of two solutions about who belongs to which class, beyond chance: 1 is perfect, 0 is chance.

    Cohen's kappa of the most probable classes, after the classes of the second are aligned with the first's.

    Args:
        model_a: fitted.
        model_b: fitted, with equally many classes.
        frame: persons, with the columns of both.

    Source: Dumenci 2011; Liu & Perera 2022 use it to compare solutions with and without covariates.
    """
    weights = [model.posterior(frame).weights for model in (model_a, model_b)]
    order = align_classes(*weights)
    a_T, b_T = weights[0].argmax(1), weights[1][:, order].argmax(1)
    cells = (a_T * len(order) + b_T).bincount(minlength=len(order) ** 2)
    table_KK = cells.view(len(order), len(order)).double() / len(a_T)
    agreed, expected = float((a_T == b_T).double().mean()), float(table_KK.sum(0) @ table_KK.sum(1))
    return 1.0 if expected == 1 else (agreed - expected) / (1 - expected)


def compare_fits(models: Mapping[Any, "TrajectoryMoE"]) -> "pd.DataFrame":
    """One row per model, best BIC first: log-likelihood, parameters, AIC, BIC, entropy, smallest class.

    Raises ValueError for models whose likelihoods are of different data: other persons or scores, or
    covariates that one models jointly and the other conditions on.
    """
    kinds = {}
    for name, model in models.items():
        modelled = tuple(model.expert_covariates_.names[1:]) if model.covariates == "joint" else ()
        kinds[name] = (model.num_persons_, model.num_scores_, modelled)
    if len(set(kinds.values())) > 1:
        described = "; ".join(
            f"{name}: {persons} persons, {scores} scores, modelled covariates: {', '.join(joint) or 'none'}"
            for name, (persons, scores, joint) in kinds.items()
        )
        raise ValueError(f"BIC compares likelihoods of the same data; these differ: {described}")
    rows = {
        name: {
            "classes": model.n_classes,
            "log_likelihood": model.log_likelihood_,
            "parameters": model.num_parameters_,
            "AIC": model.aic_,
            "BIC": model.bic_,
            "entropy": model.entropy_,
            "smallest_class": float(model.expert_usage_.min()),
        }
        for name, model in models.items()
    }
    return import_pandas().DataFrame.from_dict(rows, orient="index").sort_values("BIC")


def select_n_classes(
    frame: "pd.DataFrame", ks: Iterable[int] = range(1, 5), **options: Any
) -> "pd.DataFrame":
    """Fits K = 1, 2, … classes and compares them, best BIC first; the index is K.

    Choose K so that the smallest class keeps at least 5% of the persons, without covariates; add these after.

    Args:
        frame: the table.
        ks: numbers of classes.
        options: of `TrajectoryMoE`. Covariates among them are warned about: classes would mean something else
            for each K.

    A K for which every start loses a class is left out with a warning.
    """
    from coterie.longitudinal.trajectory_moe import TrajectoryMoE

    if options.get("gate") or options.get("experts"):
        warnings.warn(
            "the number of classes is chosen with covariates on, which changes what the classes mean; "
            "choose it without gate= and experts=, then add them",
            stacklevel=2,
        )
    models: dict[int, TrajectoryMoE] = {}
    for k in ks:
        try:
            models[k] = TrajectoryMoE(k, **options).fit(frame)
        except DegenerateClassError as error:
            warnings.warn(f"{k} classes are left out: {error}", stacklevel=2)
    return compare_fits(models).rename_axis("K")
