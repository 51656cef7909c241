"""Stocks of hidden styles: does a routed mixture rank them better than one response for all?

style/: `style_panel`, 160 stocks of 8 styles, 260 days, 6 AR(1) features, two of which show the style; each
style answers the other four in its own way, and labels are 0.6 signal to 1 noise. Trained on days 0 to 149,
chosen by the rank IC of days 155 to 184, tested on days 190 to 259; windows of 5 days; 12 epochs of Adam at
5e-3, one day per step; loss -IC + 0.01 balance. Every model has the same encoder, one convolution of width 24,
unless its name says otherwise; experts are 2 groups of 4 with 16 hidden units, top-2. Features are scored
within their day, as `MIGARegressor` does for everyone.

quiet/: 100 stocks of 4 styles, 360 days, 0.22 signal to 1 noise, trained on 240 days, chosen by 40, tested on
70; top-4. Reported only.

The paper's tables are of CSI300, CSI500 and CSI1000, which are not ours to give; `--data` takes such a panel
(Qlib's frames as Parquet, or a table with columns datetime, instrument, label and features). Its rows are then
split 6 : 1.5 : 2.5 in time, and the claims about hidden styles have nothing to compare with: leave their arms
out. A real back-test is `benchmarks/miga_stocks.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coterie.data import PanelWindows, import_pandas, panel_frame, purged_splits, read_table
from coterie.finance.backbones import ConvEncoder
from coterie.finance.backtest import daily_ic, ic_report
from coterie.finance.network import MIGA, OneResponse
from coterie.finance.style_panel import style_panel
from coterie.finance.train import labels_of, score_by_day, train_by_day
from coterie.finance.windows import WindowReader
from coterie.nn import Routing, balance, parameters_per_expert
