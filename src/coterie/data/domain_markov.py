"""Text of several domains that share an alphabet and differ in what follows what."""

import numpy as np
import torch
from torch import Tensor

DOMAINS = 8
SYMBOLS = 64
VOCAB_SIZE = DOMAINS + SYMBOLS
_CHANCES = np.array([0.5, 0.25, 0.15, 0.1])
_NOISE = 0.05


def domain_markov(
    n_seq: int, seed: int, *, domain: int | None = None, seq_len: int = 33, tables_seed: int = 0
) -> Tensor:
    """Sequences of a tag, which names the domain, a uniform symbol, and steps of the domain's Markov chain.

    In each of 8 domains each of 64 symbols has four successors, with probabilities 0.5, 0.25, 0.15 and 0.1;
    one step in 20 goes anywhere. The entropy of a step is 1.534 nats. Steps are the tokens from the third on.

    Args:
        n_seq: N sequences.
        seed: of the sequences.
        domain: 0 to 7; None draws one for each sequence.
        seq_len: S tokens, tag and first symbol included.
        tables_seed: of the successors; the same for training and evaluation.

    Returns: ids [N, S] int64; tags are 0 to 7, symbols 8 to 71.

    Raises ValueError for a domain that does not exist, or fewer than 3 tokens.

    >>> ids = domain_markov(5, seed=0, domain=3)
    >>> ids.shape, ids[:, 0].tolist(), bool((ids[:, 1:] >= 8).all())
    (torch.Size([5, 33]), [3, 3, 3, 3, 3], True)
    """
    if domain is not None and not 0 <= domain < DOMAINS:
        raise ValueError(f"domain={domain}; use 0 to {DOMAINS - 1}")
    if seq_len < 3:
        raise ValueError(f"seq_len={seq_len}; a tag, a symbol and a step make 3")
    successors = successor_table(tables_seed)
    rng = np.random.default_rng(seed)
    tag_N = rng.integers(DOMAINS, size=n_seq) if domain is None else np.full(n_seq, domain)
    ids_NS = np.empty((n_seq, seq_len), np.int64)
    ids_NS[:, 0] = tag_N
    symbol_N = rng.integers(SYMBOLS, size=n_seq)
    ids_NS[:, 1] = DOMAINS + symbol_N
    for step in range(2, seq_len):
        followed_N = successors[tag_N, symbol_N, rng.choice(4, size=n_seq, p=_CHANCES)]
        anywhere_N = rng.random(n_seq) < _NOISE
        symbol_N = np.where(anywhere_N, rng.integers(SYMBOLS, size=n_seq), followed_N)
        ids_NS[:, step] = DOMAINS + symbol_N
    return torch.from_numpy(ids_NS)


def successor_table(tables_seed: int = 0) -> np.ndarray:
    """[8, 64, 4]: the symbols, 0 to 63, that follow each symbol of each domain, the most likely first."""
    rng = np.random.default_rng(tables_seed)
    return np.stack(
        [[rng.permutation(SYMBOLS)[: len(_CHANCES)] for _ in range(SYMBOLS)] for _ in range(DOMAINS)]
    )
