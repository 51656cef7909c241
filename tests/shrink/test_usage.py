"""Usage is the share of assignments; sigma is the published one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.hf import find_moe_blocks, recording
from coterie.shrink import balance_sigma, expert_usage


def sigma_of(counts):
    """As the paper writes it."""
    total = 0.0
    for count in counts:
        usage = [n / sum(count.tolist()) for n in count.tolist()]
        mean = sum(usage) / len(usage)
        total += math.sqrt(sum((u - mean) ** 2 for u in usage) / (len(usage) - 1))
    return total / len(counts)


def test_usage_is_the_share_of_assignments(model):
    ids = torch.randint(257, (3, 20))
    with recording(find_moe_blocks(model)) as records, torch.no_grad():
        model(ids)
    usage = expert_usage(model, [ids[:2], ids[2:]])
    for shares, record in zip(usage, records, strict=True):
        counts = record.sum_by_expert(torch.ones_like(record.weights))
        torch.testing.assert_close(shares, (counts / counts.sum()).float())
    counts = [r.sum_by_expert(torch.ones_like(r.weights)) for r in records]
    assert balance_sigma(usage).item() == pytest.approx(sigma_of(counts), rel=1e-5)


@given(counts=st.lists(st.integers(0, 9), min_size=2, max_size=8), seed=st.integers(0, 9))
def test_sigma_knows_no_numbering_and_is_zero_only_for_even_use(counts, seed):
    shares = torch.tensor(counts) / max(sum(counts), 1)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(balance_sigma([shares]), balance_sigma([shares[order]]))
    assert (balance_sigma([shares]) < 1e-6) == (len(set(counts)) == 1)


def test_no_text_is_refused(model):
    with pytest.raises(ValueError, match="no text"):
        expert_usage(model, [])
