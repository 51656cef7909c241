"""`coterie fit aw-moe`: ranks items for users from a log of ratings or clicks."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data import check_columns, read_table
from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted
from coterie.recsys.aw_moe_ranker import AWMoERanker
from coterie.recsys.metrics import auc, gauc, ndcg

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ("target", "group", "item", "time")
TAKES = ()
OPTIONS = AWMoERanker


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    """Holds out the last fifth by time; histories of its rows go up to each row's time."""
    if len(columns.target) != 1:
        raise ValueError(f"aw-moe has one target; given {', '.join(columns.target)}")
    names: dict[str, Any] = {
        "user": columns.group,
        "item": columns.item,
        "time": columns.time,
        "target": columns.target[0],
    }
    twice = {*names} & {*options}
    if twice:
        raise ValueError(f"--set {sorted(twice)[0]}: give the column as --group, --item, --time or --target")
    frame = read_table(data)
    check_columns(frame, [str(name) for name in names.values()], str(data))
    frame = frame.sort_values(str(columns.time), kind="stable")
    train, held_out = frame.iloc[: len(frame) * 4 // 5], frame.iloc[len(frame) * 4 // 5 :]
    ranker = AWMoERanker(**names, **options).fit(train)
    label = (held_out[names["target"]] >= ranker.threshold).to_numpy(dtype=float)
    score, users = ranker.predict_proba(held_out, since=held_out), held_out[columns.group]
    lengths = (ranker.encode(held_out, held_out)[0] > 0).sum(1).numpy()
    tail = lengths <= ranker.history // 4
    within, skipped = gauc(label, score, users)
    report: dict[str, float | int | str] = {
        "rows to learn from": len(train),
        "rows held out": len(held_out),
        "AUC": auc(label, score),
        f"GAUC ({skipped} users left out)": within,
        "NDCG@10": ndcg(label, score, users),
        f"AUC, at most {ranker.history // 4} liked before": auc(label[tail], score[tail]),
        "rows of those": int(tail.sum()),
        "AUC, more liked before": auc(label[~tail], score[~tail]),
        "parameters": ranker.num_parameters_,
    }
    return Fitted(ranker, report, {"gate": ranker.expert_usage_.tolist()})


def predict(folder: Path, data: Path, columns: Columns) -> "Iterator[pd.DataFrame]":
    """Probability of a positive outcome; outcomes in the file, if there are any, enter later histories."""
    ranker, frame = AWMoERanker.load(folder), read_table(data)
    since = frame if ranker.target in frame else None
    yield frame[[ranker.user, ranker.item, ranker.time]].assign(
        probability=ranker.predict_proba(frame, since)
    )
