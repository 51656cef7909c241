"""Coterie's routers in the place of a model's own."""

import pytest
import torch
from tiny_models import grouped, tiny
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from coterie.hf import BlockRecord, find_moe_blocks, recording
from coterie.nn import LinearScore, Router, TopK
from coterie.shrink import dern
from coterie.shrink.segments import reordered
from coterie.shrink.transfer import rerouted, softmax_router, transferred

IDS = torch.randint(60, (3, 20), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def record(model):
    blocks = find_moe_blocks(model)
    with recording(blocks, keep_inputs=1000) as records:
        logits(model)
    return blocks, records


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def output(block, x_TD):
    return block.module(x_TD[None])[0]


def test_dense_routing_over_permuted_copies_is_the_same_layer_after_transfer():
    model = tiny(num_experts_per_tok=8)
    blocks, records = record(model)
    block, x = blocks[0], torch.randn(50, 32)
    for twin in range(4, 8):
        block.replace([twin], reordered(block.experts[[twin - 4]], torch.randperm(24)))
    block.experts.down.mul_(0.02)
    before, router = output(block, x), softmax_router(block, records[0])
    block.set_top_k(4)
    done = dern(block, torch.arange(8.0, 0, -1), 4)
    dense = Router(router.score, TopK(4))
    with rerouted([block], [transferred(dense, done.transfer)]):
        torch.testing.assert_close(output(block, x), before, rtol=0, atol=1e-5)
    assert not torch.allclose(output(block, x), before, atol=1e-3), (
        "deleted rows alone lose their tokens' weight"
    )


MODELS = {
    "renormalised": tiny,
    "softmax before top-k": lambda: OlmoeForCausalLM(
        OlmoeConfig(**SIZES, num_experts=8, norm_topk_prob=False)
    ).eval(),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8)).eval(),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_copied_router_in_its_own_place_changes_nothing(family):
    torch.manual_seed(0)
    model = MODELS[family]()
    blocks, records = record(model)
    routers = [softmax_router(block, r) for block, r in zip(blocks, records, strict=True)]
    assert {router.select.renormalize for router in routers} == {family != "softmax before top-k"}
    wanted = logits(model)
    for block in blocks:  # so that the copies alone know
        block.router.rows.mul_(-1)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)
    with rerouted(blocks, routers):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)


def test_scores_are_the_old_ones_remapped_before_top_k(model):
    blocks, records = record(model)
    router = softmax_router(blocks[0], records[0])
    transfer = torch.rand(4, 8)
    transfer[:, :4] = torch.eye(4)
    x = records[0].inputs
    p = (x.double() @ blocks[0].router.rows.double().T).softmax(1) @ transfer.double().T
    best = p.topk(2, dim=1)
    routing = transferred(router, transfer)(x)
    assert torch.equal(routing.experts, best.indices)
    wanted = best.values / best.values.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_router_is_copied_to_within_its_precision():
    model = tiny().bfloat16()
    blocks, records = record(model)
    assert softmax_router(blocks[1], records[1]).score.weight.dtype == torch.float32


def test_a_router_of_another_kind_is_refused(model):
    blocks, records = record(model)
    block, r = blocks[0], records[0]
    with pytest.raises(ValueError, match="no inputs were recorded"):
        softmax_router(block, BlockRecord(block.name, 8, r.experts, r.weights))
    other = BlockRecord(block.name, 8, r.experts.roll(1, 0), r.weights, inputs=r.inputs)
    with pytest.raises(ValueError, match="of the tokens only; the router is of another kind"):
        softmax_router(block, other)
    with (
        pytest.raises(ValueError, match="has 8 experts and its router 4"),
        rerouted([block], [Router(LinearScore(32, 4), TopK(2))]),
    ):
        pass


def test_a_router_that_a_plain_softmax_cannot_be_is_refused():
    block = find_moe_blocks(grouped())[0]
    with pytest.raises(ValueError, match="the router has selection_bias; a plain top-k softmax is needed"):
        softmax_router(block, BlockRecord(block.name, 8, inputs=torch.randn(4, 16)))
