"""The user's own text in the form that `mixed_markov` gives: token ids with labels of what is scored."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from coterie.data import ByteCorpus, ByteWindows, find_text, split_by_file

Tokens = tuple[Tensor, Tensor]


class ScoredWindows(Dataset[Tokens]):
    """Windows of bytes, ids [S + 1], each with labels [S + 1] of zeros: every token counts."""

    def __init__(self, windows: ByteWindows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Tokens:
        ids = self.windows[i]
        return ids, torch.zeros_like(ids)


def scored_text(path: Path, seq_len: int, batch_size: int) -> tuple[Dataset[Tokens], Dataset[Tokens]]:
    """A file or folder of text as training and validation windows; the vocabulary is that of bytes.

    Args:
        path: a tenth of its files, or of its only file, is for validation: at most 200 windows of it.
        seq_len: S bytes per window.
        batch_size: windows that training needs at least.

    Raises:
        ValueError: no text there, or too little.
    """
    training, validation = (
        ByteWindows(ByteCorpus(part), seq_len)
        for part in split_by_file(find_text([path]), heldout=0.1, seed=0)
    )
    training.check_batch(batch_size)
    validation.check_batch(1)
    some = np.random.default_rng(0).permutation(len(validation))[:200].tolist()
    return ScoredWindows(training), Subset(ScoredWindows(validation), some)
