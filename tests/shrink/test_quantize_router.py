"""Routers in few bits: what they read, what they become, and what experts are then rounded on."""

import json

import pytest
import torch
from tiny_models import grouped, mixtral, tiny
from transformers import ZayaConfig, ZayaForCausalLM

from coterie.hf import find_moe_blocks, load
from coterie.report.quantized import print_quantized
from coterie.shrink import (
    block_inputs,
    gptq,
    pack_block,
    quantize_block,
    quantize_router,
    routed_tokens,
    rtn,
)
from coterie.shrink.quantize_block import SEARCH
from coterie.shrink.quantize_checkpoint import quantize_checkpoint
from coterie.shrink.routed import router_inputs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # tiny text: some experts see no token
IDS = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(0))
OPTIONS = {"group_size": 32, "factors": (1.0, 0.95)}


def projecting():
    """A router whose last map reads what three others made of the block's input."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_hidden_size": 32, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return ZayaForCausalLM(ZayaConfig(**sizes, num_experts=4, num_experts_per_tok=1)).eval()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Fewer scales are searched."""
    monkeypatch.setitem(SEARCH, "factors", [1.0, 0.95])


@pytest.mark.parametrize("make", [tiny, grouped, mixtral])
def test_a_linear_router_reads_what_its_block_reads(make):
    model = make()
    block = find_moe_blocks(model)[-1]
    inputs_TD = block_inputs(model, block, [IDS])
    assert torch.equal(router_inputs(block, inputs_TD), inputs_TD)


def test_a_router_that_projects_its_input_is_rounded_on_what_its_last_map_reads():
    model = projecting()
    block = find_moe_blocks(model)[-1]
    inputs_TD = block_inputs(model, block, [IDS])
    read = []
    last = block.module.get_submodule("gate.router_mlp.out_proj")
    last.register_forward_hook(lambda module, args, output: read.append(output))
    found_TD = router_inputs(block, inputs_TD)
    assert read == []  # the pass ends before
    routed_tokens(block, inputs_TD)
    torch.testing.assert_close(found_TD @ last.weight.T, read[0].reshape(len(found_TD), -1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_router_is_rounded_by_gptq_on_all_tokens_each_counted_once(model, bits):
    block = find_moe_blocks(model)[0]
    x_TD = block_inputs(model, block, [IDS])
    before = block.router.rows.clone()
    rows = quantize_router(block, x_TD, bits, **OPTIONS)
    expected = gptq(before, 2 * x_TD.double().T @ x_TD.double() / len(x_TD), bits, **OPTIONS)
    assert torch.equal(block.router.rows, before)
    assert rows.bits == bits
    assert torch.equal(rows.levels(), expected.levels())
    assert torch.equal(rows.dequantize(), expected.dequantize())


def test_gptq_moves_the_logits_less_than_rounding_to_nearest(model):
    block = find_moe_blocks(model)[1]
    x_TD = block_inputs(model, block, [IDS])
    exact_TE = x_TD @ block.router.rows.T
    gptq_, nearest, scaled = (
        (x_TD @ quantize_router(block, x_TD, 3, rounding, **OPTIONS).dequantize().T - exact_TE).norm()
        for rounding in ("gptq", "rtn", "awq")
    )
    assert gptq_ < 0.9 * nearest
    assert scaled <= nearest
    assert torch.equal(
        quantize_router(block, x_TD, 3, "rtn", **OPTIONS).levels(),
        rtn(block.router.rows, 3, **OPTIONS).levels(),
    )


def test_signs_make_no_router(model):
    block = find_moe_blocks(model)[0]
    with pytest.raises(ValueError, match=r"model.layers.0.mlp: signs alone .* 2, 3, 4 or 8 bits"):
        quantize_router(block, torch.randn(9, 32), 1)


def test_a_router_of_unknown_build_is_named(model, monkeypatch):
    block = find_moe_blocks(model)[0]
    gate = block.module.gate
    monkeypatch.setattr(block.module, "forward", lambda x: gate.forward(x))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp: its router's gate is not called by itself"):
        router_inputs(block, torch.randn(9, 32))


@pytest.mark.parametrize("stream", [False, True])
def test_moequant_rounds_the_router_first_and_experts_on_what_that_sends_them(
    checkpoint, texts, tmp_path, stream
):
    options = {"bits": 3, "calib": texts[:1], "method": "moequant", "group_size": 32, "progress": False}
    done = quantize_checkpoint(checkpoint, tmp_path / "out", stream=stream, **options)
    assert done.router_bits == 3
    small, model = load(tmp_path / "out"), load(checkpoint)
    ids = calibration(checkpoint, texts[0])
    for block, layer in zip(find_moe_blocks(model), small.model.layers, strict=True):
        x_TD = block_inputs(model, block, ids)  # of a model whose blocks before are rounded
        before = routed_tokens(block, x_TD).weights_TK
        plain, _ = quantize_block(block, x_TD, [3] * 8, affinity=True, group_size=32)
        rows = quantize_router(block, x_TD, 3, group_size=32).dequantize()
        block.router.rows.copy_(rows)
        assert torch.equal(layer.mlp.gate.weight, rows)
        assert not torch.equal(routed_tokens(block, x_TD).weights_TK, before)
        w_in, w_out = quantize_block(block, x_TD, [3] * 8, affinity=True, group_size=32)
        assert any(not torch.equal(a.levels(), b.levels()) for a, b in zip(plain, w_in, strict=True))
        bank = pack_block(model, block, w_in, w_out)
        for name, tensor in bank.packed.state_dict().items():
            assert torch.equal(layer.mlp.experts.packed.state_dict()[name], tensor), name


def calibration(folder, text):
    """The batches that a checkpoint is calibrated on."""
    from transformers import AutoTokenizer

    from coterie.shrink.calibrate import batches, held_out, read_text

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return batches(held_out(read_text(text, tokenizer, max_tokens=65536, seq_len=64))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_come_back_from_disk_bit_for_bit_in_the_bytes_they_had(texts, tmp_path, capsys, dtype):
    from coterie.data import byte_tokenizer

    tiny().to(dtype).save_pretrained(tmp_path / "model")
    byte_tokenizer(64).save_pretrained(tmp_path / "model")
    options = {"bits": 4, "calib": texts[:1], "method": "gptq", "group_size": 32, "progress": False}
    rounded = quantize_checkpoint(tmp_path / "model", tmp_path / "rounded", router_bits=4, **options)
    left = quantize_checkpoint(tmp_path / "model", tmp_path / "left", **options)
    assert (rounded.router_bits, left.router_bits) == (4, 16)
    assert rounded.memory == left.memory
    print_quantized(rounded)
    assert "bits of the routers, in bytes as before" in capsys.readouterr().out
    model, before = load(tmp_path / "model", dtype=dtype), load(tmp_path / "left", dtype=dtype)
    again = load(tmp_path / "rounded", dtype=dtype)
    block = find_moe_blocks(model)[0]
    rows = quantize_router(
        block, block_inputs(model, block, calibration(tmp_path / "model", texts[0])), 4, group_size=32
    )
    weight = again.model.layers[0].mlp.gate.weight
    assert weight.dtype == dtype
    assert torch.equal(weight, rows.dequantize().to(dtype))
    assert max(len(row.unique()) for row in weight) <= 16  # levels of 4 bits, one group of 32 columns
    assert torch.equal(before.model.layers[0].mlp.gate.weight, block.router.rows)


def test_the_numbers_of_a_dry_run_say_what_a_method_does_to_routers(checkpoint, texts):
    options = {"calib": texts[:1], "dry_run": True, "progress": False}
    for method, bits, asked, found in [
        ("moequant", 4, None, 4),
        ("moequant", 4, 8, 8),
        ("moequant", 4, 16, 16),
        ("gptq", 4, None, 16),
        ("mc-sharp", 2, None, 16),
        ("mc-sharp", 2, 8, 8),
    ]:
        done = quantize_checkpoint(checkpoint, None, method=method, bits=bits, router_bits=asked, **options)
        assert json.loads(json.dumps(done.to_dict()))["router_bits"] == found
