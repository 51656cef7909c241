import math

import pytest
import torch

from coterie.hf import find_moe_blocks
from coterie.shrink import perplexity, prune, sizes


def test_sizes_after_pruning_are_those_that_were_foretold(model):
    blocks = find_moe_blocks(model)
    foretold = sizes(model, blocks, keep=3)
    before = sizes(model, blocks)
    assert before.total == sum(p.numel() for p in model.parameters())
    prune(blocks, [[0, 1, 2]] * 2)
    assert sizes(model, blocks) == foretold
    expert = 3 * 32 * 24
    assert before.total - foretold.total == 2 * 5 * (expert + 32)
    assert before.active - foretold.active == 2 * 5 * 32, "only router rows were active among what is gone"
    assert before.active == before.total - 2 * 6 * expert


def test_perplexity_weighs_every_predicted_token_alike(model):
    texts = [torch.randint(257, (2, 9)), torch.randint(257, (1, 4))]
    losses = []
    with torch.no_grad():
        for ids in texts:
            chances = model(ids).logits.double().log_softmax(-1)
            losses += [
                -float(chances[b, s, ids[b, s + 1]]) for b in range(len(ids)) for s in range(ids.shape[1] - 1)
            ]
    assert perplexity(model, texts) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
