"""MIGA on daily US stocks, walking forward: `python -m benchmarks.miga_stocks --data FILE [--json FILE]`.

FILE is a table of daily bars (columns date, ticker, open, high, low, close, volume). Every model sees the
same nine features of the last 5 days (`bar_features`, scored within each day), and is asked for the return
between the next close and the one after. 500 days to learn from, 100 to choose the epoch by, 200 to test on,
5 days between; then everything moves on by 200 days. All are trained alike, for minus the daily correlation,
with Adam at 1e-3, and none was tuned: MIGA on two convolutions; its encoder with one linear head; a GRU and
an LSTM of the same width; a linear model of the window.

Each day the best names are held, equally weighted, bought at the next close. Excess is over the equally
weighted mean of all names. p is of a paired test over days (Newey-West, 5 lags) of rank ICs averaged over
seeds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.data import (
    PanelWindows,
    daily_features,
    forward_return,
    import_pandas,
    panel_frame,
    purged_splits,
    read_table,
)
from coterie.finance.backbones import ConvEncoder, RecurrentEncoder
from coterie.finance.backtest import daily_ic, ic_report, paired_day_test, topn_backtest
from coterie.finance.bars import bar_features
from coterie.finance.network import MIGA, OneResponse
from coterie.finance.train import score_by_day, train_by_day
from coterie.models.tying import count_parameters

WINDOW, WIDTH, GAP = 5, 24, 5
SPLIT = {"train": 500, "valid": 100, "test": 200}

MODELS = {
    "MIGA (conv)": lambda features: MIGA(ConvEncoder(features, WIDTH), WIDTH),
    "conv": lambda features: OneResponse(ConvEncoder(features, WIDTH), nn.Linear(WIDTH, 1)),
    "GRU": lambda features: OneResponse(RecurrentEncoder(features, WIDTH), nn.Linear(WIDTH, 1)),
    "LSTM": lambda features: OneResponse(RecurrentEncoder(features, WIDTH, nn.LSTM), nn.Linear(WIDTH, 1)),
    "MIGA (GRU)": lambda features: MIGA(RecurrentEncoder(features, WIDTH), WIDTH),
    "linear": lambda features: OneResponse(nn.Flatten(), nn.Linear(WINDOW * features, 1)),
}
PRESET = ["MIGA (conv)", "conv", "GRU", "LSTM", "linear"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=PRESET, help="the first is compared with the others"
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--names", type=int, default=8, help="held each day")
    parser.add_argument("--cost-bps", type=float, default=5.0, help="of buying, and of selling")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    options = parser.parse_args()
    result = measure(options)
    print(result["setting"] + "\n")
    for line in table(result):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pd = import_pandas()
    panel = panel_frame(read_table(options.data), time="date", group="ticker")
    bars = bar_features(panel)
    features, label = daily_features(bars, list(bars.columns)), forward_return(panel["close"], 1)
    splits = purged_splits(features.index.get_level_values(0), **SPLIT, gap=GAP, horizon=1)
    parts = [[PanelWindows(features, WINDOW, label=label, days=days) for days in split] for split in splits]
    models: dict[str, Any] = {}
    for name in options.models:
        rank_ics, runs = [], []
        for seed in range(options.seeds):
            began = time.perf_counter()
            scores = []
            for train, valid, test in parts:
                torch.manual_seed(seed)
                model = MODELS[name](features.shape[1])
                train_by_day(model, train, valid, epochs=options.epochs, lr=1e-3, seed=seed)
                scores.append(score_by_day(model, test))
            score = pd.concat(scores)
            rank_ics.append(daily_ic(score, label)["rank_ic"])
            traded = topn_backtest(score, label, options.names, options.cost_bps)
            free = topn_backtest(score, label, options.names)
            runs.append(
                {
                    **ic_report(score, label),
                    "return": traded.annual_return,
                    "excess before costs": free.excess_return,
                    "excess after costs": traded.excess_return,
                    "information ratio": traded.information_ratio,
                    "turnover": traded.turnover,
                    "drawdown": traded.max_drawdown,
                }
            )
            took = time.perf_counter() - began
            print(f"{name}, seed {seed}: rank IC {runs[-1]['rank IC']:.4f}, {took:.0f} s", file=sys.stderr)
        by_day = pd.concat(rank_ics, axis=1).mean(axis=1)
        models[name] = {"runs": runs, "parameters": count_parameters(model), "rank_ic_by_day": by_day}
    ours = models[options.models[0]]["rank_ic_by_day"]
    for theirs in models.values():
        if theirs["rank_ic_by_day"] is not ours:
            theirs["first ahead"], theirs["p"] = paired_day_test(ours, theirs["rank_ic_by_day"])
        theirs["p of zero"] = paired_day_test(theirs["rank_ic_by_day"], 0 * ours)[1]
    for each in models.values():
        each["rank_ic_by_day"] = [round(value, 5) for value in each["rank_ic_by_day"]]
    market = label.reindex(score.index).groupby(level=0).mean()
    index = float((1 + market.fillna(0)).prod() ** (252 / len(market)) - 1)
    days = sum(len(split.test) for split in splits)
    setting = (
        f"{panel.index.get_level_values(1).nunique()} names, {len(splits)} walks, {days} test days from "
        f"{splits[0].test[0].date()} to {splits[-1].test[-1].date()}, {options.seeds} seeds, "
        f"{options.epochs} epochs, top {options.names}, {options.cost_bps:g} basis points a side; "
        f"the index earned {100 * index:.1f}% a year"
    )
    return {"setting": setting, "index": index, "models": models}


def table(result: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table: mean ± standard deviation over seeds."""
    percent, plain = 100.0, 1.0
    columns = [
        ("IC", "IC", plain, 4),
        ("rank IC", "rank IC", plain, 4),
        ("ICIR", "ICIR", plain, 3),
        ("excess a year, %", "excess before costs", percent, 1),
        ("after costs, %", "excess after costs", percent, 1),
        ("information ratio", "information ratio", plain, 2),
        ("turnover a day", "turnover", plain, 2),
    ]
    lines = [
        "| model | parameters | "
        + " | ".join(c[0] for c in columns)
        + " | rank IC, first row ahead (p) | p of rank IC 0 |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for name, model in result["models"].items():
        cells = [name, str(model["parameters"])]
        for _, key, factor, digits in columns:
            values = [factor * run[key] for run in model["runs"]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        cells.append(f"{model['first ahead']:+.4f} ({model['p']:.2f})" if "p" in model else "–")
        cells.append(f"{model['p of zero']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
