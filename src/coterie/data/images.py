"""Small images that need no download."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LabelledImages = tuple[Tensor, Tensor]


def digits() -> LabelledImages:
    """The 1797 handwritten digits that scikit-learn brings along.

    Returns: images [1797, 8, 8], float32 in 0 … 1 (seventeen levels of grey), and labels [1797], int64 in
    0 … 9.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), its test part.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install 'coterie[vision]', or "
            "read the file optdigits.tes of UCI with read_digits"
        )
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return _images(pixels, labels)


def read_digits(file: str | Path) -> LabelledImages:
    """Digits from a file of UCI's "Optical Recognition of Handwritten Digits": `optdigits.tes` or `.tra`.

    A line holds 64 grey levels, 0 … 16, row by row, and the digit, separated by commas.

    Returns: as `digits`, which holds the same images as `optdigits.tes`.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        rows = np.loadtxt(file, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{file} is not a table of numbers separated by commas: {error}") from None
    if rows.shape[1] != 65:
        raise ValueError(
            f"{file} has {rows.shape[1]} columns; a file of digits has 64 grey levels and the digit"
        )
    pixels, labels = rows[:, :64], rows[:, 64]
    if pixels.min() < 0 or pixels.max() > 16 or not np.isin(labels, np.arange(10)).all():
        raise ValueError(
            f"{file} has grey levels {pixels.min():g} … {pixels.max():g} and labels {labels.min():g} … "
            f"{labels.max():g}; should be 0 … 16, and whole numbers 0 … 9 in the last column"
        )
    return _images(pixels, labels)


def _images(pixels: "np.ndarray", labels: "np.ndarray") -> LabelledImages:
    images = torch.from_numpy(pixels).float().div(16).view(-1, 8, 8)
    return images, torch.from_numpy(labels).long()
