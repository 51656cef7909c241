"""Masks of a router's top-k: what runs, with what weights, and what training makes of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.hf import find_moe_blocks
from coterie.shrink import (
    PrefixMask,
    block_inputs,
    pack_block,
    quantize_block,
    random_mask,
    ratio_threshold,
    routed_tokens,
    top_any,
    train_top_any,
    weight_ratio,
)

IDS = torch.randint(257, (4, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def banks_of(model):
    return [block.bank for block in find_moe_blocks(model)]


def first_only(x_TD, weights_TK):
    return (torch.arange(weights_TK.shape[1]) == 0).expand_as(weights_TK).to(weights_TK)


@given(tokens=st.integers(1, 9), k=st.integers(1, 6), seed=st.integers(0, 99), soft=st.booleans())
def test_a_prefix_mask_keeps_the_largest_weights_and_at_least_one(tokens, k, seed, soft):
    torch.manual_seed(seed)
    mask = PrefixMask(8, k)
    torch.nn.init.normal_(mask.score.weight)
    mask.temperature = 1.0 if soft else None
    kept_TK = mask(torch.randn(tokens, 8), torch.rand(tokens, k).sort(1, descending=True).values)
    assert kept_TK.shape == (tokens, k)
    assert {0.0, 1.0} >= set(kept_TK.round(decimals=5).flatten().tolist())
    assert bool((kept_TK[:, 0] == 1).all())
    assert bool((kept_TK.diff(dim=1) < 1e-5).all())  # never a slot after one that is gone


def test_untrained_masks_change_nothing(model):
    banks = banks_of(model)
    before = logits(model)
    with top_any(banks, [PrefixMask(32, 2) for _ in banks], renormalize=True) as kept:
        torch.testing.assert_close(logits(model), before)
    assert [(k.slots, k.kept, k.ratio) for k in kept] == [(128, 128, 1.0)] * 2


def test_keeping_the_first_expert_is_top_1_routing(model):
    with top_any(banks_of(model), [first_only] * 2, renormalize=True) as kept:
        masked = logits(model)
    assert [k.ratio for k in kept] == [0.5, 0.5]
    for block in find_moe_blocks(model):
        block.set_top_k(1)
    torch.testing.assert_close(masked, logits(model))


def test_without_renormalisation_the_weights_stay_as_they_were(model):
    block = find_moe_blocks(model)[0]
    routed = routed_tokens(block, block_inputs(model, block, [IDS]))
    seen = []
    with top_any([block.bank], [first_only], renormalize=False):
        block.bank.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[2]), with_kwargs=True
        )
        logits(model)
    torch.testing.assert_close(seen[0].max(1).values, routed.weights_TK.max(1).values)
    assert bool((seen[0].min(1).values == 0).all())


@pytest.mark.parametrize("packed", [False, True])
def test_an_expert_outside_the_mask_is_not_computed(model, packed):
    few = IDS[:1, :8]
    block = find_moe_blocks(model)[1]
    inputs_TD = block_inputs(model, block, [few])
    routed = routed_tokens(block, inputs_TD)
    top_T = routed.experts_TK.gather(1, routed.weights_TK.argmax(1, keepdim=True))
    never = sorted(set(range(8)) - set(top_T.flatten().tolist()))
    assert set(never) & set(routed.experts_TK.flatten().tolist())
    bank = block.bank
    if packed:
        bank = pack_block(model, block, *quantize_block(block, inputs_TD, [3] * 8, "rtn", group_size=32))
        for e in never:
            bank.packed.packed().w_out[e].scales.fill_(torch.nan)
    else:
        block.experts.down[never] = torch.nan
    assert not bool(logits(model, few).isfinite().all())
    with top_any([bank], [first_only], renormalize=True):
        assert bool(logits(model, few).isfinite().all())


def trained(model, sparsity, steps=30):
    torch.manual_seed(0)
    banks = banks_of(model)
    masks = [PrefixMask(32, 2) for _ in banks]
    batches = torch.randint(257, (steps, 4, 16), generator=torch.Generator().manual_seed(1)).unbind()
    options = {"renormalize": True, "sparsity": sparsity, "lr": 0.05}
    train_top_any(model, banks, masks, model, batches, **options)
    with top_any(banks, masks, renormalize=True) as kept:
        logits(model)
    return masks, [k.ratio for k in kept]


def test_without_a_price_everything_stays_and_with_a_high_one_only_the_first(model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    masks, free = trained(model, 0.0)
    assert min(free) > 0.9
    assert masks[0].temperature is None
    assert max(trained(model, 100.0)[1]) < 0.55
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_masks_learn_through_packed_experts(model):
    block = find_moe_blocks(model)[0]
    bank = pack_block(model, block, *quantize_block(block, block_inputs(model, block, [IDS]), [4] * 8, "rtn"))
    mask = PrefixMask(32, 2)
    steps = []
    on_step = lambda *numbers: steps.append(numbers)  # noqa: E731
    train_top_any(model, [bank], [mask], model, [IDS, IDS], renormalize=True, on_step=on_step)
    assert len(steps) == 2
    assert bool(mask.score.weight.any())


def test_the_threshold_keeps_the_share_that_was_asked_for():
    weights_TK = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    falling_TK = weights_TK.sort(1, descending=True).values
    for share in (0.25, 0.5, 0.8, 1.0):
        kept_TK = weight_ratio(ratio_threshold(weights_TK, share))(torch.empty(2000, 8), falling_TK)
        assert kept_TK.mean().item() == pytest.approx(share, abs=0.002)
    with pytest.raises(ValueError, match=r"keep=0.2 of 4 slots; a token keeps at least one: 0.25 … 1"):
        ratio_threshold(weights_TK, 0.2)


def test_the_median_drops_half_of_the_second_experts():
    weights_TK = torch.rand(999, 2, generator=torch.Generator().manual_seed(0)).softmax(1)
    falling_TK = weights_TK.sort(1, descending=True).values
    kept_TK = weight_ratio(ratio_threshold(weights_TK))(torch.empty(999, 8), falling_TK)
    assert kept_TK[:, 0].sum() == 999
    assert kept_TK[:, 1].sum() == 500


@pytest.mark.parametrize("first", [True, False])
def test_chance_keeps_the_share_that_was_asked_for(first):
    mask = random_mask(0.6, torch.Generator().manual_seed(0), keep_first=first)
    kept_TK = mask(torch.empty(5000, 8), torch.rand(5000, 4))
    assert kept_TK.mean().item() == pytest.approx(0.6, abs=0.01)
    assert bool((kept_TK[:, 0] == 1).all()) == first


def test_transformers_is_told_of_slots_without_an_expert_while_there_are_some(model):
    banks = banks_of(model)
    told = lambda: [bank._is_expert_parallel for bank in banks]  # noqa: E731
    with top_any(banks, [first_only] * 2, renormalize=True):
        assert told() == [True, True]
    assert told() == [False, False]
