import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import coterie.hf  # noqa: F401 (registers experts_implementation="coterie")
from coterie.language.dynamic_routing import make_ffn, routing_loss, swap_to_top_p
from coterie.models import Decoder, DecoderConfig
from coterie.nn import LinearScore, MoE, Monitor, Router, Routing, SwiGLUExperts, TopK, TopP

CONFIG = DecoderConfig(
    37, dim=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden=16, num_experts=8, expert_hidden=8
)
SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 4,
    "initializer_range": 0.5, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=8, moe_intermediate_size=8),
    "qwen3-moe, renormalised": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=8, moe_intermediate_size=8, norm_topk_prob=True
    ),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **SIZES, num_experts=8, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=8),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=8),
    "deepseek-v2": lambda: DeepseekV2Config(
        **{**SIZES, "num_key_value_heads": 2}, n_routed_experts=8, n_shared_experts=1, kv_lora_rank=8,
        q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, moe_intermediate_size=8,
        first_k_dense_replace=1, routed_scaling_factor=2.5, topk_method="greedy",
    ),
}  # fmt: skip


def model_of(config, experts="grouped_mm"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, experts_implementation=experts).eval()


@torch.no_grad()
def logits_of(model):
    ids = torch.arange(1, 41).view(2, 20)
    return model(ids).logits


@given(seed=st.integers(0, 1000))
def test_a_larger_p_never_takes_an_expert_away(seed):
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
    few, many = TopP(0.3)(logits), TopP(0.6)(logits)
    assert bool((few.used_TE <= many.used_TE).all())


def test_sure_routers_use_one_expert_and_undecided_ones_about_p_times_e():
    assert TopP(0.4)(100 * torch.eye(16)).slots_per_token.unique().tolist() == [1]
    assert TopP(0.4)(torch.zeros(3, 16)).slots_per_token.unique().tolist() == [math.floor(0.4 * 16) + 1]


def test_a_tiny_p_is_top_1_with_its_probability_and_p_of_one_is_the_dense_mixture():
    score, bank, x = LinearScore(8, 4), SwiGLUExperts(4, 8, 16), torch.randn(10, 8)
    single, dense = MoE(Router(score, TopP(1e-6)), bank), MoE(Router(score, TopP(1.0)), bank)
    top_1 = MoE(Router(score, TopK(1, renormalize=False)), bank)
    torch.testing.assert_close(single(x)[0], top_1(x)[0])
    torch.testing.assert_close(dense(x)[0], bank(x, Routing.dense(score(x).softmax(-1))))


def test_the_loss_is_the_papers_formula():
    routings = [TopP(0.5)(torch.randn(30, 8)) for _ in range(2)]
    expected = 0.0
    for routing in routings:
        f, q = routing.load.double() / 30, routing.scores.double().mean(0)
        entropy = -(routing.scores * routing.scores.log()).sum(-1).mean()
        expected += 0.3 * 8 * float((f * q).sum()) + 0.2 * float(entropy)
    assert routing_loss(routings, alpha=0.3, beta=0.2).item() == pytest.approx(expected, rel=1e-5)


def test_padding_is_left_out_of_the_loss():
    router, x = Router(LinearScore(8, 6), TopP(0.5)), torch.randn(10, 8)
    padded, alone = router(x, mask=torch.arange(10) < 6), router(x[:6])
    torch.testing.assert_close(routing_loss([padded]), routing_loss([alone]))


def test_the_entropy_loss_lowers_the_number_of_experts():
    used = {}
    for beta in (0.0, 0.1):
        torch.manual_seed(0)
        model = Decoder(CONFIG, make_ffn(CONFIG, p=0.5))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        ids = torch.randint(37, (8, 17))
        for _ in range(40):
            logits, routings = model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            (loss + routing_loss(routings, beta=beta)).backward()
            optimizer.step()
        monitor = Monitor()
        monitor.update(routings)
        used[beta] = monitor.experts_per_token.mean().item()
    assert used[0.1] < used[0.0] - 0.3


def test_layers_may_have_their_own_p():
    _, routings = Decoder(CONFIG, make_ffn(CONFIG, [1.0, 0.5, 1e-6]))(torch.randint(37, (2, 9)))
    counts = [routing.slots_per_token.double().mean().item() for routing in routings]
    assert counts[0] == 8
    assert 1 < counts[1] < 8
    assert counts[2] == 1


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_at_p_of_one_a_swapped_checkpoint_computes_what_it_did(family, experts):
    model = model_of(MODELS[family](), experts)
    before = logits_of(model)
    with swap_to_top_p(model, 1.0):
        torch.testing.assert_close(logits_of(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_every_experts_implementation_leaves_unused_slots_out(family):
    outputs = []
    for experts in ("eager", "grouped_mm", "batched_mm", "coterie"):
        model = model_of(MODELS[family](), experts)
        swap = swap_to_top_p(model, 0.4)
        outputs.append(logits_of(model))
        monitor = Monitor()
        monitor.update(swap.routings)
        assert bool((monitor.experts_per_token < 4).all())
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-4, rtol=1e-4)


def test_where_experts_cannot_skip_a_slot_the_result_is_the_same():
    config, outputs = MODELS["olmoe"](), []
    for can_skip in (True, False):
        model = model_of(config)
        if not can_skip:
            for layer in model.model.layers:
                layer.mlp.experts = Unskippable(layer.mlp.experts)
        swap_to_top_p(model, 0.4)
        outputs.append(logits_of(model))
    torch.testing.assert_close(*outputs)


class Unskippable(nn.Module):
    """Experts that fail at ids outside 0 … E-1."""

    def __init__(self, experts):
        super().__init__()
        self.inner = experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        assert int(top_k_index.max()) < 8
        return self.inner(hidden_states, top_k_index, top_k_weights)


@pytest.mark.parametrize("family", MODELS)
def test_a_swap_can_be_undone_and_leaves_nothing_behind(family):
    model = model_of(MODELS[family]())
    before, keys = logits_of(model), list(model.state_dict())
    swap = swap_to_top_p(model, 0.3)
    assert float((logits_of(model) - before).abs().max()) > 1e-4
    assert list(model.state_dict()) == keys
    swap.undo()
    swap.undo()
    assert torch.equal(logits_of(model), before)
    swap_to_top_p(model, 0.3).undo()  # and it can be swapped again


def test_a_swapped_block_computes_top_p_over_its_own_gate():
    model = model_of(MODELS["mixtral"]())
    block, x = model.model.layers[0].mlp, torch.randn(1, 12, 16)
    bank, score = SwiGLUExperts(8, 16, 24), LinearScore(16, 8)
    bank.gate_up_proj.data, bank.down_proj.data = block.experts.gate_up_proj, block.experts.down_proj
    score.weight.data = block.gate.weight
    for options in ({}, {"max_k": 7}, {"renormalize": False}):
        mine = MoE(Router(score, TopP(0.5, **{"max_k": 4, "renormalize": True, **options})), bank)
        with swap_to_top_p(model, 0.5, **options) as swap:
            torch.testing.assert_close(block(x), mine(x)[0])
        assert swap.routings[0].load.tolist() == mine(x)[1].load.tolist()


def test_layers_of_a_checkpoint_may_have_their_own_p():
    model = model_of(MODELS["olmoe"]())
    with swap_to_top_p(model, [1e-6, 1.0]) as swap:
        assert swap.routings == []
        logits_of(model)
    assert swap.layers == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [routing.slots_per_token.unique().tolist() for routing in swap.routings] == [[1], [4]]


def test_router_logits_and_bfloat16_and_gradients_survive_a_swap():
    model = model_of(MODELS["qwen3-moe"]()).to(torch.bfloat16)
    with swap_to_top_p(model, 0.5) as swap:
        output = model(torch.arange(1, 21).view(1, 20), output_router_logits=True)
        output.logits.float().sum().backward()
    torch.testing.assert_close(output.router_logits[0].float(), swap.routings[0].logits)
    assert bool(model.model.layers[0].mlp.gate.weight.grad.isfinite().all())
    assert float(model.model.layers[0].mlp.gate.weight.grad.abs().sum()) > 0


def swapped_twice():
    model = model_of(MODELS["olmoe"]())
    swap_to_top_p(model, 0.5)
    swap_to_top_p(model, 0.5)


def spread_over_devices():
    model = model_of(MODELS["olmoe"]())
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    return model


def sigmoid_gate():
    return model_of(
        DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 2}, n_routed_experts=8, n_shared_experts=1, n_group=2,
            topk_group=1, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=8, moe_intermediate_size=8, first_k_dense_replace=1,
        ), "eager"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_ffn(CONFIG, 0.0), "p=0.0; should lie in 0 < p ≤ 1"),
        (lambda: make_ffn(CONFIG, [0.4, 0.5]), "p has 2 values but the model has 3 MoE layers"),
        (lambda: swap_to_top_p(nn.Linear(2, 2), 0.5), "no MoE block in Linear"),
        (lambda: swap_to_top_p(model_of(MODELS["olmoe"]()), 1.2), "p=1.2"),
        (lambda: swap_to_top_p(model_of(MODELS["olmoe"]()), [0.5]), "p has 1 values but the model has 2"),
        (lambda: swap_to_top_p(model_of(MODELS["olmoe"]()), 0.5, max_k=9), "max_k=9"),
        (lambda: swap_to_top_p(model_of(MODELS["olmoe"]()), 0.5, max_k=0), "max_k=0"),
        (lambda: swap_to_top_p(spread_over_devices(), 0.5), "model.layers.1.mlp has its experts spread"),
        (swapped_twice, "model.layers.0.mlp routes by top-p already"),
        (lambda: swap_to_top_p(sigmoid_gate(), 0.5), "does not weigh its top-4 by softmax scores"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_refused_swap_changes_nothing():
    model = model_of(MODELS["olmoe"]())
    before = logits_of(model)
    with pytest.raises(ValueError, match="max_k=9"):
        swap_to_top_p(model, 0.01, max_k=9)
    assert torch.equal(logits_of(model), before)
