"""`coterie fit home-mtl`: several behaviours per user, each target written as column:category."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data import check_columns, read_table, table_chunks
from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted
from coterie.recsys.home_mtl import MultiTaskMoEClassifier
from coterie.recsys.metrics import auc, gauc

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ("target",)
TAKES = ("group", "item", "time", "features")
OPTIONS = MultiTaskMoEClassifier


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    """Holds out the last fifth by time, or a random fifth of the rows where there is no time."""
    columns, categories = _split_targets(columns)
    frame = read_table(data)
    features = _features(frame, columns, data)
    order = np.random.default_rng(0).permutation(len(frame))
    if columns.time:
        order = frame[columns.time].to_numpy().argsort(kind="stable")
    cut = len(order) * 4 // 5
    train, held_out = np.sort(order[:cut]), np.sort(order[cut:])
    tasks = list(columns.target)
    ids = [name for name in (columns.group, columns.item) if name]
    ranker = MultiTaskMoEClassifier(categories=categories, ids=ids, **options)
    ranker.fit(features.iloc[train], frame[tasks].iloc[train])
    scores, labels = ranker.predict_proba(features.iloc[held_out]), frame.iloc[held_out]
    report: dict[str, float | int | str] = {"rows to learn from": cut, "rows held out": len(held_out)}
    for number, task in enumerate(tasks):
        report[f"AUC {task}"] = auc(labels[task], scores[:, number])
        if columns.group:
            within, skipped = gauc(labels[task], scores[:, number], labels[columns.group])
            report[f"GAUC {task} ({skipped} users left out)"] = within
    report["parameters"] = ranker.num_parameters_
    return Fitted(ranker, report, {task: shares.tolist() for task, shares in ranker.expert_usage_.items()})


def predict(folder: Path, data: Path, columns: Columns) -> "Iterator[pd.DataFrame]":
    """A column of probabilities per task."""
    ranker = MultiTaskMoEClassifier.load(folder)
    for chunk in table_chunks(data, 50_000):
        yield chunk.assign(
            **{
                f"p_{task}": column
                for task, column in zip(ranker.tasks_, ranker.predict_proba(chunk).T, strict=True)
            }
        )[[f"p_{task}" for task in ranker.tasks_]]


def _split_targets(columns: Columns) -> tuple[Columns, dict[str, str] | None]:
    """`click:watch` is the column click in the category watch."""
    parts = [target.rpartition(":") if ":" in target else (target, "", "") for target in columns.target]
    names = [name for name, _, _ in parts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"--target {sorted(twice)[0]} is given twice; a task is in exactly one category")
    categories = {name: category for name, _, category in parts if category}
    if categories and len(categories) < len(names):
        lost = next(name for name in names if name not in categories)
        raise ValueError(f"--target {lost} has no category; write --target {lost}:CATEGORY")
    return replace(columns, target=tuple(names)), categories or None


def _features(frame: "pd.DataFrame", columns: Columns, data: Path) -> "pd.DataFrame":
    ids = [name for name in (columns.group, columns.item) if name]
    named = [*columns.target, *ids, *([columns.time] if columns.time else []), *columns.features]
    check_columns(frame, named, str(data))
    return frame[[*ids, *columns.feature_names(list(frame.columns))]]
