"""What scikit-learn's users pass, checked: features as a frame, labels and groups as numbers."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coterie.data import TableEncoder, check_columns, import_pandas
from coterie.data.tables import as_texts
from coterie.models.estimator import (  # first: it says what to install where scikit-learn is missing
    check_above,
    check_at_least,
    check_choice,
)

from sklearn.utils.multiclass import check_classification_targets, type_of_target  # isort: skip
from sklearn.utils.validation import column_or_1d, validate_data  # isort: skip

if TYPE_CHECKING:
    import pandas as pd


def as_frame(estimator: Any, X: Any, *, reset: bool) -> "pd.DataFrame":
    """Features as a frame with text for column names; columns that had none are x0, x1, … by position.

    Args:
        estimator: gets `n_features_in_` and `feature_names_in_`, or is compared with them.
        X: frame or array [rows, columns]; missing values are allowed. Once names are known, a frame's columns
            are taken by name, in whatever order they come, and an array's by position.
        reset: whether these are the first rows that it learns from.

    Raises ValueError for a column that is missing, and as scikit-learn's `validate_data` does.
    """
    pd = import_pandas()
    if isinstance(X, pd.DataFrame):
        if not reset and hasattr(estimator, "feature_names_in_"):
            check_columns(X, estimator.feature_names_in_)
            X = X[[*estimator.feature_names_in_]]
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        if not len(X) or not len(X.columns):
            raise ValueError(
                f"Found array with {len(X)} sample(s) and {len(X.columns)} feature(s); give more"
            )
    else:
        kind = "numeric" if reset else None  # texts go on where there were texts in a frame before
        X = pd.DataFrame(validate_data(estimator, X, reset=reset, dtype=kind, ensure_all_finite="allow-nan"))
    by_position = [f"x{column}" for column in range(X.shape[1])]
    return X.set_axis(getattr(estimator, "feature_names_in_", by_position), axis=1)


def set_encoder(estimator: Any, encoder: TableEncoder, *, named: bool) -> None:
    """Gives a loaded estimator the columns that it was fitted on.

    Args:
        estimator: gets `_encoder`, `n_features_in_`, and `feature_names_in_` if `named`.
        encoder: knows the columns.
        named: whether they had names, or were named by position.
    """
    estimator._encoder, estimator.n_features_in_ = encoder, len(encoder.columns)
    if named:
        estimator.feature_names_in_ = np.array(encoder.columns, dtype=object)


def encode(encoder: TableEncoder, frame: "pd.DataFrame") -> NDArray[np.float32]:
    """The encoder's features, with a warning for what is missing where nothing was when it learnt.

    >>> pd = import_pandas()
    >>> encoder = TableEncoder().fit(pd.DataFrame({"age": [20.0, 40.0]}))
    >>> encode(encoder, pd.DataFrame({"age": [40.0]})).tolist()
    [[1.0]]
    """
    features = encoder.transform(frame)
    names = set(encoder.feature_names)
    unforeseen = [
        name
        for name in encoder.columns
        if name in names and f"{name} is missing" not in names and frame[name].isna().any()
    ]
    if unforeseen:
        warnings.warn(
            f"column {', '.join(map(repr, unforeseen))} misses values, and missed none in the first rows it "
            "was learnt from; they count as its mean",
            stacklevel=3,
        )
    return features


def binary_classes(y: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """(labels [n], the two classes). ValueError for anything but two classes."""
    labels = column_or_1d(y, warn=True)
    check_classification_targets(labels)
    classes = np.unique(labels)
    if len(classes) == 1:
        raise ValueError(f"y has one class, {classes.tolist()[0]!r}; should have two")
    if len(classes) > 2:
        raise ValueError(
            f"Only binary classification is supported. The type of the target is {type_of_target(labels)}: "
            f"y has {len(classes)} classes, {classes[:5].tolist()}"
        )
    return labels, classes


def encode_labels(y: ArrayLike, classes: NDArray[Any], rows: int) -> NDArray[np.int64]:
    """1 for the second class, 0 for the first. ValueError for others, naming the row, or a wrong length."""
    labels = column_or_1d(y)
    _check_length("y", len(labels), rows)
    unknown = np.flatnonzero(~np.isin(labels, classes))
    if len(unknown):
        raise ValueError(
            f"y, row {unknown[0]}: {labels.tolist()[unknown[0]]!r}; the classes are {classes.tolist()}"
        )
    positive: NDArray[np.int64] = (labels == classes[1]).astype(np.int64)
    return positive


def group_names(
    sensitive: Any, rows: int, *, watched: str | None, constant_is_wrong: bool
) -> NDArray[Any] | None:
    """The protected attribute as texts [n]; None where there is none and no gap is watched.

    Raises ValueError for one that is watched but not given, a wrong length, a missing value (which row), and
    one group if that is wrong.
    """
    if sensitive is None:
        if watched is not None:
            raise ValueError(
                f"fairness={watched!r} needs sensitive=, the group of each row; or give fairness=None"
            )
        return None
    column = import_pandas().Series(column_or_1d(sensitive))
    _check_length("sensitive", len(column), rows)
    missing = np.flatnonzero(column.isna())
    if len(missing):
        raise ValueError(f"sensitive, row {missing[0]}: missing; give every row a group, or leave it out")
    names: NDArray[Any] = as_texts(column).to_numpy(dtype=object)
    if constant_is_wrong and len(set(names)) < 2:
        raise ValueError(f"sensitive holds one group, {names[0]!r}; a gap needs at least two")
    return names


def check_feamoe(estimator: Any, classes: NDArray[Any]) -> None:
    """ValueError naming an argument that is out of range."""
    if estimator.favourable is not None and estimator.favourable not in classes:
        raise ValueError(f"favourable={estimator.favourable!r}; should be one of {classes.tolist()}")
    choices = {
        "fairness": ("dp", "eo", "burden", None),
        "group_gap": ("range", "variance"),
        "refit": ("all", "new"),
        "update": ("always", "on_drift"),
        "new_expert": ("random", "errors"),
        "mix": ("prob", "logit"),
        "loss": ("mixture", "localized"),
    }
    for name, allowed in choices.items():
        check_choice(name, getattr(estimator, name), allowed)
    check_at_least(estimator, 1, "n_experts", "n_iter")
    check_at_least(estimator, estimator.n_experts, "max_experts")
    check_at_least(estimator, 0, "lam", "eps_acc", "eps_fair", "l2")
    check_above(estimator, 0, "learning_rate")
    if estimator.chunk_size is not None:
        check_at_least(estimator, 1, "chunk_size")
    if estimator.merge is not None and not 0 < estimator.merge < 1:
        raise ValueError(f"merge={estimator.merge!r}; should be a cosine between 0 and 1, or None")


def _check_length(name: str, found: int, rows: int) -> None:
    if found != rows:
        raise ValueError(f"{name} has {found} values for {rows} rows; should be one per row")
