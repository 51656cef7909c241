"""Stock panels: cross-sectional scores by mixtures of style experts, and what they are worth."""

from coterie.finance.backtest import Backtest, ic_report, paired_day_test, topn_backtest
from coterie.finance.miga import MIGARegressor
from coterie.finance.style_panel import style_panel

__all__ = ["Backtest", "MIGARegressor", "ic_report", "paired_day_test", "style_panel", "topn_backtest"]
