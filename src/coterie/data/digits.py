"""Digits of 8 × 8 pixels: drawn here, or read from the UCI file of handwritten ones."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE, POINTS = 8, 32  # pixels of a side; points along a stroke

# the stroke of each digit: x and y in hundredths of the image, y downwards
STROKES = (
    "50 8  32 14  22 32  21 50  22 68  32 86  50 92  68 86  78 68  79 50  78 32  68 14  50 8",
    "35 27  55 8  55 92",
    "25 28  35 11  58 8  74 22  68 44  25 90  80 90",
    "25 13  58 8  74 25  48 47  76 68  58 91  22 88",
    "65 92  65 8  20 65  84 65",
    "76 10  32 10  27 46  58 42  76 64  58 91  23 88",
    "66 8  36 34  25 68  44 91  70 80  68 56  28 60",
    "22 10  78 10  44 92",
    "50 48  27 28  50 8  73 28  50 48  25 72  50 92  75 72  50 48",
    "72 38  42 48  27 26  50 8  72 22  72 44  60 92",
)


def drawn_digits(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits drawn with a pen of varying width, by a hand that varies shape, slant, size and place.

    Args:
        num: N images; every digit is as likely.
        seed: of everything about them.

    Returns: images [N, 8, 8], ink from 0 to 1, and the digits [N] int64.

    >>> images, digits = drawn_digits(100, seed=0)
    >>> images.shape, len(digits.unique()), 0 <= images.min() < images.max() <= 1
    (torch.Size([100, 8, 8]), 10, tensor(True))
    """
    rng = np.random.default_rng(seed)
    digits = rng.integers(10, size=num)
    strokes = np.stack([_points(stroke) for stroke in STROKES])  # [10, POINTS, 2], from -0.5 to 0.5
    # the hand: each stroke bends by a few slow waves along its length
    wave = np.cos(np.pi * np.arange(5)[:, None] * np.linspace(0, 1, POINTS))
    points = strokes[digits] + np.einsum("nwc,wp->npc", rng.normal(0, 0.025, (num, 5, 2)), wave)
    angle, shear = rng.normal(0, 0.1, num), rng.normal(0, 0.12, num)
    size = rng.uniform(0.8, 1.05, (num, 2))
    turn = np.stack([[np.cos(angle), shear - np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = np.einsum("xyn,npy->npx", turn, points * size[:, None]) + rng.normal(0, 0.03, (num, 1, 2))
    width, ink = rng.uniform(0.02, 0.08, num), rng.uniform(0.8, 1.0, num)
    centres = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    pixels = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 1, 2)  # row by row, x before y
    apart = pixels - points[:, None]
    distance = np.sqrt((apart**2).sum(-1).min(-1))
    images = ink[:, None] * np.clip(1 - (distance - width[:, None]) * SIDE, 0, 1)
    return torch.from_numpy(images).float().view(num, SIDE, SIDE), torch.from_numpy(digits)


def read_digits(path: str | Path) -> tuple[Tensor, Tensor]:
    """The UCI file of handwritten digits, `optdigits.tra` or `optdigits.tes`, or scikit-learn's `digits.csv`.

    Args:
        path: lines of 64 numbers from 0 to 16 and the digit, with commas between. Lines after a "#" are
            left out.

    Returns: images [N, 8, 8], ink from 0 to 1, and the digits [N] int64.

    Raises:
        ValueError: not such a file.
    """
    if not Path(path).read_text().strip():
        raise ValueError(f"{path} has no lines")
    try:
        table = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} is no table of numbers with commas between: {error}") from None
    if table.shape[1:] != (SIDE**2 + 1,):
        raise ValueError(f"{path} has {table.shape[1]} columns; should be 64 pixels and the digit")
    pixels, digits = table[:, :-1], table[:, -1]
    if pixels.min() < 0 or pixels.max() > 16 or not np.isin(digits, range(10)).all():
        raise ValueError(f"{path} should hold pixels from 0 to 16 and digits from 0 to 9")
    images = torch.from_numpy(pixels / 16).float().view(-1, SIDE, SIDE)
    return images, torch.from_numpy(digits).long()


def _points(stroke: str) -> np.ndarray:
    """POINTS points along a stroke, equally far apart."""
    corners = np.array(stroke.split(), float).reshape(-1, 2) / 100 - 0.5
    along = np.cumsum([0, *np.linalg.norm(np.diff(corners, axis=0), axis=1)])
    at = np.linspace(0, along[-1], POINTS)
    return np.stack([np.interp(at, along, corners[:, c]) for c in range(2)], axis=-1)
