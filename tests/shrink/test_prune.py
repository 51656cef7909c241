"""What is kept, and what the model computes without the rest."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

from coterie.hf import find_moe_blocks, recording
from coterie.shrink import METHODS, choose, least_output_error, no_reroute, overlap, prune, pruned

IDS = torch.randint(257, (3, 20), generator=torch.Generator().manual_seed(0))


def record(model, ids=IDS):
    blocks = find_moe_blocks(model)
    with recording(blocks, keep_inputs=1000) as records:
        logits(model, ids)
    return blocks, records


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def plain_block(block, x_TD, kept, reroute):
    """One Qwen3-MoE block in float64, token by token, with experts outside `kept` gone or silent."""
    rows, experts = block.router.rows.double(), block.experts
    output = torch.zeros_like(x_TD, dtype=torch.float64)
    for t, x in enumerate(x_TD.double()):
        score = (rows @ x).softmax(0)
        if reroute:
            score = score * torch.tensor([float(e in kept) for e in range(len(rows))], dtype=torch.float64)
        top = score.topk(block.top_k)
        for weight, e in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
            if e in kept:
                hidden = F.silu(experts.gate[e].double() @ x) * (experts.up[e].double() @ x)
                output[t] += weight * (experts.down[e].double() @ hidden)
    return output


@pytest.mark.parametrize("reroute", [True, False])
def test_removed_experts_give_nothing_and_their_tokens_go_on_or_stay(model, reroute):
    blocks, records = record(model)
    kept = [[0, 2, 3, 6], [1, 3, 4, 7]]
    wanted = [
        plain_block(block, r.inputs, ids, reroute)
        for block, r, ids in zip(blocks, records, kept, strict=True)
    ]
    with (pruned if reroute else no_reroute)(blocks, kept), torch.no_grad():
        found = [block.module(r.inputs[None])[0] for block, r in zip(blocks, records, strict=True)]
    for ours, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)


def test_tokens_all_of_whose_experts_are_silenced_get_nothing_and_are_counted(model):
    blocks, records = record(model)
    with no_reroute(blocks, [[0, 1], []]) as silenced:
        logits(model)
    assert [count.tokens for count in silenced] == [60, 60]
    assert silenced[0].unserved == int((records[0].experts > 1).all(1).sum())
    assert 0 < silenced[0].unserved < 60
    assert silenced[1].unserved == 60
    with no_reroute(blocks, [range(8)] * 2):
        kept_all = logits(model)
    assert torch.equal(kept_all, logits(model))


def test_while_pruned_it_is_the_pruned_model_and_afterwards_the_old_one(model):
    blocks, before, kept = find_moe_blocks(model), logits(model), [[0, 1, 2], [5, 6, 7]]
    with pruned(blocks, kept):
        during = logits(model)
    assert torch.equal(logits(model), before)
    prune(blocks, kept)
    assert torch.equal(logits(model), during)
    assert not torch.allclose(before, during)


def test_several_domains_count_alike_whatever_their_length(model):
    blocks, [long, _] = record(model, IDS.repeat(5, 1))
    _, [short, _] = record(model, IDS[:1])
    _, [other, _] = record(model, IDS[2:])
    mixture = choose(blocks[0], [long, other], "easy-ep", 4)
    assert mixture == choose(blocks[0], [record(model)[1][0], other], "easy-ep", 4)
    assert choose(blocks[0], [short, other], "easy-ep", 4) == choose(blocks[0], [other, short], "easy-ep", 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_as_many_as_it_was_asked_to(model, method):
    blocks, records = record(model)
    for keep in (2, 5, 8):
        for block, r in zip(blocks, records, strict=True):
            kept = choose(block, [r], method, keep)
            assert len(set(kept)) == keep
            assert kept == sorted(kept)


def test_random_choices_follow_the_seed(model):
    blocks, records = record(model)
    pick = partial(choose, blocks[0], records[:1], "random", 4)
    assert pick(seed=1) == pick(seed=1)
    assert len({tuple(pick(seed=s)) for s in range(10)}) > 5


def test_the_search_finds_the_choice_with_the_least_output_error(model):
    blocks, records = record(model)
    block, inputs = blocks[0], records[0].inputs
    full = plain_block(block, inputs, range(8), True)

    def error(kept):
        return float((plain_block(block, inputs, kept, True) - full).square().sum())

    found = least_output_error(block, inputs, 7)
    others = [[i for i in range(8) if i != left_out] for left_out in range(8)]
    assert error(found) == min(map(error, others))
    assert block.num_experts == 8


def test_the_search_is_refused_where_it_would_not_end_or_has_nothing_to_compare(model):
    block = find_moe_blocks(model)[0]
    with pytest.raises(ValueError, match="there are 70 ways to keep 4 of 8 experts, more than can be tried"):
        least_output_error(block, torch.zeros(3, 32), 4, limit=69)
    with pytest.raises(ValueError, match="no inputs were recorded"):
        least_output_error(block, torch.zeros(0, 0), 4)


def test_a_model_with_routing_groups_keeps_as_many_of_each():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    blocks, records = record(DeepseekV3ForCausalLM(config).eval())
    assert len(blocks) == 1, "the dense layer is no block"
    for method in ("easy-ep", "output-error"):
        kept = choose(blocks[0], records, method, 4)
        assert sum(i < 4 for i in kept) == 2
    with pytest.raises(ValueError, match="5 experts cannot be divided evenly"):
        choose(blocks[0], records, "easy-ep", 5)


@pytest.mark.parametrize("keep", [1, 9])
def test_fewer_than_a_token_needs_or_more_than_there_are_is_refused(model, keep):
    blocks, records = record(model)
    with pytest.raises(ValueError, match=f"keep={keep}, but model.layers.0.mlp has 8 .* use 2 ≤ keep ≤ 8"):
        choose(blocks[0], records[:1], "gating", keep)


@given(st.lists(st.permutations(range(6)), min_size=2, max_size=2))
def test_overlap_is_one_with_itself_and_the_same_both_ways(orders):
    a, b = ([sorted(order[:3])] for order in orders)
    assert overlap(a, a) == 1
    assert overlap(a, b) == overlap(b, a)


def test_a_family_whose_experts_lie_in_the_layer_itself_is_scored_but_not_searched():
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=257,
        vocab_size_per_layer_input=257,
        hidden_size=32,
        hidden_size_per_layer_input=0,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
    )
    blocks, records = record(Gemma4ForCausalLM(config).eval())
    assert len(choose(blocks[0], records[:1], "gating-norm", 2)) == 2
    with pytest.raises(ValueError, match="cannot be recorded in this family"):
        choose(blocks[0], records[:1], "easy-ep", 2)
    with pytest.raises(ValueError, match="cannot be run alone"):
        choose(blocks[0], records[:1], "output-error", 2)
