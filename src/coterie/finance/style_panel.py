"""A panel whose instruments follow hidden styles, and whose styles answer the same features differently."""

from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data import import_pandas

if TYPE_CHECKING:
    import pandas as pd


def style_panel(
    *, stocks: int = 160, days: int = 260, styles: int = 8, signal: float = 0.6, seed: int = 0
) -> tuple["pd.DataFrame", "pd.Series[Any]"]:
    """Six features and a label per stock and day.

    Features are AR(1) series with coefficient 0.7. The last two also carry the stock's style as a point on a
    circle: half themselves plus twice (cos, sin). The label is `signal` · s / std(s) plus standard normal
    noise, standardised per day; s is a linear function of the first four features of that day, one function
    per style, with weights of random sign and a size in 0.5 … 1.5. Averaged over styles there is next to
    nothing to learn.

    Args:
        stocks: instruments; stock i has style i mod `styles`.
        days: days, counted from 0.
        styles: hidden styles.
        signal: deviation of the predictable part of the label, in units of the noise's.
        seed: of everything random.

    Returns: the panel, indexed by (date, instrument), with columns x1 … x6 and label; and each stock's style.

    Source: built for this project; no data of the paper.

    >>> panel, style = style_panel(stocks=10, days=3, styles=5)
    >>> panel.shape, style.tolist()
    ((30, 7), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    """
    pd = import_pandas()
    rng = np.random.default_rng(seed)
    x_DNF = np.zeros((days, stocks, 6))
    for day in range(1, days):
        x_DNF[day] = 0.7 * x_DNF[day - 1] + 0.714 * rng.normal(size=(stocks, 6))
    style_N = np.arange(stocks) % styles
    weight_K4 = rng.choice([-1.0, 1.0], (styles, 4)) * rng.uniform(0.5, 1.5, (styles, 4))
    signal_DN = np.einsum("dnf,nf->dn", x_DNF[..., :4], weight_K4[style_N])
    label_DN = signal * signal_DN / signal_DN.std() + rng.normal(size=(days, stocks))
    label_DN = (label_DN - label_DN.mean(1, keepdims=True)) / label_DN.std(1, keepdims=True)
    angle_N = 2 * np.pi * style_N / styles
    x_DNF[..., 4:] = 0.5 * x_DNF[..., 4:] + 2 * np.stack([np.cos(angle_N), np.sin(angle_N)], -1)
    names = [f"s{i:03d}" for i in range(stocks)]
    index = pd.MultiIndex.from_product([range(days), names], names=["date", "instrument"])
    panel = pd.DataFrame(x_DNF.reshape(-1, 6), index, [f"x{i}" for i in range(1, 7)])
    return panel.assign(label=label_DN.reshape(-1)), pd.Series(style_N, names, name="style")
