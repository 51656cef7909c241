"""Stocks of hidden styles: does a routed mixture rank them better than one response for all?

style/: `style_panel`, 160 stocks of 8 styles, 260 days, 6 AR(1) features, two of which show the style; each
style answers the other four in its own way, and labels are 0.6 signal to 1 noise. Trained on days 0 to 149,
chosen by the rank IC of days 155 to 184, tested on days 190 to 259; windows of 5 days; 12 epochs of Adam at
5e-3, one day per step; loss -IC + 0.01 balance. Every model has the same encoder, one convolution of width
24, unless its name says otherwise; experts are 2 groups of 4 with 16 hidden units, top-2. Features are scored
within their day first, as `MIGARegressor` does it.

quiet/: 100 stocks of 4 styles, 360 days, 0.22 signal to 1 noise, trained on 240 days, chosen by 45 and tested
on 65; top-4. Its rows, those without group attention and those of a deeper single network are reported
without a claim: on such panels neither attention nor the mixture is expected to be ahead of them.

The paper's panels, CSI300, CSI500 and CSI1000, are not free to give away; `--data` takes one: a Qlib frame as
Parquet, or a table with columns date (or datetime), instrument, label and features. Its days are then split
60 : 12 : 28 with 5 days between. A back-test on real prices is `python -m benchmarks.miga_stocks`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coterie.data import PanelWindows, import_pandas, panel_frame, purged_splits, read_table
from coterie.finance.backbones import ConvEncoder
from coterie.finance.backtest import ic_report
from coterie.finance.network import MIGA, OneResponse
from coterie.finance.style_panel import style_panel
from coterie.finance.train import labels_of, score_by_day, train_by_day
from coterie.finance.windows import WindowReader
from coterie.models.tying import count_parameters
from coterie.nn import balance
from coterie.reproduce import Budget, Card, Claim, Plot, Values

CARD = Card(
    slug="miga",
    title="MIGA: Mixture-of-Experts with Group Aggregation for Stock Market Prediction",
    authors="Yu et al.",
    year=2024,
    venue="arXiv 2410.02241",
    area="finance",
    methods=("top-k", "group attention", "style experts", "information coefficient", "panel"),
    problem="Does one model for all stocks average away what sets their styles apart, and does a routed "
    "mixture of style experts rank them better?",
    headline="24% excess annual return on CSI300, 8 points above the best before it (abstract; one market, "
    "one back-test).",
)

PANELS: dict[str, dict[str, Any]] = {
    "style": {},
    "quiet": {"stocks": 100, "styles": 4, "days": 360, "signal": 0.22},
}
DAYS = {
    "style": {"train": 150, "valid": 30, "test": 70},
    "quiet": {"train": 240, "valid": 45, "test": 65},
}
GAP, FEATURES, WIDTH, WINDOW = 5, 6, 24, 5


def run(
    seed: int, budget: Budget, data: Any, *, model: str, panel: str = "style", shuffle: bool = False
) -> Values:
    """Trains one model on one panel and measures its scores of the test days."""
    frame, kind_of = _panel(seed, budget, data, panel)
    if shuffle:
        frame = _shuffled_labels(frame, seed)
    train, valid, test, features = _windows(frame, budget, data, panel)
    torch.manual_seed(seed)
    network = MODELS[model](features)
    history = train_by_day(
        network, train, valid, epochs={"smoke": 1, "standard": 12, "full": 30}[budget], seed=seed
    )
    measured = ic_report(score_by_day(network, test), labels_of(test))
    parameters = count_parameters(network)
    values: dict[str, Any] = {
        "rank IC": measured["rank IC"],
        "IC": measured["IC"],
        "rank ICIR": measured["rank ICIR"],
        "parameters": parameters,
        "rank IC by parameters": [(float(parameters), measured["rank IC"])],
        "validation rank IC by epoch": list(enumerate(history.valid_rank_ic, 1)),
    }
    return values | _routing(network, test, kind_of) if isinstance(network, MIGA) else values


def _single(features: int, *, width: int = WIDTH, deep: bool = False) -> nn.Module:
    head = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1)) if deep else nn.Linear(width, 1)
    return OneResponse(ConvEncoder(features, width, layers=1), head)


def _miga(features: int, **options: Any) -> nn.Module:
    return MIGA(ConvEncoder(features, WIDTH, layers=1), WIDTH, **options)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "conv+linear": _single,
    "conv+linear-192": partial(_single, width=192),
    "conv+mlp": partial(_single, deep=True),
    "miga": _miga,
    "miga-k4": partial(_miga, top_k=4),
    "no-attention": partial(_miga, group_attention=False),
    "no-attention-k4": partial(_miga, group_attention=False, top_k=4),
}

ARMS = {
    "style/conv+linear": partial(run, model="conv+linear"),
    "style/conv+linear-192": partial(run, model="conv+linear-192"),
    "style/conv+mlp": partial(run, model="conv+mlp"),
    "style/miga": partial(run, model="miga"),
    "style/miga-k4": partial(run, model="miga-k4"),
    "style/no-attention": partial(run, model="no-attention"),
    "style/shuffled-labels": partial(run, model="miga", shuffle=True),
    "quiet/conv+mlp": partial(run, model="conv+mlp", panel="quiet"),
    "quiet/miga-k4": partial(run, model="miga-k4", panel="quiet"),
    "quiet/no-attention-k4": partial(run, model="no-attention-k4", panel="quiet"),
}

CLAIMS = [
    Claim(
        "MIGA's rank IC is at least 0.005 above that of its encoder with one linear head",
        lambda arms: arms["style/miga"]["rank IC"] - arms["style/conv+linear"]["rank IC"],
        at_least=0.005,
    ),
    Claim(
        "experts stay balanced: E · Σ P f on the test days is below 1.5",
        lambda arms: arms["style/miga"]["balance"],
        at_most=1.5,
    ),
    Claim(
        "the strongest expert tells the hidden style by at least 0.5 nats",
        lambda arms: arms["style/miga"]["nats about the style"],
        at_least=0.5,
        note="Of ln 8 = 2.08 nats. With --data, where no style is known, about the instrument.",
    ),
    Claim(
        "nothing is learned from labels shuffled within their days: |rank IC| is at most 0.015",
        lambda arms: abs(arms["style/shuffled-labels"]["rank IC"]),
        at_most=0.015,
    ),
]

PLOTS = [
    Plot(
        "rank IC by parameters",
        x="parameters",
        y="rank IC of the test days",
        log_x=True,
        points=True,
        arms=tuple(arm for arm in ARMS if arm.startswith("style/") and arm != "style/shuffled-labels"),
        note="Up is better. One linear response is behind at either width; a deeper single network is not.",
    ),
    Plot("validation rank IC by epoch", x="epoch", y="mean daily rank IC"),
]


def read_data(path: Path) -> Any:
    """A panel with a label column; see `coterie.data.panel_frame`."""
    table = read_table(path)
    if table.index.nlevels == 2:
        frame = panel_frame(table)
    else:
        time = next((name for name in ("date", "datetime") if name in table.columns), "date")
        frame = panel_frame(table, time=time, group="instrument")
    if "label" not in frame.columns:
        raise ValueError(f"{path} has no column 'label'; it has {', '.join(frame.columns)}")
    return frame


def _panel(seed: int, budget: Budget, data: Any, panel: str) -> tuple[Any, Any]:
    """The panel, and the style of each instrument, which for the user's data is the instrument itself."""
    if data is not None:
        names = data.index.get_level_values(1).unique()
        return data, import_pandas().Series(np.arange(len(names)), names)
    smaller: dict[str, Any] = {"stocks": 24, "days": 44} if budget == "smoke" else {}
    return style_panel(**(PANELS[panel] | smaller), seed=seed)


def _windows(frame: Any, budget: Budget, data: Any, panel: str) -> tuple[Any, Any, Any, int]:
    days = frame.index.get_level_values(0).unique()
    usable = len(days) - 2 * GAP
    sizes = DAYS[panel]
    if data is not None or budget == "smoke":
        valid, test = int(0.12 * usable), int(0.28 * usable)
        sizes = {"train": usable - valid - test, "valid": valid, "test": test}
    split = purged_splits(days, **sizes, gap=GAP, horizon=1)[0]
    reader = WindowReader(window=WINDOW)
    names = reader.feature_names(frame)
    label = reader.label(frame)
    parts: list[PanelWindows] = [reader.windows(frame, names, label=label, days=part) for part in split]
    return parts[0], parts[1], parts[2], len(names)


def _shuffled_labels(frame: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shuffled = frame.groupby(level=0)["label"].transform(lambda day: rng.permutation(day.to_numpy()))
    return frame.assign(label=shuffled)


@torch.no_grad()
def _routing(network: nn.Module, test: PanelWindows, kind_of: Any) -> dict[str, float]:
    """How even the experts' load is, and what the strongest expert says about an instrument's style."""
    routings = [network(test[day][0]).routing for day in range(len(test))]
    strongest = np.concatenate([r.weights_TE.argmax(1).numpy() for r in routings])
    names = np.concatenate([test.rows(day).get_level_values(1) for day in range(len(test))])
    counts = np.zeros((routings[0].num_experts, int(kind_of.max()) + 1))
    np.add.at(counts, (strongest, kind_of[names].to_numpy()), 1)
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return {
        "balance": float(torch.stack([balance.load_balance(r) for r in routings]).mean()),
        "nats about the style": float((joint[there] * np.log(joint[there] / apart[there])).sum()),
    }
