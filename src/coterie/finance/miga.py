"""MIGA as an estimator: style experts in groups that talk to each other score the stocks of a day.

Source: Yu, Wu, Wang, Weng 2024 (MIGA, arXiv 2410.02241). The abstract fixes the idea; the details are this
project's reading.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from coterie.data import PanelWindows, import_pandas, panel_frame
from coterie.finance.backbones import BACKBONES
from coterie.finance.losses import LOSSES
from coterie.finance.network import MIGA
from coterie.finance.train import Epochs, score_by_day, train_by_day
from coterie.finance.windows import TARGETS, WindowReader
from coterie.models import load_estimator, save_estimator
from coterie.models.estimator import BaseEstimator, check_above, check_at_least, check_choice

if TYPE_CHECKING:
    import pandas as pd


class MIGARegressor(BaseEstimator):  # type: ignore[misc]
    """Scores every instrument of a panel every day; higher is expected to earn more than the others that day.

    Features are scored within their day, robustly, before they are seen; days of a window follow each other
    without a gap. Training takes one day per step, with minus the day's correlation of scores and labels as
    loss.

    Args:
        target: column to learn from: a return ("return"), or the closing price ("close", "bars").
        target_is: "return": the column is the label, known only later. "close": the label is
            `forward_return` of the column, which is no feature. "bars": the same, and the features are
            `bar_features` of the columns open, high, low, volume and this one.
        horizon: days that a label looks ahead after the day it is traded on.
        features: columns to predict from; None for every other numeric column.
        tradable: column that is true where an instrument may be held (an index member, not suspended);
            others serve as history only.
        window: days an encoder sees.
        backbone: "conv" (two convolutions), "gru" or "attention".
        encoder: any module [N, window, features] → [N, width] in the place of a named backbone; it is copied.
        width: of the named backbones.
        n_groups: groups of experts.
        experts_per_group: experts of each.
        top_k: experts per instrument and day.
        expert_dim: hidden width of an expert.
        group_attention: whether active experts of a group read each other's hidden vectors.
        loss: "ic", "ccc" or "mse", by day.
        balance: weight of the load balance loss.
        auxiliary: weight of the same loss on a linear head on the encoder; 0 for no such head.
        epochs: passes over the training days, at most.
        patience: stop after so many epochs without a better validation rank IC.
        lr: learning rate of Adam.
        random_state: seed of weights and day order; torch's own generators are left alone.

    After `fit`: `model_`, `features_`, `history_` (see `Epochs`), `expert_usage_` [E], the share of
    validation slots at each expert.

    >>> from coterie.finance.style_panel import style_panel
    >>> panel, _ = style_panel(stocks=20, days=60, styles=4)
    >>> model = MIGARegressor(epochs=2).fit(panel.loc[:39], panel.loc[:59])
    >>> scores = model.predict(panel)
    >>> scores.loc[59].shape, model.route(panel).loc[59].shape
    ((20,), (20, 8))
    """

    def __init__(
        self,
        target: str = "label",
        *,
        target_is: Literal["return", "close", "bars"] = "return",
        horizon: int = 1,
        features: list[str] | None = None,
        tradable: str | None = None,
        window: int = 5,
        backbone: Literal["conv", "gru", "attention"] = "conv",
        encoder: nn.Module | None = None,
        width: int = 24,
        n_groups: int = 2,
        experts_per_group: int = 4,
        top_k: int = 2,
        expert_dim: int = 16,
        group_attention: bool = True,
        loss: Literal["ic", "ccc", "mse"] = "ic",
        balance: float = 0.01,
        auxiliary: float = 0.0,
        epochs: int = 12,
        patience: int | None = None,
        lr: float = 5e-3,
        random_state: int = 0,
    ) -> None:
        self.target, self.target_is, self.horizon = target, target_is, horizon
        self.features, self.tradable, self.window = features, tradable, window
        self.backbone, self.encoder, self.width = backbone, encoder, width
        self.n_groups, self.experts_per_group, self.top_k = n_groups, experts_per_group, top_k
        self.expert_dim, self.group_attention = expert_dim, group_attention
        self.loss, self.balance, self.auxiliary = loss, balance, auxiliary
        self.epochs, self.patience, self.lr, self.random_state = epochs, patience, lr, random_state

    def fit(self, panel: "pd.DataFrame", valid: "pd.DataFrame") -> "MIGARegressor":
        """Learns from every labelled day of `panel`, and keeps the epoch that ranks `valid` best.

        Args:
            panel: index (time, instrument); see `coterie.data.panel_frame`.
            valid: the same columns. Its days up to the last training day are history for its windows, and
                the `horizon` days after that are left out, since training labels reach into them.

        Raises ValueError: arguments out of range; what `panel_frame` and `daily_features` refuse; no numeric
        feature; no labelled day to learn from, or none to validate on after the gap.
        """
        _check(self)
        reader = self.reader()
        self.features_ = reader.feature_names(panel)
        train, held_out = reader.for_training(panel, valid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            self.model_ = self._network()
            self.history_: Epochs = train_by_day(
                self.model_,
                train,
                held_out,
                loss=self.loss,
                balance_weight=self.balance,
                auxiliary_weight=self.auxiliary,
                epochs=self.epochs,
                patience=self.patience,
                lr=self.lr,
                seed=self.random_state,
            )
        used_E = (self._route(held_out) > 0).sum().to_numpy()
        self.expert_usage_: list[float] = (used_E / used_E.sum()).tolist()
        return self

    def predict(self, panel: "pd.DataFrame") -> "pd.Series[Any]":
        """Scores of every row that ends a window, indexed by (time, instrument).

        A day's scores come from that day and the `window` - 1 before it (and, with "bars", the 20 before
        those); labels are neither needed nor looked at.

        Raises ValueError before `fit`, and for what `panel_frame` and `daily_features` refuse.
        """
        return score_by_day(self._fitted(), self._windows(panel))

    def route(self, panel: "pd.DataFrame") -> "pd.DataFrame":
        """Gate weights of the same rows, a column per expert; exactly 0 where an expert is not used."""
        return self._route(self._windows(panel))

    def save(self, folder: str | Path) -> Path:
        """Writes JSON and safetensors; see `coterie.models.save_estimator`. ValueError before `fit`."""
        tensors = self._fitted().state_dict()
        learnt = {
            "features": self.features_,
            "usage": self.expert_usage_,
            "history": vars(self.history_),
            "encoder": type(self.encoder).__name__ if self.encoder is not None else None,
        }
        parameters = {name: value for name, value in self.get_params().items() if name != "encoder"}
        return save_estimator(folder, "MIGARegressor", parameters=parameters, learnt=learnt, tensors=tensors)

    @classmethod
    def load(cls, folder: str | Path, *, encoder: nn.Module | None = None) -> "MIGARegressor":
        """What `save` wrote.

        Args:
            folder: of `save`.
            encoder: a module like the one it was fitted with, if that was not a named backbone; its weights
                are replaced.

        Raises ValueError: no such estimator, or an encoder of its own that was not given.
        """
        parameters, learnt, tensors = load_estimator(folder, "MIGARegressor")
        if (learnt["encoder"] is None) != (encoder is None):
            wanted = f"encoder={learnt['encoder']}(…)" if learnt["encoder"] else "no encoder"
            raise ValueError(f"{folder} was fitted with {wanted}; load it with the same")
        loaded = cls(**parameters, encoder=encoder)
        loaded.features_, loaded.expert_usage_ = learnt["features"], learnt["usage"]
        loaded.history_ = Epochs(**learnt["history"])
        with torch.random.fork_rng(devices=[]):
            loaded.model_ = loaded._network()
        loaded.model_.load_state_dict(tensors)
        loaded.model_.eval()
        return loaded

    def reader(self) -> WindowReader:
        """What turns a panel into the windows that this estimator sees, for other models to compare with."""
        names = ("target", "target_is", "horizon", "features", "tradable", "window")
        return WindowReader(**{name: getattr(self, name) for name in names})

    def _fitted(self) -> nn.Module:
        if not hasattr(self, "model_"):
            raise ValueError("this MIGARegressor has learnt nothing yet; call fit(panel, valid) first")
        return self.model_

    def _network(self) -> MIGA:
        features, width = len(self.features_), self.width
        if self.encoder is None:
            encoder = BACKBONES[self.backbone](features, width, self.window)
        else:
            encoder = copy.deepcopy(self.encoder)
            with torch.no_grad():
                out: Tensor = encoder(torch.zeros(2, self.window, features))
            if out.dim() != 2 or len(out) != 2:
                raise ValueError(f"the encoder gives {tuple(out.shape)} for 2 windows; should be [2, width]")
            width = out.shape[1]
        return MIGA(
            encoder,
            width,
            n_groups=self.n_groups,
            experts_per_group=self.experts_per_group,
            top_k=self.top_k,
            expert_dim=self.expert_dim,
            group_attention=self.group_attention,
            auxiliary=self.auxiliary > 0,
        )

    def _windows(self, panel: "pd.DataFrame") -> PanelWindows:
        self._fitted()
        return self.reader().windows(panel_frame(panel), self.features_)

    @torch.no_grad()
    def _route(self, windows: PanelWindows) -> "pd.DataFrame":
        pd, model = import_pandas(), self._fitted()
        if not len(windows):
            return pd.DataFrame(index=windows.index[:0])
        weights = [model(windows[day][0]).routing.weights_TE for day in range(len(windows))]
        rows = windows.rows(0).append([windows.rows(day) for day in range(1, len(windows))])
        names = [f"expert {e}" for e in range(weights[0].shape[1])]
        return pd.DataFrame(torch.cat(weights).numpy(), rows, names)


def _check(model: MIGARegressor) -> None:
    sizes = ("n_groups", "experts_per_group", "expert_dim", "window", "horizon", "width", "epochs")
    check_at_least(model, 1, *sizes)
    experts = model.n_groups * model.experts_per_group
    if not 1 <= model.top_k <= experts:
        raise ValueError(
            f"top_k={model.top_k} of {model.n_groups} × {model.experts_per_group} experts; "
            f"use 1 ≤ top_k ≤ {experts}"
        )
    check_choice("backbone", model.backbone, BACKBONES)
    check_choice("loss", model.loss, LOSSES)
    check_choice("target_is", model.target_is, TARGETS)
    check_at_least(model, 0, "balance", "auxiliary")
    check_above(model, 0, "lr")
