"""What scikit-learn's users pass, checked: features as a frame, labels and groups as numbers."""

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coterie.data import TableEncoder, import_pandas

try:
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import column_or_1d, validate_data
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "coterie.tabular needs scikit-learn; install it with: pip install 'coterie[tables]'"
    ) from None

if TYPE_CHECKING:
    import pandas as pd


def as_frame(estimator: Any, X: Any, *, reset: bool) -> "pd.DataFrame":
    """Features as a frame with text for column names; an array's columns become x0, x1, ….

    Args:
        estimator: gets `n_features_in_` and `feature_names_in_`, or is compared with them.
        X: frame or array [rows, columns]; missing values are allowed.
        reset: whether these are the first rows that it learns from.

    Raises ValueError as scikit-learn's `validate_data` does.
    """
    pd = import_pandas()
    if isinstance(X, pd.DataFrame):
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        if not len(X) or not len(X.columns):
            raise ValueError(
                f"Found array with {len(X)} sample(s) and {len(X.columns)} feature(s); give more"
            )
        return X.set_axis([str(name) for name in X.columns], axis=1)
    array = validate_data(estimator, X, reset=reset, dtype="numeric", ensure_all_finite="allow-nan")
    return pd.DataFrame(array, columns=[f"x{column}" for column in range(array.shape[1])])


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


def group_names(sensitive: Any, rows: int) -> NDArray[Any]:
    """The protected attribute as texts [n]. ValueError for a wrong length or a missing value (which row)."""
    column = import_pandas().Series(column_or_1d(sensitive))
    _check_length("sensitive", len(column), rows)
    missing = np.flatnonzero(column.isna())
    if len(missing):
        raise ValueError(f"sensitive, row {missing[0]}: missing; give every row a group, or leave it out")
    names: NDArray[Any] = column.map(str).to_numpy(dtype=object)
    return names


def check_feamoe(estimator: Any) -> None:
    """ValueError naming an argument that is out of range."""
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
    least = {"n_experts": 1, "lam": 0, "eps_acc": 0, "eps_fair": 0, "n_iter": 1, "l2": 0}
    for name, bound in {**least, "max_experts": estimator.n_experts, "chunk_size": 1}.items():
        value = getattr(estimator, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name}={value!r}; should be at least {bound}")
    if not estimator.learning_rate > 0:
        raise ValueError(f"learning_rate={estimator.learning_rate!r}; should be above 0")
    if estimator.merge is not None and not 0 < estimator.merge < 1:
        raise ValueError(f"merge={estimator.merge!r}; should be a cosine between 0 and 1, or None")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; use one of {', '.join(map(repr, choices))}")


def _check_length(name: str, found: int, rows: int) -> None:
    if found != rows:
        raise ValueError(f"{name} has {found} values for {rows} rows; should be one per row")
