"""Two experiments on the paper's simulated study; each arm's name says which.

variants: 500 persons of two classes, ten occasions, knots at 3.5 and 5.5; two covariates multiply the odds of
the second class by 1.5 and 1.7, two others explain 13% and 26% of the growth factors' variance. The four
nested models of the paper (covariates in gate and experts, in one of them, in neither) are fitted from
three starts, and compared by BIC and by the log-likelihood of 1000 fresh persons.

recovery: the full model on ten more data sets per seed, one start each: bias and coverage of the 95%
intervals, pooled over all 37 parameters. `em` fits the first of them by EM, from the same start.

The paper runs 1000 replications per condition in OpenMx, with the covariates modelled jointly with the
scores; here the experts are conditioned on them. With `--data`, `variants` runs on a table of one's own, a
fifth of its
persons held out: wide (Y1, Y2, …, T1, T2, …) or long (id, time, y), covariates of the gate in columns gx1,
gx2, …, of the experts in ex1, ex2, …; `recovery` stays as it is.
"""

import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from coterie.data import read_table
from coterie.longitudinal import TrajectoryMoE, simulate_trajectories
from coterie.longitudinal.simulate import (
    EFFECTS,
    KNOTS,
    LOG_ODDS,
    MEANS,
    RESIDUAL_VARIANCE,
    unexplained_covariance,
)
from coterie.reproduce import Budget, Card, Claim, Plot, Values

if TYPE_CHECKING:
    import pandas as pd

CARD = Card(
    slug="moe-trajectories",
    title="Extending Mixture of Experts Model to Investigate Heterogeneity of Trajectories: When, Where and "
    "How to Add Which Covariates",
    authors="Liu, Perera",
    year=2022,
    venue="Psychological Methods",
    area="longitudinal",
    methods=("growth mixture model", "multinomial logit gate", "bilinear spline", "EM", "SEM forest"),
    problem="Which covariates say who belongs to which latent class of development, and which say why "
    "persons of one class differ?",
    headline="Estimates are close to unbiased and precise, with interval coverage near the nominal 95%.",
    code="https://github.com/Veronica0206/Extension_projects",
)
SEEDS = 6

PERSONS = {"smoke": 120, "standard": 500, "full": 500}
STARTS = {"smoke": 1, "standard": 3, "full": 10}
REPLICATIONS = {"smoke": 1, "standard": 10, "full": 100}


@dataclass(frozen=True, eq=False)
class Study:
    """A user's table: its covariates by role, and the estimator's arguments that say where its scores are."""

    frame: "pd.DataFrame"
    gate: str
    experts: str
    columns: dict[str, str]


Variant = Literal["full", "experts", "gate", "none"]


def variant(seed: int, budget: Budget, data: Study | None, *, kind: Variant) -> Values:
    """Fits one of the nested models and measures it on persons it has not seen."""
    model, test = fitted(seed, budget, data, kind)
    others: tuple[Variant, ...] = ("full", "experts", "gate", "none")
    best = min(others, key=lambda other: fitted(seed, budget, data, other)[0].bic_)
    held_out = model.score(test)
    values: dict[str, Any] = {
        "held-out nats": held_out,
        "BIC": model.bic_,
        "lowest BIC": float(best == kind),
        "entropy": model.entropy_,
        "smallest class": float(model.expert_usage_.min()),
        "held-out nats by BIC": [(model.bic_, held_out)],
    }
    if "class" in test.columns and data is None:
        values["held-out accuracy"] = float((model.predict(test) == test["class"]).mean())
    return values


def recovery(seed: int, budget: Budget, data: Any, *, method: Literal["lbfgs", "em"]) -> Values:
    """Fits the full model to fresh data sets of which the truth is known."""
    truth = true_parameters()
    errors, knots, slopes = [], [], []
    replications = REPLICATIONS[budget] if method == "lbfgs" else 1
    for replication in range(replications):
        frame = simulate_trajectories(PERSONS[budget], seed=10_000 + 1000 * seed + replication)
        model = TrajectoryMoE(2, gate="gx1 + gx2", experts="ex1 + ex2", n_init=1, method=method).fit(frame)
        table = model.summary_
        truth_N = np.array([truth[name] for name in table.index])
        errors.append(((table["estimate"] - truth_N) / table["se"]).to_numpy())
        knots.append(table["estimate"].xs("knot", level="parameter").to_numpy())
        slopes.append(table["estimate"].loc["gate 2 vs 1"].to_numpy()[1:])
        if replication == 0:
            first = model.log_likelihood_
    z_RN = np.array(errors)
    covered_RN = np.abs(z_RN) <= 1.96
    bends = np.array([name == "knot" for _, name in table.index])
    knot_1, knot_2 = np.mean(knots, axis=0)
    slope_1, slope_2 = np.mean(slopes, axis=0)
    normal_Q = np.array([0.01, 0.025, 0.05, *np.arange(0.1, 0.95, 0.1), 0.95, 0.975, 0.99])
    return {
        "log-likelihood of the first data set": first,
        "knot 1": knot_1,
        "knot 2": knot_2,
        "gate slope 1": slope_1,
        "gate slope 2": slope_2,
        "coverage": float(covered_RN.mean()),
        "coverage of knots": float(covered_RN[:, bends].mean()),
        "error over its standard error": [
            *zip(normal_quantiles(normal_Q), np.quantile(z_RN, normal_Q), strict=True)
        ],
    }


ARMS = {
    "variants/full": partial(variant, kind="full"),
    "variants/experts": partial(variant, kind="experts"),
    "variants/gate": partial(variant, kind="gate"),
    "variants/none": partial(variant, kind="none"),
    "recovery/lbfgs": partial(recovery, method="lbfgs"),
    "recovery/em": partial(recovery, method="em"),
}

CLAIMS = [
    Claim(
        "covariates in gate and experts gain at least 0.10 held-out nats per person on none",
        lambda arms: arms["variants/full"]["held-out nats"] - arms["variants/none"]["held-out nats"],
        at_least=0.10,
    ),
    Claim(
        "covariates in the experts gain at least 0.08 held-out nats per person on the gate's alone",
        lambda arms: arms["variants/full"]["held-out nats"] - arms["variants/gate"]["held-out nats"],
        at_least=0.08,
    ),
    Claim(
        "the full model has the lowest BIC of the four on at least five seeds of six",
        lambda arms: arms["variants/full"]["lowest BIC"],
        at_least=5 / 6,
    ),
    Claim(
        "the mean estimate of either knot is within 0.08 of the truth",
        lambda arms: max(
            abs(arms["recovery/lbfgs"]["knot 1"] - KNOTS[0]), abs(arms["recovery/lbfgs"]["knot 2"] - KNOTS[1])
        ),
        at_most=0.08,
    ),
    Claim(
        "the 95% intervals of the knots hold the truth at least 85% of the time",
        lambda arms: arms["recovery/lbfgs"]["coverage of knots"],
        at_least=0.85,
    ),
    Claim(
        "the mean estimate of either gate slope is within 0.25 of ln 1.5 and ln 1.7",
        lambda arms: max(
            abs(arms["recovery/lbfgs"]["gate slope 1"] - LOG_ODDS[0]),
            abs(arms["recovery/lbfgs"]["gate slope 2"] - LOG_ODDS[1]),
        ),
        at_most=0.25,
    ),
    Claim(
        "the 95% intervals of all parameters together hold the truth 92% to 98% of the time",
        lambda arms: abs(arms["recovery/lbfgs"]["coverage"] - 0.95),
        at_most=0.03,
    ),
    Claim(
        "EM and L-BFGS reach the same log-likelihood, to 0.001 nats, on every seed",
        lambda arms: abs(
            arms["recovery/lbfgs"]["log-likelihood of the first data set"]
            - arms["recovery/em"]["log-likelihood of the first data set"]
        ),
        at_most=1e-3,
        over="each seed",
    ),
]

PLOTS = [
    Plot(
        "held-out nats by BIC",
        x="BIC",
        y="held-out log-likelihood per person, nats",
        points=True,
        note="Left and up is better. The experts' covariates buy most, the gate's a little on top.",
    ),
    Plot(
        "error over its standard error",
        x="quantile of the normal distribution",
        y="quantile of (estimate - truth) / standard error",
        arms=("recovery/lbfgs",),
        note="All parameters pooled: on the diagonal, intervals of every level hold what they say.",
    ),
]


@cache
def fitted(
    seed: int, budget: Budget, data: Study | None, kind: Variant
) -> tuple[TrajectoryMoE, "pd.DataFrame"]:
    """A variant's model and the persons it has not seen. Kept: every arm asks who has the lowest BIC."""
    if data is None:
        study = Study(simulate_trajectories(PERSONS[budget], seed=seed), "gx1 + gx2", "ex1 + ex2", {})
        training, test = study.frame, simulate_trajectories(2 * PERSONS[budget], seed=1000 + seed)
    else:
        study = data
        person = study.frame[study.columns["person"]] if study.columns else study.frame.index
        persons = np.unique(person)
        drawn = np.random.default_rng(seed).choice(persons, round(0.2 * len(persons)), replace=False)
        unseen = np.isin(person, drawn)
        training, test = study.frame[~unseen], study.frame[unseen]
    model = TrajectoryMoE(
        2,
        gate=study.gate if kind in ("full", "gate") else "",
        experts=study.experts if kind in ("full", "experts") else "",
        n_init=STARTS[budget],
        random_state=seed,
        y=study.columns.get("y", "Y"),
        t=study.columns.get("t", "T"),
        person=study.columns.get("person"),
    )
    return model.fit(training), test


def true_parameters() -> dict[tuple[str, str], float]:
    """The generator's parameters under the names of `TrajectoryMoE.summary_`."""
    truth = {
        ("gate 2 vs 1", name): value
        for name, value in zip(("Intercept", "gx1", "gx2"), (0, *LOG_ODDS), strict=True)
    }
    factors = ("intercept", "slope 1", "slope 2")
    for k, covariance_PP in enumerate(unexplained_covariance()):
        own = {"knot": KNOTS[k], "residual variance": RESIDUAL_VARIANCE}
        for p, factor in enumerate(factors):
            own[factor] = MEANS[k, p]
            own |= {f"{factor} ~ ex{c + 1}": EFFECTS[k, p, c] for c in range(2)}
            own[f"var({factor})"] = covariance_PP[p, p]
            own |= {f"cov({factors[q]}, {factor})": covariance_PP[p, q] for q in range(p)}
        truth |= {(f"class {k + 1}", name): value for name, value in own.items()}
    return truth


def normal_quantiles(levels: "np.ndarray[Any, Any]") -> list[float]:
    from scipy.stats import norm

    return [float(value) for value in norm.ppf(levels)]


def read_data(path: Path) -> Study:
    """A wide or a long table with covariates gx1, gx2, … and ex1, ex2, …

    Raises ValueError: a file of R, an unreadable table, or no such columns.
    """
    if path.suffix.lower() in (".rdata", ".rda", ".rds"):
        raise ValueError(
            f"{path} is a file of R; write its table as CSV there: "
            "write.csv(TABLE, 'data.csv', row.names = FALSE)"
        )
    frame = read_table(path)
    names = [str(name) for name in frame.columns]
    gate, experts = (
        " + ".join(name for name in names if re.fullmatch(rf"{prefix}\d+", name)) for prefix in ("gx", "ex")
    )
    there = f"it has {', '.join(names[:20])}"
    if not gate or not experts:
        lacking = "ex1, ex2, … of the experts" if gate else "gx1, gx2, … of the gate"
        raise ValueError(f"{path} lacks columns {lacking}; {there}")
    if {"id", "time", "y"} <= {*names}:
        return Study(frame, gate, experts, {"person": "id", "t": "time", "y": "y"})
    if not {"Y1", "T1"} <= {*names}:
        raise ValueError(
            f"{path} has neither Y1, Y2, … and T1, T2, … (wide) nor id, time and y (long); {there}"
        )
    return Study(frame, gate, experts, {})
