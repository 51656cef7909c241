"""Experts rounded to bits of their own, and what a model with packed experts computes."""

import json

import pytest
import torch
from tiny_models import tiny
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig, GptOssForCausalLM

from coterie.hf import find_moe_blocks
from coterie.kernels import ClampedSwiGLU
from coterie.nn import QuantizedExperts
from coterie.shrink import (
    awq,
    block_inputs,
    gptq,
    pack_block,
    quantize_block,
    routed_tokens,
)
from coterie.shrink.packed_blocks import bank_name, expert_matrices, expert_output, packed_nbytes, placed

IDS = torch.randint(257, (4, 60), generator=torch.Generator().manual_seed(0))
BITS = [1, 2, 3, 4, 8, 3, 2, 1]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_packed_model_computes_with_the_rounded_weights(model):
    blocks = find_moe_blocks(model)
    packed = []
    for block in blocks:
        inputs_TD = block_inputs(model, block, [IDS])
        packed.append(quantize_block(block, inputs_TD, BITS, "rtn", group_size=32))
        for e, (w_in, w_out) in enumerate(zip(*packed[-1], strict=True)):
            block.experts.gate[e], block.experts.up[e] = w_in.dequantize()
            block.experts.down[e] = w_out.dequantize()
    expected = logits(model)
    for block, weights in zip(blocks, packed, strict=True):
        bank = pack_block(model, block, *weights)
        assert bank.packed.bits == BITS
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_packed_experts_leave_slots_outside_the_bank_alone(model):
    block = find_moe_blocks(model)[0]
    bank = pack_block(model, block, *quantize_block(block, block_inputs(model, block, [IDS]), [4] * 8, "rtn"))
    x_TD, weights_TK = torch.randn(5, 32), torch.rand(5, 2)
    experts_TK = torch.tensor([[0, 1], [2, 8], [8, 8], [3, -1], [7, 6]])
    y_TD = bank(x_TD, experts_TK, weights_TK)
    assert torch.equal(y_TD[2], torch.zeros(32))
    torch.testing.assert_close(y_TD[1:2], bank(x_TD[1:2], experts_TK[1:2, :1], weights_TK[1:2, :1]))


def output_error(block, inputs_TD, packed):
    """Of all experts on their own tokens."""
    routed, total = routed_tokens(block, inputs_TD), 0.0
    for e, (w_in, w_out) in enumerate(zip(*packed, strict=True)):
        x_nD, _ = routed.of(e)
        exact = expert_output(block, e, x_nD, *expert_matrices(block, e))
        total += (expert_output(block, e, x_nD, w_in.dequantize(), w_out.dequantize()) - exact).norm().item()
    return total


@pytest.mark.parametrize("rounding", ["gptq", "awq"])
def test_an_expert_is_rounded_on_its_tokens_times_the_root_of_their_weights(model, rounding):
    block = find_moe_blocks(model)[0]
    inputs_TD = block_inputs(model, block, [IDS])
    options = {"group_size": 32, "factors": (1.0,)}
    w_in, w_out = quantize_block(block, inputs_TD, [3] * 8, rounding, affinity=True, **options)
    expert = 5
    x_nD, weights_n = routed_tokens(block, inputs_TD).of(expert)
    assert weights_n.std() > 0.05
    first, last = expert_matrices(block, expert)

    def rounded(matrices, read_nD):
        scaled_nD = (read_nD * weights_n.sqrt().unsqueeze(1)).double()
        hessian = 2 * scaled_nD.T @ scaled_nD / len(read_nD)
        if rounding == "awq":
            return awq(matrices, read_nD.abs().mean(0), hessian, 3, **options)
        return gptq(matrices, hessian, 3, **options)

    expected = rounded(first, x_nD)
    assert torch.equal(w_in[expert].dequantize(), expected.dequantize())
    gate, up = expected.dequantize()
    hidden_nF = torch.nn.functional.silu(x_nD @ gate.T) * (x_nD @ up.T)  # of the rounded first matrices
    assert torch.equal(w_out[expert].levels(), rounded(last, hidden_nF).levels())
    plain, _ = quantize_block(block, inputs_TD, [3] * 8, rounding, **options)
    assert any(not torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(plain, w_in, strict=True))


def test_with_one_expert_per_token_all_weights_are_one_and_affinity_changes_nothing():
    model = tiny(num_experts_per_tok=1)
    block = find_moe_blocks(model)[0]
    inputs_TD = block_inputs(model, block, [IDS])
    options = {"group_size": 32, "factors": (1.0,)}
    plain, weighted = (
        quantize_block(block, inputs_TD, [3] * 8, affinity=affinity, **options) for affinity in (False, True)
    )
    for a, b in zip((*plain[0], *plain[1]), (*weighted[0], *weighted[1]), strict=True):
        assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_changes_what_experts_give_less_than_rounding_to_nearest(model, bits):
    block = find_moe_blocks(model)[1]
    inputs_TD = block_inputs(model, block, [IDS])
    options = {"group_size": 32, "factors": (1.0,)}
    nearest, gptq = (
        output_error(block, inputs_TD, quantize_block(block, inputs_TD, [bits] * 8, rounding, **options))
        for rounding in ("rtn", "gptq")
    )
    assert gptq < 0.9 * nearest


def test_awq_beats_rounding_to_nearest_where_some_inputs_are_large(model):
    block = find_moe_blocks(model)[1]
    inputs_TD = block_inputs(model, block, [IDS]) * torch.logspace(-1, 1, 32)
    options = {"group_size": 32, "factors": (1.0,)}
    nearest, scaled = (
        output_error(block, inputs_TD, quantize_block(block, inputs_TD, [3] * 8, rounding, **options))
        for rounding in ("rtn", "awq")
    )
    assert scaled < 0.8 * nearest


def test_fewer_tokens_than_columns_give_finite_weights_and_no_token_a_named_warning(model):
    block = find_moe_blocks(model)[1]
    few_TD = block_inputs(model, block, [IDS[:1, :2]])
    reached = {e for e in range(8) if len(routed_tokens(block, few_TD).of(e)[0])}
    with pytest.warns(UserWarning, match="expert") as warned:
        w_in, w_out = quantize_block(block, few_TD, [2] * 8, factors=(1.0,))
    assert all(bool(w.dequantize().isfinite().all()) for w in (*w_in, *w_out))
    unreached = [
        f"model.layers.1.mlp, expert {e}: no calibration token reached it; it is rounded to nearest"
        for e in range(8)
        if e not in reached
    ]
    assert [str(w.message) for w in warned if "no calibration token" in str(w.message)] == unreached


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_bytes_are_foretold(model, group_size):
    block = find_moe_blocks(model)[0]
    foretold = packed_nbytes(block, BITS, group_size)
    inputs_TD = block_inputs(model, block, [IDS])
    options = {"group_size": group_size, "factors": (1.0,)}
    bank = pack_block(model, block, *quantize_block(block, inputs_TD, BITS, "rtn", **options))
    assert bank.packed.nbytes == foretold == sum(t.nbytes for t in bank.buffers())


def test_bytes_of_input_scales_are_foretold(model):
    block = find_moe_blocks(model)[0]
    foretold = packed_nbytes(block, [4] * 8, 32, scaled=True)
    options = {"group_size": 32, "factors": (1.0,)}
    packed = quantize_block(block, block_inputs(model, block, [IDS]), [4] * 8, "awq", **options)
    assert pack_block(model, block, *packed).packed.nbytes == foretold


def test_banks_take_turns(model):
    before = logits(model)
    block = find_moe_blocks(model)[0]
    name, whole = bank_name(block), block.bank
    pack_block(model, block, *quantize_block(block, block_inputs(model, block, [IDS]), [2] * 8, "rtn"))
    packed = model.get_submodule(name)
    after = logits(model)
    with placed(model, {name: whole}):
        assert torch.equal(logits(model), before)
        with placed(model, {name: packed}):
            assert torch.equal(logits(model), after)
    assert torch.equal(logits(model), after)
    assert not torch.equal(after, before)


def test_another_router_and_a_shared_expert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = DeepseekV3Config(**sizes, qk_nope_head_dim=8, first_k_dense_replace=1, initializer_range=0.5)
    model = DeepseekV3ForCausalLM(config).eval()
    before = logits(model)
    (block,) = find_moe_blocks(model)
    inputs_TD = block_inputs(model, block, [IDS])
    pack_block(model, block, *quantize_block(block, inputs_TD, [8] * 8, "rtn", group_size=32))
    assert (logits(model) - before).norm() < 0.05 * before.norm()


def gpt_oss():
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8}
    model = GptOssForCausalLM(GptOssConfig(**sizes, num_experts_per_tok=2)).eval()
    (block,) = find_moe_blocks(model)
    with torch.no_grad():
        for parameter in block.bank.parameters():
            parameter.normal_(std=0.3)
    block.bank.limit = 0.5  # so that some values are clamped
    return model, block


def test_a_clamped_gate_is_packed_with_its_clamp():
    model, block = gpt_oss()
    x_nD = torch.randn(40, 32)
    expected = block.bank(x_nD, torch.full((40, 1), 3), torch.ones(40, 1))
    torch.testing.assert_close(expert_output(block, 3, x_nD, *expert_matrices(block, 3)), expected)
    before, inputs_TD = logits(model), block_inputs(model, block, [IDS])
    bank = pack_block(model, block, *quantize_block(block, inputs_TD, [8] * 8, "rtn", group_size=32))
    assert bank.packed.activation == ClampedSwiGLU(0.5, 1.702, 1.0)
    assert float((logits(model) - before).norm() / before.norm()) < 0.01
    again = QuantizedExperts.from_layout(json.loads(json.dumps(bank.packed.layout())))
    assert again.activation == bank.packed.activation


def test_experts_that_no_kernel_computes_are_refused(model):
    block = find_moe_blocks(model)[0]
    block.bank.act_fn = torch.nn.Mish()
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts .* cannot be packed"):
        expert_output(block, 0, torch.randn(2, 32), *expert_matrices(block, 0))


def test_one_width_per_expert(model):
    block = find_moe_blocks(model)[0]
    with pytest.raises(ValueError, match="3 bit widths for 8 experts"):
        quantize_block(block, torch.randn(9, 32), [1, 2, 3])
