"""What estimators of every field share: scikit-learn's base class, and words for arguments out of range."""

from collections.abc import Collection
from typing import Any

try:
    from sklearn.base import BaseEstimator
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "coterie's estimators need scikit-learn; install it with: pip install 'coterie[tables]'"
    ) from None

__all__ = ["BaseEstimator", "check_above", "check_at_least", "check_choice"]


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """ValueError unless the value of an argument is one of the choices.

    >>> check_choice("loss", "mae", ("ic", "mse"))
    Traceback (most recent call last):
    ValueError: loss='mae'; use one of ic, mse
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}; use one of {', '.join(map(str, choices))}")


def check_at_least(estimator: Any, least: float, *names: str) -> None:
    """ValueError unless these arguments of an estimator are at least so much; NaN is not."""
    for name in names:
        value = getattr(estimator, name)
        if not value >= least:
            raise ValueError(f"{name}={value!r}; should be at least {least}")


def check_above(estimator: Any, bound: float, *names: str) -> None:
    """ValueError unless these arguments of an estimator are larger; NaN is not."""
    for name in names:
        value = getattr(estimator, name)
        if not value > bound:
            raise ValueError(f"{name}={value!r}; should be above {bound}")
