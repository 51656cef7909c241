"""Text that a model writes itself: the search is the published one."""

import itertools
import math

import pytest
import torch
from tiny_models import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from coterie.hf import find_moe_blocks, recording
from coterie.shrink import balance_sigma, ebss, expert_usage, self_sample


@torch.no_grad()
def read(model, ids):
    """(log-probabilities [S, V], expert counts of each block) of one sentence, by a whole forward pass."""
    blocks = find_moe_blocks(model)
    with recording(blocks) as records:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.log_softmax(-1), [r.sum_by_expert(torch.ones_like(r.weights)) for r in records]


def sigma_of(counts):
    """As the paper writes it."""
    total = 0.0
    for count in counts:
        usage = [n / sum(count.tolist()) for n in count.tolist()]
        mean = sum(usage) / len(usage)
        total += math.sqrt(sum((u - mean) ** 2 for u in usage) / (len(usage) - 1))
    return total / len(counts)


def plain_search(model, first, length, width, tau):
    """One sentence, branch by branch, without a cache."""
    branches = [(0.0, [first])]  # log-probability, ids
    while len(branches[0][1]) < length:
        scored = []
        for total, ids in branches:
            logp, counts = read(model, ids)
            for v in range(logp.shape[1]):
                new = total + logp[-1, v].item()
                scored.append((-new / (len(ids) + 1) + sigma_of(counts) / tau, new, [*ids, v]))
        branches = [(new, ids) for _, new, ids in sorted(scored)[:width]]
    return branches[0]


@pytest.mark.parametrize("tau", [1.2, 0.05])
def test_the_search_is_the_published_one(tau):
    model = tiny(vocab_size=11)
    text = ebss(model, 3, 5, width=3, tau=tau, first_token=[4, 7], batch_size=2)
    assert set(text.ids_NS[:, 0].tolist()) <= {4, 7}
    for ids, nll in zip(text.ids_NS.tolist(), text.nll_N.tolist(), strict=True):
        logp, found = plain_search(model, ids[0], 5, 3, tau)
        assert ids == found
        assert nll == pytest.approx(-logp / 4, rel=1e-4)


def test_a_beam_as_wide_as_the_tree_finds_the_likeliest_text():
    model = tiny(vocab_size=5)
    text = ebss(model, 1, 4, width=5**3, tau=math.inf, first_token=[2])
    all_ids = torch.tensor([[2, *rest] for rest in itertools.product(range(5), repeat=3)])
    with torch.no_grad():
        logp = model(all_ids).logits.log_softmax(-1)[:, :-1].gather(2, all_ids[:, 1:, None]).sum((1, 2))
    assert text.ids_NS[0].tolist() == all_ids[logp.argmax()].tolist()
    assert text.nll_N.item() == pytest.approx(-logp.max().item() / 3, rel=1e-4)


def test_the_smaller_tau_the_more_even_and_the_less_likely():
    model = tiny(vocab_size=40)
    strict, lax = (ebss(model, 6, 16, tau=tau, seed=1) for tau in (0.005, 1e6))
    sigma = [balance_sigma(expert_usage(model, [text.ids_NS])) for text in (strict, lax)]
    assert sigma[0] < 0.8 * sigma[1]
    assert strict.nll_N.mean() > lax.nll_N.mean()


def test_balance_over_the_set_looks_at_the_batches_before():
    model = tiny(vocab_size=40)
    options = {"tau": 0.01, "first_token": [3], "batch_size": 1}
    alone, together = (
        ebss(model, 4, 12, balance_scope=scope, **options).ids_NS for scope in ("sentence", "set")
    )
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[0], alone[3]), "the same start gives the same sentence"
    assert not torch.equal(together[0], together[3])


@pytest.mark.parametrize("expand", ["topk", "sample"])
def test_nll_is_what_the_model_says(expand):
    model = tiny(vocab_size=20)
    texts = [ebss(model, 4, 8, expand=expand), self_sample(model, 4, 8)]
    for text in texts:
        for ids, nll in zip(text.ids_NS.tolist(), text.nll_N.tolist(), strict=True):
            logp, _ = read(model, ids)
            expected = -logp[torch.arange(7), ids[1:]].mean().item()
            assert nll == pytest.approx(expected, rel=1e-4)
    searched, sampled = (text.nll_N.mean() for text in texts)
    assert searched < sampled


def test_batches_do_not_change_what_is_searched_and_seeds_do_change_what_is_drawn():
    model = tiny(vocab_size=20)
    first, second = (ebss(model, 5, 6, batch_size=size).ids_NS for size in (2, 5))
    assert torch.equal(first, second)
    again, other = (self_sample(model, 5, 6, seed=seed).ids_NS for seed in (0, 1))
    assert torch.equal(self_sample(model, 5, 6).ids_NS, again)
    assert not torch.equal(again, other)


def test_plain_sampling_follows_the_models_distribution():
    model = tiny(vocab_size=4, initializer_range=0.1)
    drawn = self_sample(model, 2000, 2, first_token=[1], batch_size=2000).ids_NS[:, 1]
    expected = read(model, [1])[0][0].exp()
    torch.testing.assert_close(drawn.bincount(minlength=4) / 2000, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0, length=8"),
        ({"length": 1}, "use n ≥ 1, length ≥ 2"),
        ({"length": 65}, "length=65, but the model has positions for 64"),
        ({"width": 0}, "use width ≥ 1 and tau > 0"),
        ({"tau": 0.0}, "use width ≥ 1 and tau > 0"),
        ({"expand": "all"}, "use topk or sample"),
        ({"first_token": "eos"}, 'first_token=\'eos\'; use "vocab", "bos" or a list'),
        ({"first_token": "bos"}, "has no beginning-of-text token"),
        ({"first_token": [257]}, "outside the vocabulary of 257"),
        ({"first_token": []}, "or none"),
    ],
)
def test_bad_wishes_are_refused(model, options, message):
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match=message):
        ebss(model, **{"n": 2, "length": 8} | options)


def test_a_dense_model_is_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="no MoE block"):
        ebss(dense, 1, 4)
