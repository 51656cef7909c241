"""Training on a panel: a day is a batch, days are shuffled, the epoch with the best rank IC is kept."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from coterie.data import PanelWindows, import_pandas
from coterie.finance.backtest import daily_ic
from coterie.finance.losses import LOSSES, standardised
from coterie.nn import Routing, balance
from coterie.train import train_epochs

if TYPE_CHECKING:
    import pandas as pd


class Scores(NamedTuple):
    """What a model makes of a day's windows [N, L, F]."""

    score: Tensor
    """[N]; only their order and relative distance within the day mean something."""
    routing: Routing | None = None
    """Of the N instruments; None for a model without experts."""
    auxiliary: Tensor | None = None
    """[N], scores of the encoder alone; None without such a head."""


@dataclass
class Epochs:
    """How training went.

    Args:
        loss: mean loss of the training days, by epoch.
        valid_rank_ic: mean rank IC of the validation days, by epoch.
        best: the epoch, from 0, whose weights were kept.
        days_skipped: training days with fewer than 5 labels, or with one and the same label.
    """

    loss: list[float] = field(default_factory=list)
    valid_rank_ic: list[float] = field(default_factory=list)
    best: int = 0
    days_skipped: int = 0


def train_by_day(
    model: nn.Module,
    train: PanelWindows,
    valid: PanelWindows,
    *,
    loss: str = "ic",
    balance_weight: float = 0.01,
    auxiliary_weight: float = 0.0,
    epochs: int = 12,
    patience: int | None = None,
    lr: float = 5e-3,
    seed: int = 0,
) -> Epochs:
    """Trains in place with Adam, one day per step, and leaves the weights of the best epoch.

    Args:
        model: x [N, L, F] → `Scores`.
        train: windows with labels, to learn from.
        valid: those to choose the epoch by.
        loss: "ic", "ccc" or "mse", against labels standardised within their day.
        balance_weight: of the load balance loss, for a model that routes.
        auxiliary_weight: of the same loss on the auxiliary scores, for a model that has them.
        epochs: passes over the training days.
        patience: stop after so many epochs without a better validation rank IC; None to run all.
        lr: learning rate.
        seed: of the order of days.

    Raises ValueError: an unknown loss, epochs or patience below 1, no day to learn from or to validate
    on, or a loss that is NaN or infinite.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}; use one of {', '.join(LOSSES)}")
    days = _usable_days(train)
    if not days:
        raise ValueError(
            f"no day to learn from among {len(train)}: each needs 5 instruments with a window and a label"
        )
    generator = torch.Generator().manual_seed(seed)

    def day_loss(place: Tensor) -> tuple[Tensor, Tensor]:
        x_NLF, y_N = train[days[int(place)]]
        known_N = y_N.isfinite()
        label_N = standardised(y_N[known_N])
        assert label_N is not None, "days that teach nothing were left out"
        total = _day_loss(model(x_NLF[known_N]), label_N, loss, balance_weight, auxiliary_weight)
        return total, total.double()

    history = train_epochs(
        model,
        torch.optim.Adam(model.parameters(), lr),
        lambda epoch: torch.split(torch.randperm(len(days), generator=generator), 1),
        day_loss,
        epochs=epochs,
        validate=lambda: -mean_rank_ic(model, valid),
        patience=patience,
    )
    return Epochs(
        history.loss, [-error for error in history.validation], history.best, len(train) - len(days)
    )


@torch.no_grad()
def score_by_day(model: nn.Module, windows: PanelWindows) -> "pd.Series[Any]":
    """The model's scores of every window, indexed by (time, instrument)."""
    pd = import_pandas()
    model.eval()
    if not len(windows):
        return pd.Series([], windows.index[:0], dtype="float32", name="score")
    scores = [model(windows[day][0]).score for day in range(len(windows))]
    rows = windows.rows(0).append([windows.rows(day) for day in range(1, len(windows))])
    return pd.Series(torch.cat(scores).numpy(), rows, name="score")


def labels_of(windows: PanelWindows) -> "pd.Series[Any]":
    """The labels of every window, indexed as `score_by_day`."""
    pd = import_pandas()
    rows = windows.rows(0).append([windows.rows(day) for day in range(1, len(windows))])
    return pd.Series(torch.cat([windows.labels(day) for day in range(len(windows))]).numpy(), rows)


def mean_rank_ic(model: nn.Module, windows: PanelWindows) -> float:
    """Mean over days of the Spearman correlation of scores and labels. ValueError where no day has one.

    0 for a model that scores every instrument alike.
    """
    usable = _usable_days(windows)
    if not usable:
        raise ValueError(
            f"no day to validate on among {len(windows)}: each needs 5 instruments with a window and a label"
        )
    return float(daily_ic(score_by_day(model, windows), labels_of(windows))["rank_ic"].sum()) / len(usable)


def _usable_days(windows: PanelWindows) -> list[int]:
    labels = ((day, windows.labels(day)) for day in range(len(windows)))
    return [day for day, y_N in labels if standardised(y_N[y_N.isfinite()]) is not None]


def _day_loss(
    scores: Scores, label_N: Tensor, loss: str, balance_weight: float, auxiliary_weight: float
) -> Tensor:
    total = LOSSES[loss](scores.score, label_N)
    if scores.auxiliary is not None and auxiliary_weight:
        total = total + auxiliary_weight * LOSSES[loss](scores.auxiliary, label_N)
    if scores.routing is not None and balance_weight:
        total = total + balance_weight * balance.load_balance(scores.routing, global_batch=False)
    return total
