"""Scores of a router for its tokens, without the router: drawn with strong preferences, or from files."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coterie.language.alf_lb import check_scores


def draw_scores(seed: int, tokens: int, batch: int = 0, *, experts: int = 16) -> Tensor:
    """Scores [tokens, experts] in float64, sigmoid(1.5 z C / √8 + b), of which some experts get far more.

    Args:
        seed: of the router: C [8, experts] is normal, b runs from -1 to 1.
        tokens: T; z [T, 8] is normal.
        batch: number of the tokens; a seed's batches share the router.
        experts: E.

    >>> scores = draw_scores(0, 1000)
    >>> scores.shape, bool(scores.mean(0)[-1] > scores.mean(0)[0] + 0.2)
    (torch.Size([1000, 16]), True)
    """
    router = np.random.default_rng(seed).standard_normal((8, experts))
    z_TD = np.random.default_rng([seed, 1 + batch]).standard_normal((tokens, 8))
    logits_TE = 1.5 * z_TD @ router / math.sqrt(8) + np.linspace(-1, 1, experts)
    return torch.from_numpy(logits_TE).sigmoid()


def pick_scores(scores_TE: Tensor, tokens: int, *, seed: int) -> Tensor:
    """Scores [tokens, experts] of some tokens, each of them any."""
    generator = torch.Generator().manual_seed(seed)
    return scores_TE[torch.randint(len(scores_TE), (tokens,), generator=generator)]


def read_scores(path: Path, k: int) -> list[Tensor]:
    """Scores [tokens, experts] in float64 that a router gave, from a .npy file or each of a folder.

    Args:
        path: the file or the folder.
        k: experts that a token will choose.

    Raises:
        ValueError: a file is no array of finite numbers [tokens, experts], there are not K experts, or files
            differ in their number.
    """
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    scores = [_read(file, k) for file in files]
    widths = {scores_TE.shape[1] for scores_TE in scores}
    if len(widths) > 1:
        raise ValueError(f"{path} holds scores over {sorted(widths)} experts; give files of one router")
    return scores


def _read(file: Path, k: int) -> Tensor:
    try:
        array = np.load(file, allow_pickle=False)
        return check_scores(torch.from_numpy(array.astype(np.float64)), k)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}; should be numpy.save of floats [tokens, experts]") from None
