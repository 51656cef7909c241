"""SMETimes: a frozen small language model, statistical prompts and a mixture of linear experts forecast.

Source: Fan, Li, Weng, Zhou 2025 (SMETimes, arXiv 2503.03594). The network is `coterie.forecast.network`.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.data import import_pandas
from coterie.forecast.backbone import TINY, Backbone, load_backbone, untrained_tiny
from coterie.forecast.network import SMETimes, roll
from coterie.forecast.prompts import Pool, Prompt, PromptEncoder
from coterie.forecast.series import Series, later_times, read_series, steps_per_day
from coterie.forecast.training import train
from coterie.forecast.windows import Windows, repeat_last, spread_starts
from coterie.models import load_estimator, save_estimator
from coterie.train import EpochHistory

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 512  # windows in one pass without gradients


class SMETimesForecaster:
    """Forecasts every column of a table over time, in scikit-learn's manner.

    Columns are forecast one by one by the same network ("channel-independent"), each from its own past.
    Longer horizons are reached by forecasting from forecasts; prompts of forecast patches are written from
    the forecasts, never from the future.

    Args:
        horizon: H, steps that `predict` forecasts and by which the best epoch is chosen.
        seq_len: L, steps of the past that are read, a multiple of `token_len`.
        token_len: P, steps of a patch. Long ones need fewer rolls to a far horizon, and did better on ETTh1.
        num_experts: K linear experts. 1 turns the mixture into a plain linear layer, with a warning.
        gate_top_k: experts per token; None mixes all.
        prompt: "stats" for time, mean, deviation and change as text, "time" for the time alone, "none".
        prompt_pool: "last" or "mean" token of the prompt, see `PromptEncoder`.
        encoder: of patches, "linear" or "mlp".
        hidden: width of the "mlp" encoder.
        dropout: inside it.
        balance_coef: weight of the entropy of the experts' mean use.
        backbone: "tiny", a model of 0.1 million weights that is trained here in some seconds, or the folder
            of any causal language model of transformers, which is read once and never changed.
        cache: folder in which prompt vectors are kept for the next `fit`; None keeps none.
        stride: steps from one training window to the next, see `spread_starts`; with a large language model,
            more than 1 saves most of the prompts.
        epochs: at most.
        patience: epochs without a better validation error after which training ends.
        batch_size: windows per step.
        lr: of Adam, with a cosine schedule.
        validation: share of the table, its end, by which the best epoch is chosen. It is not trained on.
        random_state: of weights and batches. torch's own generator is left as it was.

    Attributes after `fit`:
        columns_: names of the columns that are forecast.
        expert_usage_: [K] mean gate weight of each expert on the validation windows, sums to 1.
        expert_usage_by_column_: [columns, K].
        history_: `loss` and `validation` (mean squared errors, scaled) by epoch, and the `best` epoch.
        prompt_share_: how much of a token is its prompt, learned.

    Errors are in units of each column's deviation over the training rows ("scaled"), as in the literature.

    Source: Fan et al. 2025 (SMETimes).

    >>> pd = import_pandas()
    >>> times = pd.date_range("2020", periods=400, freq="h")
    >>> table = pd.DataFrame({"date": times, "load": np.sin(np.arange(400) / 4)})
    >>> model = SMETimesForecaster(48, seq_len=48, token_len=24, prompt="none", epochs=2, random_state=0)
    >>> forecast = model.fit(table, time_col="date").predict(table)
    >>> forecast.shape, str(forecast["date"][0])
    ((48, 2), '2020-01-17 16:00:00')
    >>> float(model.expert_usage_.sum().round(5))
    1.0
    """

    def __init__(
        self,
        horizon: int = 96,
        *,
        seq_len: int = 672,
        token_len: int = 96,
        num_experts: int = 4,
        gate_top_k: int | None = None,
        prompt: Prompt = "stats",
        prompt_pool: Pool = "mean",
        encoder: Literal["linear", "mlp"] = "linear",
        hidden: int = 64,
        dropout: float = 0.0,
        balance_coef: float = 0.01,
        backbone: str = TINY,
        cache: str | None = None,
        stride: int = 1,
        epochs: int = 10,
        patience: int = 3,
        batch_size: int = 256,
        lr: float = 1e-3,
        validation: float = 0.2,
        random_state: int | None = None,
    ) -> None:
        self.horizon = horizon
        self.seq_len, self.token_len = seq_len, token_len
        self.num_experts, self.gate_top_k = num_experts, gate_top_k
        self.prompt, self.prompt_pool = prompt, prompt_pool
        self.encoder, self.hidden, self.dropout = encoder, hidden, dropout
        self.balance_coef, self.backbone, self.cache, self.stride = balance_coef, backbone, cache, stride
        self.epochs, self.patience, self.batch_size, self.lr = epochs, patience, batch_size, lr
        self.validation, self.random_state = validation, random_state
        self._parameters = list(vars(self))

    def get_params(self) -> dict[str, Any]:
        """The arguments, by name."""
        return {name: getattr(self, name) for name in self._parameters}

    def fit(
        self, df: "pd.DataFrame", time_col: str | None = None, columns: Sequence[str] | None = None
    ) -> "SMETimesForecaster":
        """Trains on a table.

        Args:
            df: rows in order of time, at equal steps (see `read_series` for missing ones).
            time_col: column of times; None if there is none, and prompts then have no time.
            columns: to forecast; None for all others.

        Raises ValueError: what `read_series` refuses, too few rows, or an argument out of range.
        """
        self._check()
        series = read_series(df, time_col, columns)
        rows = len(series.values_TC)
        first_held = rows - round(self.validation * rows)
        shortest = max(self.seq_len + self.token_len, 2)
        if first_held < shortest or rows - first_held < self.horizon:
            raise ValueError(
                f"{rows} rows leave {first_held} to train on and {rows - first_held} for validation="
                f"{self.validation:g}; seq_len={self.seq_len} and token_len={self.token_len} need at least "
                f"{shortest} to train on, horizon={self.horizon} that many for validation"
            )
        self.time_col_, self.columns_, self.step_ = time_col, series.names, series.step
        self.mean_ = series.values_TC[:first_held].mean(0)
        deviation_C = series.values_TC[:first_held].std(0)
        self.deviation_ = np.where(deviation_C > 0, deviation_C, 1.0)
        seed = np.random.SeedSequence(self.random_state).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            self.model_ = self._build(load_backbone(self.backbone))
            self._train(series, first_held, torch.Generator().manual_seed(int(seed)))
        return self

    def predict(self, df: "pd.DataFrame") -> "pd.DataFrame":
        """Forecasts the `horizon` steps that follow a table's last row.

        Args:
            df: with the columns of `fit`, at the same steps; its last `seq_len` rows are read.

        Returns a table with the time column, if there was one, and the columns, in their own units.

        Raises ValueError: what `read_series` refuses, other steps, or fewer than `seq_len` rows.
        """
        series = self._read(df, self.seq_len).tail(self.seq_len)
        windows = self._windows(series, torch.zeros(1, dtype=torch.int64))
        forecast_CH = self._roll(windows, torch.arange(len(self.columns_)), self.horizon)
        values_HC = forecast_CH.T.double().numpy() * self.deviation_ + self.mean_
        frame = import_pandas().DataFrame(values_HC, columns=self.columns_)
        if series.times_T is not None:
            frame.insert(0, self.time_col_, later_times(series.times_T[-1], series.step, self.horizon))
        return frame

    def score(self, df: "pd.DataFrame") -> float:
        """Minus the mean squared error of `backtest`: larger is better."""
        return -self.backtest(df)["mse"]

    def backtest(
        self, df: "pd.DataFrame", *, horizon: int | None = None, stride: int = 1, oracle_prompt: bool = False
    ) -> dict[str, float]:
        """Errors of forecasts from every place in a table that has `seq_len` rows before and H after it.

        Args:
            df: rows to forecast, with `seq_len` rows before them.
            horizon: H; None for the estimator's.
            stride: steps from one forecast to the next.
            oracle_prompt: write prompts of forecast patches from the true future. That is a leak, which tells
                how much better prompts could help; never report it as an error of forecasts.

        Returns "mse" and "mae" in scaled units over windows, columns and steps; "naive mse" and "naive mae"
        of repeating the last day (or the last patch, where a day is no whole number of steps); "forecasts".

        Raises ValueError as `predict`, or for fewer than seq_len + H rows.
        """
        horizon = self.horizon if horizon is None else horizon
        series = self._read(df, self.seq_len + horizon)
        starts_W = torch.arange(0, len(series.values_TC) - self.seq_len - horizon + 1, stride)
        windows, sums = self._windows(series, starts_W), np.zeros(4)
        period = min(steps_per_day(series.step) or self.token_len, self.seq_len)
        for rows in _chunks(windows.count):
            true_BH = windows.steps(rows, self.seq_len, horizon)
            forecast_BH = self._roll(windows, rows, horizon, oracle_BH=true_BH if oracle_prompt else None)
            repeated_BH = repeat_last(windows.steps(rows, 0, self.seq_len), period, horizon)
            for place, guess_BH in enumerate((forecast_BH, repeated_BH)):
                error_BH = (guess_BH - true_BH).double()
                sums[2 * place] += error_BH.square().sum().item()
                sums[2 * place + 1] += error_BH.abs().sum().item()
        names = ("mse", "mae", "naive mse", "naive mae")
        means = dict(zip(names, (sums / (windows.count * horizon)).tolist(), strict=True))
        return {**means, "forecasts": windows.count}

    def save(self, folder: str | Path) -> Path:
        """Writes estimator.json and weights.safetensors: what was trained, the backbone's name and digest.

        The weights of a language model from a folder are not copied; those of "tiny" are.

        Raises ValueError before `fit`, or when the folder holds something else.
        """
        self._check_fitted()
        backbone = self.model_.backbone
        tensors = self.model_.state_dict() if backbone.name == TINY else self.model_.trained()
        learnt = {
            "time_col": self.time_col_,
            "columns": self.columns_,
            "step": self.step_,
            "mean": self.mean_.tolist(),
            "deviation": self.deviation_.tolist(),
            "usage": self.expert_usage_by_column_.tolist(),
            "history": vars(self.history_),
            "backbone": {"name": backbone.name, "digest": backbone.digest},
        }
        return save_estimator(
            folder, type(self).__name__, parameters=self.get_params(), learnt=learnt, tensors=tensors
        )

    @classmethod
    def load(cls, folder: str | Path, *, backbone: str | None = None) -> "SMETimesForecaster":
        """The estimator that `save` wrote.

        Args:
            folder: of `save`.
            backbone: where its language model lies now; None for where it lay.

        Raises ValueError: another kind of estimator, or a backbone with other weights than it was fitted on.
        """
        parameters, learnt, tensors = load_estimator(folder, cls.__name__)
        wanted = learnt["backbone"]
        if backbone is not None:
            parameters["backbone"] = backbone
        estimator = cls(**parameters)
        is_tiny = estimator.backbone == TINY
        language_model = untrained_tiny() if is_tiny else load_backbone(estimator.backbone)
        with torch.random.fork_rng(devices=[]):
            estimator.model_ = estimator._build(language_model)
        if is_tiny == (wanted["name"] == TINY):
            estimator.model_.load_state_dict(tensors, strict=is_tiny)
        found = estimator.model_.backbone.digest
        if found != wanted["digest"]:
            raise ValueError(
                f"{folder} was fitted on the backbone {wanted['name']!r} with digest "
                f"{wanted['digest'][:12]}…, but that of {estimator.backbone!r} is {found[:12]}…; give the "
                "folder of the same model as backbone="
            )
        estimator.model_.eval()
        estimator.time_col_, estimator.columns_ = learnt["time_col"], learnt["columns"]
        estimator.step_ = learnt["step"]
        estimator.mean_, estimator.deviation_ = np.array(learnt["mean"]), np.array(learnt["deviation"])
        estimator.history_ = EpochHistory(**learnt["history"])
        estimator._set_usage(np.array(learnt["usage"]))
        return estimator

    def _build(self, backbone: Backbone) -> SMETimes:
        return SMETimes(
            backbone,
            seq_len=self.seq_len,
            token_len=self.token_len,
            num_experts=self.num_experts,
            gate_top_k=self.gate_top_k,
            encoder=self.encoder,
            hidden=self.hidden,
            dropout=self.dropout,
        )

    def _train(self, series: Series, first_held: int, generator: torch.Generator) -> None:
        span = self.seq_len + self.token_len
        fitted = self._windows(series, spread_starts(first_held - span + 1, self.stride, self.token_len))
        last = len(series.values_TC) - self.seq_len - self.horizon
        step = self.token_len // 4 | 1  # odd: a divisor of the day would test some hours of it only
        starts_W = torch.arange(max(first_held - self.seq_len, 0), last + 1, step)
        held = self._windows(series, starts_W)
        true_BH = held.steps(torch.arange(held.count), self.seq_len, self.horizon)

        def samples(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            target_BL = fitted.steps(rows, self.token_len, self.seq_len)
            return fitted.steps(rows, 0, self.seq_len), target_BL, fitted.prompts(rows)

        def validate() -> float:
            chunks = _chunks(held.count)
            forecast_BH = torch.cat([self._roll(held, rows, self.horizon) for rows in chunks])
            return (forecast_BH - true_BH).square().mean().item()

        self.history_ = train(
            self.model_,
            samples,
            fitted.count,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            balance_coef=self.balance_coef,
            generator=generator,
            validate=validate,
            patience=self.patience,
        )
        self._set_usage(self._measure_usage(held))

    @torch.no_grad()
    def _measure_usage(self, windows: Windows) -> npt.NDArray[np.float64]:
        weights = []
        for rows in _chunks(windows.count):
            _, routing = self.model_(windows.steps(rows, 0, self.seq_len), windows.prompts(rows))
            weights.append(routing.weights_TE.view(len(rows), -1, self.num_experts).mean(1))
        columns = len(self.columns_)
        return torch.cat(weights).view(columns, -1, self.num_experts).mean(1).double().numpy()

    def _set_usage(self, usage_CK: npt.NDArray[np.float64]) -> None:
        self.expert_usage_by_column_ = usage_CK
        self.expert_usage_ = usage_CK.mean(0)
        self.prompt_share_ = 0.0 if self.prompt == "none" else self.model_.prompt_share

    def _roll(
        self, windows: Windows, rows: Tensor, horizon: int, *, oracle_BH: Tensor | None = None
    ) -> Tensor:
        return roll(
            self.model_,
            windows.steps(rows, 0, self.seq_len),
            horizon,
            prompts_BND=windows.prompts(rows),
            prompt_of=lambda patch_BP, first: windows.prompt(rows, patch_BP, first),
            oracle_BH=oracle_BH,
        )

    def _windows(self, series: Series, starts_W: Tensor) -> Windows:
        values_CT = torch.from_numpy(((series.values_TC - self.mean_) / self.deviation_).T).float()
        times_T = series.times_T
        if times_T is not None:  # prompts of forecast patches name times after the table's end
            times_T = np.concatenate([times_T, later_times(times_T[-1], series.step, self.horizon)])
        encoder = None
        if self.prompt != "none":
            encoder = PromptEncoder(
                self.model_.backbone, prompt=self.prompt, pool=self.prompt_pool, cache=self.cache
            )
        return Windows(
            values_CT.contiguous(),
            starts_W,
            seq_len=self.seq_len,
            token_len=self.token_len,
            encoder=encoder,
            names=series.names,
            times_T=times_T,
        )

    def _read(self, df: "pd.DataFrame", rows: int) -> Series:
        self._check_fitted()
        series = read_series(df, self.time_col_, self.columns_)
        if len(series.values_TC) < rows:
            raise ValueError(f"the table has {len(series.values_TC)} rows; should have at least {rows}")
        if series.step != self.step_:
            raise ValueError(
                f"the table's rows are {series.step!r} apart, those it was fitted on {self.step_!r}; "
                "resample it"
            )
        return series

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise ValueError("this SMETimesForecaster is not fitted; call fit first")

    def _check(self) -> None:
        whole = {
            name: getattr(self, name) for name in ("horizon", "stride", "epochs", "patience", "batch_size")
        }
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"{name}={value}; should be at least 1")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation={self.validation:g}; should be a share between 0 and 1")
        if not (self.lr > 0 and math.isfinite(self.lr)) or self.balance_coef < 0:
            raise ValueError(
                f"lr={self.lr:g}, balance_coef={self.balance_coef:g}; should be above 0, and at least 0"
            )
        choices = {"prompt": ("stats", "time", "none"), "prompt_pool": ("last", "mean")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; use one of {', '.join(known)}")
        if self.num_experts == 1:
            warnings.warn(
                "num_experts=1: the gate's one weight is always 1, so the mixture is a plain linear layer; "
                "use 2 or more experts",
                UserWarning,
                stacklevel=3,
            )


def _chunks(count: int) -> list[Tensor]:
    return [torch.arange(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
