"""Rankers on MovieLens 100K: multi-task layouts, rankers with a history, and how fast they train.

    python -m benchmarks.rankers --data ml-100k.inter [--seeds 3] [--epochs 4] [--json FILE]

The first 80% of the ratings by time are learnt from, the last 20% are the test; most users of the test are
new, so that what is known of them is what they rated a moment before. Both kinds of ranker look only at what
is strictly earlier than the row.

Multi-task: "like" (rating ≥ 4) and "love" (rating = 5) in one category, "dislike" (rating ≤ 2) in another,
from user, item, and how many ratings of what mean both had before. History: "like" from the last 20 liked
films; the tail are rows with at most 5. Speed: a training step on the same batch, all in turn within each
round, the median; MMoE in plain PyTorch is written out below.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.data import read_table
from coterie.recsys.aw_moe import AWMoE, ranking_loss
from coterie.recsys.aw_moe_ranker import AWMoERanker
from coterie.recsys.home_mtl import MultiTaskMoEClassifier
from coterie.recsys.metrics import auc, gauc, masked_bce
from coterie.recsys.multi_task import MultiTaskMoE

TASKS = {"like": "liking", "love": "liking", "dislike": "disliking"}
LAYOUTS = {
    "shared-bottom": {},
    "mmoe": {"experts": 6},
    "cgc": {"shared": 3},
    "ple": {"shared": 3},
    "home": {},
}
RANKERS = {
    "DIN": {"gate": "one expert", "expert_hidden": 64},
    "MMoE (softmax gate)": {"gate": "softmax"},
    "AW-MoE": {},
    "AW-MoE, contrastive 0.05": {"contrastive": 0.05},
}
TAIL, BATCH = 5, 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="ml-100k.inter")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30, help="of the timing")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    log = read_table(options.data).sort_values("timestamp", kind="stable", ignore_index=True)
    console = Console(width=150)  # wide enough also where the output goes to a file
    results = {
        "multi-task": repeat(LAYOUTS, lambda *a: multi_task(log, *a, options.epochs), options.seeds),
        "history": repeat(RANKERS, lambda *a: history(log, *a, options.epochs), options.seeds),
        "training": speed(options.rounds),
    }
    for title, rows in results.items():
        console.print(table_of(title, rows))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def repeat(
    arms: dict[str, dict], run: Callable[[str, dict, int], dict[str, float]], seeds: int
) -> dict[str, dict[str, list[float]]]:
    """arm → number → its values, seed by seed."""
    rows = {}
    for name, options in arms.items():
        values = [run(name, options, seed) for seed in range(seeds)]
        rows[name] = {key: [value[key] for value in values] for key in values[0]}
    return rows


def multi_task(log: pd.DataFrame, name: str, layout: dict, seed: int, epochs: int) -> dict[str, float]:
    labels = pd.DataFrame(
        {"like": log["rating"] >= 4, "love": log["rating"] == 5, "dislike": log["rating"] <= 2}
    ).astype(float)
    features = pd.concat(
        [log[["user_id", "item_id"]], *(before(log, who) for who in ("user_id", "item_id"))], axis=1
    )
    cut = len(log) * 4 // 5
    ranker = MultiTaskMoEClassifier(
        name, categories=TASKS, ids=["user_id", "item_id"], layout=layout, epochs=epochs, random_state=seed
    )
    ranker.fit(features[:cut], labels[:cut])
    scores, test = ranker.predict_proba(features[cut:]), labels[cut:]
    row = {}
    for number, task in enumerate(TASKS):
        row[f"{task} AUC"] = auc(test[task], scores[:, number])
        row[f"{task} GAUC"] = gauc(test[task], scores[:, number], log["user_id"][cut:])[0]
    return {**row, "parameters": ranker.num_parameters_}


def history(log: pd.DataFrame, name: str, options: dict, seed: int, epochs: int) -> dict[str, float]:
    cut = len(log) * 4 // 5
    test = log[cut:]
    ranker = AWMoERanker(epochs=epochs, random_state=seed, **options).fit(log[:cut])
    score = ranker.predict_proba(test, since=test)
    label, users = (test["rating"] >= 4).to_numpy(float), test["user_id"].to_numpy()
    tail = (ranker.encode(test, since=test)[0] > 0).sum(1).numpy() <= TAIL
    return {
        "AUC": auc(label, score),
        "GAUC": gauc(label, score, users)[0],
        "tail AUC": auc(label[tail], score[tail]),
        "head AUC": auc(label[~tail], score[~tail]),
        "tail rows": int(tail.sum()),
        "parameters": ranker.num_parameters_,
    }


def before(log: pd.DataFrame, who: str) -> pd.DataFrame:
    """Ratings a user or item had at smaller times: the logarithm of how many, and their mean."""
    moments = log.groupby([who, "timestamp"])["rating"].agg(["size", "sum"])
    earlier = moments.groupby(level=0).cumsum() - moments
    found = earlier.loc[pd.MultiIndex.from_frame(log[[who, "timestamp"]])]
    count, total = found["size"].to_numpy(), found["sum"].to_numpy()
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)  # missing for the first one
    return pd.DataFrame({f"{who} ratings": np.log1p(count), f"{who} mean": mean}, index=log.index)


def speed(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Training examples per second of every model, on the same features or histories."""
    torch.manual_seed(0)
    x_TD, y_TK = torch.randn(BATCH, 32), torch.randint(2, (BATCH, 3)).float()
    items, target = torch.randint(1, 1000, (BATCH, 20)), torch.randint(1, 1000, (BATCH,))
    user = torch.arange(BATCH)
    plain = PlainMMoE(32, experts=6, hidden=32, tasks=3)
    ours = {name: MultiTaskMoE.from_preset(name, 32, TASKS, **LAYOUTS[name]) for name in ("mmoe", "home")}
    rankers = {
        name: AWMoE(
            torch.zeros(1000, 0),
            **{key: value for key, value in options.items() if key != "contrastive"},
        )
        for name, options in RANKERS.items()
        if "contrastive" not in options
    }
    steps = {"MMoE in plain PyTorch": step_of(plain, lambda: masked_bce(plain(x_TD), y_TK))}
    for name, model in ours.items():
        steps[name] = step_of(model, lambda m=model: masked_bce(m(x_TD)[0], y_TK))
    for name, ranker in rankers.items():
        steps[name] = step_of(ranker, lambda m=ranker: ranking_loss(m, items, target, y_TK[:, 0], user))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 3):  # the first ones are to warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 3:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    return {name: {"examples/s": [BATCH / s], "× plain PyTorch": [first / s]} for name, s in medians.items()}


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step() -> None:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


class PlainMMoE(nn.Module):
    """MMoE as a tutorial writes it: lists of modules, stacked."""

    def __init__(self, dim: int, experts: int, hidden: int, tasks: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(dim, experts) for _ in range(tasks))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in range(tasks)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        outputs_TEH = torch.stack([F.relu(expert(x_TD)) for expert in self.experts], 1)
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            weights_TE = gate(x_TD).softmax(-1)
            logits.append(tower((weights_TE.unsqueeze(-1) * outputs_TEH).sum(1)))
        return torch.cat(logits, 1)


def table_of(title: str, rows: dict[str, dict[str, list[float]]]) -> Table:
    table = Table("", *next(iter(rows.values())), title=title)
    for name, numbers in rows.items():
        table.add_row(name, *map(shown, numbers.values()))
    return table


def shown(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if mean >= 100:
        return f"{mean:,.0f}"
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    main()
