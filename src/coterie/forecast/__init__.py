"""Forecasting systems: tables with a time column in, the steps that follow out."""
