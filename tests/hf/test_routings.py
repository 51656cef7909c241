"""`route`: decisions of transformers' blocks with the router's gradient."""

import pytest
import torch
from families import tiny_model

from coterie.hf import find_moe_blocks, recording, route

IDS = torch.arange(3, 35).view(2, 16)

# softmax, renormalised or not; sigmoid with a selection bias; biased logits; a router inside the router
FAMILIES = [
    ("qwen3_moe", "Qwen3MoeExperts"),
    ("qwen2_moe", "Qwen2MoeExperts"),
    ("mixtral", "MixtralExperts"),
    ("deepseek_v3", "DeepseekV3Experts"),
    ("gpt_oss", "GptOssExperts"),
]


@pytest.mark.parametrize(("family", "experts"), FAMILIES, ids=lambda name: name)
def test_decisions_are_those_of_the_blocks(family, experts):
    model = tiny_model(family, experts)
    blocks = find_moe_blocks(model)
    with recording(blocks) as records, torch.no_grad():
        expected = model(input_ids=IDS).logits
    output, routings = route(model, blocks, input_ids=IDS)
    assert torch.equal(output.logits, expected)
    for routing, record in zip(routings, records, strict=True):
        routing.validate()
        assert torch.equal(routing.experts, record.experts)
        torch.testing.assert_close(routing.weights, record.weights)
        best = routing.logits.topk(routing.experts.shape[1]).indices
        assert torch.equal(best.sort(1).values, routing.experts.sort(1).values)


def test_scores_and_weights_carry_the_routers_gradient():
    model = tiny_model(*FAMILIES[0])
    blocks = find_moe_blocks(model)
    _, routings = route(model, blocks, input_ids=IDS)
    for what in (routings[1].scores[:, 0].sum(), routings[1].weights[:, 0].sum()):
        (grad,) = torch.autograd.grad(what, model.model.layers[1].mlp.gate.weight, retain_graph=True)
        assert bool((grad != 0).any())


def test_padding_uses_no_expert_and_hooks_are_gone():
    model = tiny_model(*FAMILIES[0])
    mask = torch.ones_like(IDS)
    mask[1, 10:] = 0
    _, routings = route(model, find_moe_blocks(model), input_ids=IDS, attention_mask=mask)
    assert torch.equal(routings[0].mask, mask.flatten().bool())
    assert int(routings[0].load.sum()) == 2 * 26
    routings[0].validate()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_block_that_was_not_reached_is_named():
    model = tiny_model("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeExperts")  # whose vision experts see no text
    with pytest.raises(ValueError, match=r"vision_moe: no token came to its router and experts"):
        route(model, find_moe_blocks(model), input_ids=IDS)
