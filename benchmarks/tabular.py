"""COMET's and FEAMOE's estimators beside scikit-learn's MLP, with as many parameters, and gradient boosting.

    python -m benchmarks.tabular [--quick] [--json FILE]

Tables that scikit-learn has built in; a quarter of the rows is held out, five random splits. Every method
has its defaults; the MLP's one hidden layer is as wide as the number of parameters allows, and it gets
standardised features and targets, as COMET makes them for itself. Scores are accuracy, or R² for numbers;
seconds are of `fit` on one thread, the methods one after the other on each split.
"""

import argparse
import json
import time
import warnings
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    make_classification,
    make_friedman1,
)
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from coterie.models import count_parameters
from coterie.tabular import COMETClassifier, COMETRegressor, FEAMOEClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one split, the small tables")
    parser.add_argument("--json", help="write the rows here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    rows = []
    with threadpool_limits(1):
        for name, (x, y), classes in tables(arguments.quick):
            for split in range(1 if arguments.quick else 5):
                rows += measure(name, x, y, classes, split)
    summary = summarize(rows)
    show(summary)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(summary, file, indent=1)


def tables(quick: bool) -> list[tuple[str, tuple[Any, Any], bool]]:
    """name, (x, y), whether y are classes"""
    small = [
        ("breast cancer", load_breast_cancer(return_X_y=True), True),
        ("diabetes", load_diabetes(return_X_y=True), False),
    ]
    hidden_classes = make_classification(
        20_000, 20, n_informative=12, n_classes=4, n_clusters_per_class=4, class_sep=1.5, random_state=0
    )
    return (
        small
        if quick
        else [
            *small,
            ("digits", load_digits(return_X_y=True), True),
            ("friedman1, 10 000 rows", make_friedman1(10_000, noise=1.0, random_state=0), False),
            ("clusters, 20 000 rows", hidden_classes, True),
        ]
    )


def measure(name: str, x: Any, y: Any, classes: bool, split: int) -> list[dict[str, Any]]:
    x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=split)
    comet = (COMETClassifier if classes else COMETRegressor)(random_state=split)
    seconds = clock(comet, x_train, y_train)
    parameters = count_parameters(comet._model)
    inputs, outputs = x.shape[1], len(np.unique(y)) if classes else 1
    outputs = 1 if outputs == 2 else outputs
    width = max(round((parameters - outputs) / (inputs + 1 + outputs)), 1)
    network = (MLPClassifier if classes else MLPRegressor)(hidden_layer_sizes=(width,), random_state=split)
    mlp = make_pipeline(
        StandardScaler(),
        network if classes else TransformedTargetRegressor(network, transformer=StandardScaler()),
    )
    boosting = (HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor)(
        random_state=split
    )
    others = [("MLP", mlp), ("gradient boosting", boosting)]
    rows = [row(name, "COMET", comet, seconds, x_test, y_test, parameters, comet.n_iter_)]
    for method, model in others:
        taken = clock(model, x_train, y_train)
        epochs = size = None
        if method == "MLP":
            fitted = mlp[-1] if classes else mlp[-1].regressor_
            epochs, size = fitted.n_iter_, sum(w.size for w in [*fitted.coefs_, *fitted.intercepts_])
        rows.append(row(name, method, model, taken, x_test, y_test, size, epochs))
    if outputs == 1 and classes:
        rows += measure_feamoe(name, x_train, y_train, x_test, y_test, split)
    rows[0]["experts per row"] = float((comet.experts_of(x_test) > 1e-5).sum(1).mean())
    return rows


def measure_feamoe(name: str, x: Any, y: Any, x_test: Any, y_test: Any, split: int) -> list[dict[str, Any]]:
    """FEAMOE without a penalty, and an MLP of as many parameters."""
    feamoe = FEAMOEClassifier(fairness=None, random_state=split)
    seconds = clock(feamoe, x, y)
    parameters = count_parameters(feamoe._learner.mixture.model)
    width = max(round((parameters - 1) / (x.shape[1] + 2)), 1)
    network = MLPClassifier(hidden_layer_sizes=(width,), random_state=split)
    mlp = make_pipeline(StandardScaler(), network)
    taken = clock(mlp, x, y)
    size = sum(w.size for w in [*network.coefs_, *network.intercepts_])
    return [
        row(name, "FEAMOE", feamoe, seconds, x_test, y_test, parameters, None),
        row(name, "MLP of FEAMOE's size", mlp, taken, x_test, y_test, size, network.n_iter_),
    ]


def clock(model: Any, x: Any, y: Any) -> float:
    begun = time.perf_counter()
    model.fit(x, y)
    return time.perf_counter() - begun


def row(
    name: str,
    method: str,
    model: Any,
    seconds: float,
    x: Any,
    y: Any,
    parameters: int | None,
    epochs: int | None,
) -> dict[str, Any]:
    score = float(model.score(x, y))
    found = {"table": name, "method": method, "score": score, "seconds": seconds, "parameters": parameters}
    return {**found, "epochs": epochs}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    summary = []
    for table, method in dict.fromkeys((row["table"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["table"], row["method"]) == (table, method)]
        scores = [row["score"] for row in mine]
        found = {"table": table, "method": method, "score": np.mean(scores), "sd": np.std(scores)}
        for key in ("seconds", "parameters", "epochs", "experts per row"):
            values = [row[key] for row in mine if row.get(key) is not None]
            found[key] = float(np.mean(values)) if values else None
        summary.append(found)
    for line in summary:
        beside = {"COMET": "MLP", "FEAMOE": "MLP of FEAMOE's size"}.get(line["method"])
        if beside is None:
            continue
        [mlp] = [o for o in summary if o["table"] == line["table"] and o["method"] == beside]
        line["seconds over MLP"] = line["seconds"] / mlp["seconds"]
        if line["epochs"]:
            per_epoch = (line["seconds"] / line["epochs"]) / (mlp["seconds"] / mlp["epochs"])
            line["seconds per epoch over MLP"] = per_epoch
    return summary


def show(summary: list[dict[str, Any]]) -> None:
    table = Table(
        "table",
        "method",
        "score",
        "fit, s",
        "epochs",
        "parameters",
        "experts per row",
        "time / MLP",
        "per epoch",
    )
    for line in summary:
        optional = [line[key] for key in ("epochs", "parameters", "experts per row")]
        ratios = [line.get("seconds over MLP"), line.get("seconds per epoch over MLP")]
        cells = ["" if v is None else f"{v:.0f}" if v >= 100 else f"{v:.2g}" for v in [*optional, *ratios]]
        score = f"{line['score']:.3f} ± {line['sd']:.3f}"
        table.add_row(line["table"], line["method"], score, f"{line['seconds']:.2f}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
