"""What a trained network makes of windows: forecasts, their errors beside a naive one's, use of experts."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.forecast.network import SMETimes, roll
from coterie.forecast.windows import Windows, repeat_last

_CHUNK = 512  # windows in one pass without gradients


def forecast_windows(
    model: SMETimes, windows: Windows, rows_B: Tensor, horizon: int, *, oracle_BH: Tensor | None = None
) -> Tensor:
    """[B, horizon]: what follows some windows; prompts of forecast patches are written from the forecasts.

    Args:
        model: in evaluation mode.
        windows: where to forecast from.
        rows_B: which of them.
        horizon: steps.
        oracle_BH: the true future, from which prompts are written instead: a leak, for diagnosis only.
    """
    return roll(
        model,
        windows.steps(rows_B, 0, model.seq_len),
        horizon,
        prompts_BND=windows.prompts(rows_B),
        prompt_of=lambda patch_BP, first: windows.prompt(rows_B, patch_BP, first),
        oracle_BH=oracle_BH,
    )


def squared_error(model: SMETimes, windows: Windows, horizon: int) -> float:
    """Mean squared error of the forecasts of windows, in their units, by which the best epoch is chosen."""
    rows_N = torch.arange(windows.count)
    forecasts = [forecast_windows(model, windows, rows_B, horizon) for rows_B in torch.split(rows_N, _CHUNK)]
    true_NH = windows.steps(rows_N, model.seq_len, horizon)
    return (torch.cat(forecasts) - true_NH).square().mean().item()


def forecast_errors(
    model: SMETimes, windows: Windows, horizon: int, *, period: int, oracle_prompt: bool = False
) -> dict[str, float]:
    """Mean errors over windows and steps, in the windows' units: "mse", "mae", "naive mse", "naive mae".

    Args:
        model: in evaluation mode.
        windows: where to forecast from, each followed by `horizon` known steps.
        horizon: steps.
        period: steps that the naive forecast repeats.
        oracle_prompt: as `oracle_BH` of `forecast_windows`.

    Returns also "forecasts", how many there are.
    """
    sums = np.zeros(4)
    for rows_B in torch.split(torch.arange(windows.count), _CHUNK):
        true_BH = windows.steps(rows_B, model.seq_len, horizon)
        oracle_BH = true_BH if oracle_prompt else None
        forecast_BH = forecast_windows(model, windows, rows_B, horizon, oracle_BH=oracle_BH)
        repeated_BH = repeat_last(windows.steps(rows_B, 0, model.seq_len), period, horizon)
        for place, guess_BH in enumerate((forecast_BH, repeated_BH)):
            error_BH = (guess_BH - true_BH).double()
            sums[2 * place] += error_BH.square().sum().item()
            sums[2 * place + 1] += error_BH.abs().sum().item()
    names = ("mse", "mae", "naive mse", "naive mae")
    means = dict(zip(names, (sums / (windows.count * horizon)).tolist(), strict=True))
    return {**means, "forecasts": windows.count}


@torch.no_grad()
def expert_usage(model: SMETimes, windows: Windows) -> npt.NDArray[np.float64]:
    """[columns, K]: mean gate weight of each expert on each column's windows."""
    weights = []
    for rows_B in torch.split(torch.arange(windows.count), _CHUNK):
        _, routing = model(windows.steps(rows_B, 0, model.seq_len), windows.prompts(rows_B))
        weights.append(routing.weights_TE.view(len(rows_B), -1, routing.num_experts).mean(1))
    columns = len(windows.values_CT)
    return torch.cat(weights).view(columns, -1, routing.num_experts).mean(1).double().numpy()
