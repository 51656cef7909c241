import torch
from torch.nn import functional as F

from coterie.data.domain_markov import domain_markov
from coterie.hf import find_moe_blocks
from coterie.reproduce.domain_lm import domain_lm, domain_loss


def test_a_model_is_trained_once_and_edits_stay_in_its_copy():
    first, ids = domain_lm(0, steps=2), domain_markov(4, seed=1)
    before = domain_loss(first, ids)
    for block in find_moe_blocks(first):
        block.keep([0, 1])
    again = domain_lm(0, steps=2)
    assert domain_loss(again, ids) == before != domain_loss(first, ids)
    assert find_moe_blocks(again)[0].num_experts == 16


def test_the_loss_counts_the_steps_of_the_chain_alone():
    model, ids = domain_lm(0, steps=2), domain_markov(4, seed=1)
    with torch.no_grad():
        chances = model(ids).logits.log_softmax(-1)
    steps = [F.nll_loss(chances[:, s], ids[:, s + 1]) for s in range(1, 32)]
    assert abs(domain_loss(model, ids) - float(sum(steps)) / 31) < 1e-5
