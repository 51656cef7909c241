"""FEAMOE on COMPAS beside what is used today: `python -m benchmarks.feamoe_compas --data FILE [--json FILE]`.

FILE is ProPublica's compas-scores-two-years.csv, read with its filters (`coterie.data.compas`); of its rows
those of the two large groups, African-American and Caucasian. The label is two_year_recid; race is no feature
of any model. Five random 70/30 splits. Everything is at its defaults save what its name says: scikit-learn's
logistic regression, and a multilayer perceptron with 32 hidden units and early stopping; Fairlearn's
ExponentiatedGradient over logistic regression, whose predictions are drawn at random among several
classifiers (seeded), so that no AUC is given; "bound 0.1" allows a gap of 0.1 in training, its default is
0.01. All but FEAMOE, which encodes frames itself, see features of `TableEncoder`. Gaps are of hard decisions.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fairlearn.reductions import DemographicParity, EqualizedOdds, ExponentiatedGradient
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from coterie.data import TableEncoder, compas, read_table
from coterie.report import print_table
from coterie.reproduce.run import environment
from coterie.tabular import FEAMOEClassifier, fairness_report

MEASURED = ("accuracy", "auc", "dp gap", "eo gap", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="compas-scores-two-years.csv")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    options = parser.parse_args()
    table = compas(read_table(options.data))
    table = table[table["race"].isin(["African-American", "Caucasian"])].reset_index(drop=True)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in models(0)}
    for seed in range(options.splits):
        order = np.random.default_rng(seed).permutation(len(table))
        cut = int(0.7 * len(table))
        train, test = split(table.iloc[order[:cut]]), split(table.iloc[order[cut:]])
        for name, run in models(seed).items():
            measured[name].append(measure(run, train, test))
    rows = [
        [name, *(spread([run[m] for run in runs if m in run]) for m in MEASURED)]
        for name, runs in measured.items()
    ]
    print_table(f"COMPAS, {len(table)} rows, {options.splits} splits", ["model", *MEASURED], rows)
    if options.json is not None:
        content = {"rows": len(table), "splits": options.splits, **environment(), "models": measured}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


Split = tuple[Any, np.ndarray, np.ndarray]  # features, label, group
Run = Callable[[Split, Split], tuple[np.ndarray, np.ndarray | None]]  # decisions and scores on the second


def split(table: Any) -> Split:
    return (
        table.drop(columns=["race", "two_year_recid"]),
        table["two_year_recid"].to_numpy(),
        table["race"].to_numpy(),
    )


def measure(run: Run, train: Split, test: Split) -> dict[str, float]:
    began = time.perf_counter()
    decisions, scores = run(train, test)
    seconds = time.perf_counter() - began
    return {**fairness_report(test[1], decisions, test[2], scores), "seconds": seconds}


def models(seed: int) -> dict[str, Run]:
    def plain(model: Any) -> Run:
        def run(train: Split, test: Split) -> tuple[np.ndarray, np.ndarray]:
            encoder = TableEncoder().fit(train[0])
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a model that did not converge is no comparison
                model.fit(encoder.transform(train[0]), train[1])
            x = encoder.transform(test[0])
            return model.predict(x), model.predict_proba(x)[:, 1]

        return run

    def reduced(constraint: Any) -> Run:
        def run(train: Split, test: Split) -> tuple[np.ndarray, None]:
            encoder = TableEncoder().fit(train[0])
            model = ExponentiatedGradient(LogisticRegression(), constraint)
            model.fit(encoder.transform(train[0]), train[1], sensitive_features=train[2])
            return np.asarray(model.predict(encoder.transform(test[0]), random_state=seed)), None

        return run

    def feamoe(**options: Any) -> Run:
        def run(train: Split, test: Split) -> tuple[np.ndarray, np.ndarray]:
            model = FEAMOEClassifier(random_state=seed, **options).fit(train[0], train[1], sensitive=train[2])
            return model.predict(test[0]), model.predict_proba(test[0])[:, 1]

        return run

    return {
        "logistic regression": plain(LogisticRegression()),
        "multilayer perceptron": plain(MLPClassifier(32, early_stopping=True, random_state=seed)),
        "Fairlearn, dp": reduced(DemographicParity()),
        "Fairlearn, dp, bound 0.1": reduced(DemographicParity(difference_bound=0.1)),
        "Fairlearn, eo": reduced(EqualizedOdds()),
        "Fairlearn, eo, bound 0.1": reduced(EqualizedOdds(difference_bound=0.1)),
        "FEAMOE, lam=0": feamoe(lam=0.0),
        **{
            f"FEAMOE, {fairness}, lam={lam}": feamoe(fairness=fairness, lam=lam)
            for fairness in ("dp", "eo")
            for lam in (0.25, 0.5, 1.0, 2.0)
        },
    }


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if values else "–"


if __name__ == "__main__":
    main()
