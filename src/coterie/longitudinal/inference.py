"""What a fitted mixture says: its parameters by name, in the table's units, with standard errors."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.data import import_pandas
from coterie.longitudinal.growth_mixture import GrowthMixture

if TYPE_CHECKING:
    import pandas as pd

_Array = npt.NDArray[np.float64]


def parameter_vector(model: GrowthMixture) -> Tensor:
    """All parameters in the table's units, in the order of `parameter_names`; differentiable."""
    natural = model.natural()
    factors = len(model.scale_P)
    row, column = torch.tril_indices(factors, factors)
    blocks = [natural["coefficients"].flatten(1)]
    if "bend" in natural:
        blocks.append(natural["bend"][:, None])
    if "tvc" in natural:
        blocks.append(natural["tvc"])
    blocks += [natural["covariance"][:, row, column], natural["residual"][:, None]]
    if "covariate_mean" in natural:
        width = natural["covariate_mean"].shape[1]
        row, column = torch.tril_indices(width, width)
        blocks += [natural["covariate_mean"], natural["covariate_covariance"][:, row, column]]
    return torch.cat([natural["gate"].flatten(), torch.cat(blocks, dim=1).flatten()])


def parameter_names(
    model: GrowthMixture, gate: Sequence[str], experts: Sequence[str], tvc: Sequence[str]
) -> list[tuple[str, str]]:
    """(where, parameter) of each entry of `parameter_vector`; `gate` and `experts` begin with "Intercept"."""
    factors = model.curve.factors
    own = [factor if name == "Intercept" else f"{factor} ~ {name}" for factor in factors for name in experts]
    own += [model.curve.bend] if model.curve.bend else []
    own += [f"score ~ {name}" for name in tvc]
    own += [*_covariances(factors), "residual variance"]
    if model.joint:
        own += [f"mean({name})" for name in experts[1:]] + _covariances(experts[1:])
    classes = range(1, model.num_classes + 1)
    return [(f"gate {k} vs 1", name) for k in classes[1:] for name in gate] + [
        (f"class {k}", name) for k in classes for name in own
    ]


def _covariances(names: Sequence[str]) -> list[str]:
    return [f"var({a})" if a == b else f"cov({b}, {a})" for i, a in enumerate(names) for b in names[: i + 1]]


def summary_table(
    names: Sequence[tuple[str, str]], estimates_N: _Array, covariance_NN: _Array
) -> "pd.DataFrame":
    """estimate, se, z, p and the 95% interval [low, high] of each parameter, indexed by (where, parameter).

    Wald statistics: z = estimate / se, interval estimate ± 1.96 se.
    """
    from scipy.stats import norm

    pd = import_pandas()
    se_N = np.sqrt(np.diag(covariance_NN))
    z_N = estimates_N / se_N
    half_N = norm.ppf(0.975) * se_N
    columns = {
        "estimate": estimates_N,
        "se": se_N,
        "z": z_N,
        "p": 2 * norm.sf(np.abs(z_N)),
        "low": estimates_N - half_N,
        "high": estimates_N + half_N,
    }
    return pd.DataFrame(columns, index=pd.MultiIndex.from_tuples(names, names=["where", "parameter"]))


def summary_text(header: Mapping[str, str], table: "pd.DataFrame") -> str:
    """Header lines, then a line per parameter under its part of the model; log odds with odds ratios."""
    rule = "=" * 96
    lines = [rule, *(f"{name + ':':<30}{value}" for name, value in header.items()), rule]
    for where, part in table.groupby(level="where", sort=False):
        gate = str(where).startswith("gate")
        titles = ("estimate", "std err", "z", "P>|z|", "[0.025", "0.975]", *(["odds ratio"] if gate else []))
        title = f"{where} (log odds)" if gate else str(where)
        lines.append(f"{title:<30}" + "".join(f"{title:>11}" for title in titles))
        for (_, name), row in part.iterrows():
            numbers = [f"{row[column]:>11.4g}" for column in ("estimate", "se", "z")]
            numbers += [f"{row['p']:>11.3f}", *(f"{row[column]:>11.4g}" for column in ("low", "high"))]
            numbers += [f"{np.exp(row['estimate']):>11.4g}"] if gate else []
            lines.append(f"  {name:<28}" + "".join(numbers))
        lines.append("-" * 96)
    return "\n".join([*lines[:-1], rule])
