"""Slices of fused banks, trained without a trace elsewhere."""

import pytest
import torch
from tiny_moe import tiny_moe, two_texts
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM

from coterie.hf import find_moe_blocks
from coterie.tune import Target, all_experts, all_routers, expert_slices, replaced, snapshot, trainable


def gpt_oss():
    """A bank that is transposed, interleaved and biased."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    return GptOssForCausalLM(GptOssConfig(**sizes, num_experts_per_tok=2)).eval()


def train(model, slices, steps=3, **options):
    ids = two_texts()[0][:4]
    with trainable(model, slices) as weights:
        optimizer = torch.optim.AdamW(weights.parameters, lr=1e-2, **options)
        for _ in range(steps):
            logits = model(input_ids=ids).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            weights.collect()
            optimizer.step()
            weights.write()
    return weights


@pytest.mark.parametrize("make", [tiny_moe, gpt_oss])
@pytest.mark.parametrize("router", ["layer", "row"])
def test_all_but_the_expert_and_its_router_stay_bit_by_bit_even_with_weight_decay(make, router):
    model, before = make(), make().state_dict()
    block = find_moe_blocks(model)[1]
    train(
        model, expert_slices(model, find_moe_blocks(model), [Target(1, 2)], router=router), weight_decay=0.5
    )
    for name, now in model.state_dict().items():
        if name in block.layout.experts.values():
            others = [0, 1, 3]
            assert torch.equal(now[others], before[name][others]), name
            assert not torch.equal(now[2], before[name][2]), name
        elif name in (block.layout.router["rows"], block.layout.router.get("bias")):
            others = [0, 1, 3] if router == "row" else []
            assert torch.equal(now[others], before[name][others]), name
            assert not torch.equal(now[2], before[name][2]), name
        else:
            assert torch.equal(now, before[name]), name


def test_a_slice_moves_as_it_would_if_everything_was_trained():
    one, other = tiny_moe(), tiny_moe()
    train(one, expert_slices(one, find_moe_blocks(one), [Target(1, 2)]), steps=1)
    whole = torch.optim.AdamW(other.parameters(), lr=1e-2)
    ids = two_texts()[0][:4]
    F.cross_entropy(other(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    whole.step()
    down = [m.model.layers[1].mlp.experts.down_proj[2] for m in (one, other)]
    torch.testing.assert_close(*down)


def test_in_16_bits_steps_too_small_for_them_add_up():
    model = tiny_moe().to(torch.bfloat16)
    weight = model.model.layers[1].mlp.experts.down_proj
    before = weight.detach().clone()
    with trainable(model, expert_slices(model, find_moe_blocks(model), [Target(1, 2)])) as weights:
        optimizer = torch.optim.SGD(weights.parameters, lr=1.0)
        for _ in range(64):
            for parameter in weights.parameters:
                parameter.grad = torch.full_like(parameter, -2e-5)
            optimizer.step()
            weights.write()
    moved = (weight - before).float()
    assert moved[2].mean().item() == pytest.approx(64 * 2e-5, rel=0.3)
    assert not moved[[0, 1, 3]].any()


def test_afterwards_the_model_asks_for_the_gradients_it_asked_for_before():
    model = tiny_moe()
    model.model.embed_tokens.weight.requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    with trainable(model, all_routers(model, find_moe_blocks(model))):
        assert sum(p.requires_grad for p in model.parameters()) == 2
    assert [p.requires_grad for p in model.parameters()] == asked


def test_the_model_as_it_was_comes_and_goes():
    model, before = tiny_moe(), tiny_moe()
    ids = two_texts()[0][:2]
    slices = all_experts(model, find_moe_blocks(model))
    with trainable(model, slices) as weights, torch.no_grad():
        original = snapshot(slices)
        for parameter in weights.parameters:
            parameter.add_(0.1)
        weights.write()
        changed = model(input_ids=ids).logits
        with replaced(slices, original):
            assert torch.equal(model(input_ids=ids).logits, before(input_ids=ids).logits)
        assert torch.equal(model(input_ids=ids).logits, changed)
        assert not torch.equal(changed, before(input_ids=ids).logits)


def test_two_experts_of_a_block_share_its_router_once():
    model = tiny_moe()
    slices = expert_slices(model, find_moe_blocks(model), [Target(0, 1), Target(0, 2)])
    assert len(slices) == 2 * 2 + 1


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([Target(2, 0)], {}, r"layer 2: the model has 2 MoE blocks; use 0 … 1"),
        ([Target(0, 4)], {}, r"expert 4: model\.layers\.0\.mlp has 4; use 0 … 3"),
        ([], {}, "no expert was given"),
        ([Target(0, 0)], {"router": "column"}, "router='column'"),
    ],
)
def test_what_does_not_exist_is_refused(targets, options, message):
    model = tiny_moe()
    with pytest.raises(ValueError, match=message):
        expert_slices(model, find_moe_blocks(model), targets, **options)
