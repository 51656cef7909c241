"""Forecasting systems: tables with a time column in, the steps that follow out."""

from coterie.forecast.smetimes import SMETimesForecaster

__all__ = ["SMETimesForecaster"]
