"""SMETimes beside baselines on ETTh1: `python -m benchmarks.forecast --data ETTh1.csv [--json FILE]`.

The usual split: 12 months to learn from, 4 to choose the epoch, 4 to test, every window of the test months,
all seven columns, errors in units of each column's deviation over the training months. SMETimes reads 672
hours in patches of 96, as in the paper, over the tiny backbone that coterie trains; one model, fitted for 96
hours, serves every horizon. DLinear and PatchTST (that of transformers, as wide as its authors' for ETTh1, in
patches of 16 that do not overlap, on every third window for 8 epochs) read 336 hours, as theirs do, and are
fitted to each horizon anew.
"""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PatchTSTConfig, PatchTSTForPrediction

from coterie.data import read_table
from coterie.forecast.smetimes import SMETimesForecaster
from coterie.report import print_table

TRAIN, VALIDATION, TEST = 8640, 11520, 14400  # hours of 30-day months, where each part ends
VARIANTS = {
    "SMETimes, 4 experts, prompts": {},
    "SMETimes without prompts": {"prompt": "none"},
    "SMETimes, 1 expert": {"num_experts": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ETTh1.csv")
    parser.add_argument("--horizons", type=int, nargs="+", default=[96, 192, 336])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--backbone", default="tiny", help="or the folder of a causal language model")
    parser.add_argument("--stride", type=int, default=4, help="hours between SMETimes' training windows")
    known = ["smetimes", "dlinear", "patchtst"]
    parser.add_argument("--models", nargs="+", choices=known, default=known, help="patchtst takes longest")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    options = parser.parse_args()
    table = read_table(options.data)[:TEST]
    results: dict[str, dict[str, list[float]]] = {}

    def note(name: str, measured: dict[str, float]) -> None:
        for key, value in measured.items():
            results.setdefault(name, {}).setdefault(key, []).append(value)
        print(name, {key: round(value, 4) for key, value in measured.items()}, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    for seed in range(options.seeds):
        for name, settings in VARIANTS.items() if "smetimes" in options.models else ():
            measured = smetimes(table, seed, options, settings)
            if "repeat last day" not in results:
                naive = {k: measured[k] for k in measured if "naive" in k}
                note(
                    "repeat last day",
                    {k.replace("naive ", ""): v for k, v in naive.items()} | {"seconds": 0.0},
                )
            note(name, {k: v for k, v in measured.items() if "naive" not in k})
        for build, settings in BASELINES.items():
            if build.__name__.lower() in options.models:
                note(build.__name__, baseline(table, seed, options.horizons, build, **settings))
    columns = ["model", *(f"MSE {h}" for h in options.horizons), *(f"MAE {h}" for h in options.horizons)]
    keys = [f"{error} {h}" for error in ("mse", "mae") for h in options.horizons]
    rows = [
        [name, *(f"{np.mean(result[key]):.3f}" for key in keys), f"{np.mean(result['seconds']):.0f}"]
        for name, result in results.items()
    ]
    print_table(f"ETTh1, {options.seeds} seed(s)", [*columns, "s to fit"], rows)


def smetimes(table, seed, options, settings):
    model = SMETimesForecaster(
        96,
        seq_len=672,
        token_len=96,
        encoder="linear",
        backbone=options.backbone,
        stride=options.stride,
        validation=1 - TRAIN / VALIDATION,
        random_state=seed,
        **settings,
    )
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one expert, which is wanted here
        model.fit(table[:VALIDATION], time_col="date")
    seconds = time.perf_counter() - began
    measured = {}
    for horizon in options.horizons:
        errors = model.backtest(table[VALIDATION - model.seq_len :], horizon=horizon)
        errors.pop("forecasts")
        measured |= {f"{error} {horizon}": value for error, value in errors.items()}
    return {**measured, "seconds": seconds}


class DLinear(nn.Module):
    """Zeng et al. 2023: one linear map of the moving average, one of what is left, shared by all columns."""

    def __init__(self, seq_len: int, horizon: int) -> None:
        super().__init__()
        self.trend, self.season = nn.Linear(seq_len, horizon), nn.Linear(seq_len, horizon)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        x_BCL = x_BLC.transpose(1, 2)
        trend_BCL = F.avg_pool1d(F.pad(x_BCL, (12, 12), mode="replicate"), 25, stride=1)
        return (self.trend(trend_BCL) + self.season(x_BCL - trend_BCL)).transpose(1, 2)


class PatchTST(nn.Module):
    """Nie et al. 2023, as transformers has it."""

    def __init__(self, seq_len: int, horizon: int) -> None:
        super().__init__()
        config = PatchTSTConfig(
            num_input_channels=7,
            context_length=seq_len,
            prediction_length=horizon,
            patch_length=16,
            patch_stride=16,
            pooling_type=None,  # else the mean over patches is all that the head sees
            d_model=16,
            num_attention_heads=4,
            num_hidden_layers=3,
            ffn_dim=128,
            attention_dropout=0.0,
            ff_dropout=0.3,
            path_dropout=0.0,
            head_dropout=0.0,
            scaling="std",
            loss="mse",
        )
        self.model = PatchTSTForPrediction(config)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return self.model(past_values=x_BLC).prediction_outputs


BASELINES = {
    DLinear: {"lr": 5e-4, "batch_size": 32, "epochs": 10},
    PatchTST: {"lr": 1e-3, "batch_size": 64, "epochs": 8, "stride": 3},
}


def baseline(table, seed, horizons, build, *, lr, batch_size, epochs, stride=1, seq_len=336, patience=3):
    """Adam with a cosine schedule; the epoch with the best validation error is tested."""
    numbers = table.drop(columns="date").to_numpy(float)
    numbers = (numbers - numbers[:TRAIN].mean(0)) / numbers[:TRAIN].std(0)
    values_TC = torch.from_numpy(numbers).float()
    measured, began = {}, time.perf_counter()
    for horizon in horizons:
        torch.manual_seed(seed)
        model, offsets = build(seq_len, horizon), torch.arange(seq_len + horizon)

        def windows(starts, offsets=offsets):
            both_BSC = values_TC[starts.unsqueeze(1) + offsets]
            return both_BSC[:, :seq_len], both_BSC[:, seq_len:]

        @torch.no_grad()
        def errors(first, last, model=model, horizon=horizon, windows=windows):
            model.eval()
            starts = torch.arange(first - seq_len, last - seq_len - horizon + 1)
            sums = np.zeros(2)
            for part in starts.split(256):
                x_BLC, true_BHC = windows(part)
                error = model(x_BLC) - true_BHC
                sums += [error.square().sum().item(), error.abs().sum().item()]
            return (sums / (len(starts) * horizon * values_TC.shape[1])).tolist()

        starts = torch.arange(0, TRAIN - seq_len - horizon + 1, stride)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        best, kept, since = float("inf"), None, 0
        for _ in range(epochs):
            model.train()
            for part in starts[torch.randperm(len(starts))].split(batch_size):
                x_BLC, true_BHC = windows(part)
                loss = F.mse_loss(model(x_BLC), true_BHC)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            error = errors(TRAIN, VALIDATION)[0]
            since += 1
            if error < best:
                best, kept, since = error, copy.deepcopy(model.state_dict()), 0
            elif since >= patience:
                break
        model.load_state_dict(kept)
        mse, mae = errors(VALIDATION, TEST)
        measured |= {f"mse {horizon}": mse, f"mae {horizon}": mae}
        print(f"  {build.__name__} {horizon}: {mse:.4f} {mae:.4f}", flush=True)
    return {**measured, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
