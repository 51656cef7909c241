"""The packed bank in place of the one it was made from."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.nn import LinearScore, MLPExperts, MoE, QuantizedExperts, Router, Routing, SwiGLUExperts, TopK
from coterie.shrink import HessianMean, awq, gptq, quantize_bank


def mixture(bank):
    return MoE(Router(LinearScore(32, bank.num_experts), TopK(2)), bank)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [SwiGLUExperts, MLPExperts])
def test_a_layer_with_8_bits_computes_almost_what_it_did(kind, bias):
    moe = mixture(kind(6, 32, 48, bias=bias))
    for b in moe.experts.parameters():
        if b.dim() == 2:
            torch.nn.init.normal_(b)
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        before, routing = moe(x)
        moe.experts = quantize_bank(moe.experts, bits=8, group_size=32)
        after, same = moe(x)
    assert torch.equal(routing.experts, same.experts)
    assert float((after - before).norm() / before.norm()) < 0.02


def test_each_expert_has_its_own_bits_and_more_of_them_err_less():
    bank = SwiGLUExperts(5, 64, 64)
    factors = (1.0, 0.9, 0.8, 0.7, 0.6)  # without, two bits waste a level on each group's largest weight
    small = quantize_bank(bank, bits=[1, 2, 3, 4, 8], group_size=32, factors=factors)
    x, errors = torch.randn(40, 64), []
    for e in range(5):
        routing = Routing.dense(torch.eye(5)[e].expand(40, 5))
        with torch.no_grad():
            errors.append(float((small(x, routing) - bank(x, routing)).norm()))
    assert small.bits == [1, 2, 3, 4, 8]
    assert errors == sorted(errors, reverse=True)


def test_bytes_are_those_of_codes_scales_and_zeros():
    small = quantize_bank(SwiGLUExperts(4, 128, 256), bits=[2, 2, 4, 4], group_size=64)
    weights = 3 * 128 * 256
    assert small.nbytes == 2 * weights * (2 + 4) // 8 + 4 * (weights // 64) * (2 + 1)


def test_a_bank_survives_safetensors_bit_for_bit(tmp_path):
    bank = SwiGLUExperts(3, 40, 50, bias=True)
    small = quantize_bank(bank, bits=[1, 3, 4], group_size=32)
    save_file(small.state_dict(), tmp_path / "bank.safetensors", {"layout": json.dumps(small.layout())})
    from safetensors import safe_open

    with safe_open(tmp_path / "bank.safetensors", "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    again = QuantizedExperts.from_layout(layout)
    again.load_state_dict(load_file(tmp_path / "bank.safetensors"))
    x, routing = torch.randn(4, 40), Routing.dense(torch.rand(4, 3))
    assert torch.equal(again(x, routing), small(x, routing))
    for name, t in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], t)


def test_casting_the_model_keeps_what_the_codes_mean():
    moe = mixture(quantize_bank(MLPExperts(4, 32, 48, bias=False), bits=3, group_size=32))
    before = moe.experts.packed().w_in[0].dequantize()
    moe.double()
    assert moe.experts.scales.dtype == torch.bfloat16
    assert torch.equal(moe.experts.packed().w_in[0].dequantize(), before)
    assert moe(torch.randn(3, 32, dtype=torch.float64))[0].dtype == torch.float64


def test_other_weights_loaded_into_a_bank_that_has_run_are_used():
    bank, other = (quantize_bank(SwiGLUExperts(2, 32, 32), bits=4) for _ in range(2))
    x, routing = torch.randn(3, 32), Routing.dense(torch.rand(3, 2))
    bank(x, routing)
    for assign in (False, True):
        bank.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(bank(x, routing), other(x, routing))


def test_calibrated_experts_err_less_than_rounded_ones_at_the_layers_output():
    """As a system uses the parts: Hessians per expert, gate and up first, then down on what they give."""
    bank, calibration = SwiGLUExperts(2, 64, 64), torch.randn(800, 64) @ torch.randn(64, 64) / 8
    act = torch.nn.functional.silu
    for method in ("gptq", "awq"):
        w_in, w_out = [], []
        for e in range(2):
            h_in, h_down = HessianMean(64), HessianMean(64)
            h_in.add(calibration)
            matrices = bank.gate_up_proj[e].detach().view(2, 64, 64)
            down = bank.down_proj[e].detach()
            if method == "gptq":
                w_in.append(gptq(matrices, h_in.mean(), 3, group_size=32))
            else:
                w_in.append(awq(matrices, calibration.abs().mean(0), h_in.mean(), 3, group_size=32))
            gate, up = w_in[-1].dequantize()
            hidden = act(calibration @ gate.T) * (calibration @ up.T)
            h_down.add(hidden)
            if method == "gptq":
                w_out.append(gptq(down, h_down.mean(), 3, group_size=32))
            else:
                w_out.append(awq(down, hidden.abs().mean(0), h_down.mean(), 3, group_size=32))
        routing = Routing.dense(torch.rand(800, 2))
        with torch.no_grad():
            exact = bank(calibration, routing)
            careful = QuantizedExperts(w_in, w_out)(calibration, routing)
            simple = quantize_bank(bank, bits=3, group_size=32)(calibration, routing)
        assert (careful - exact).norm() < (0.8 if method == "gptq" else 1.0) * (simple - exact).norm()


def test_a_compiled_layer_and_one_under_autocast_compute_the_same():
    moe = mixture(quantize_bank(SwiGLUExperts(4, 32, 48, bias=True), bits=4))
    x = torch.randn(5, 32)
    with torch.no_grad():
        expected = moe(x)[0]
        assert torch.equal(torch.compile(moe, backend="eager")(x)[0], expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = moe(x)[0]
    assert cast.dtype == torch.bfloat16
    assert float((cast.float() - expected).norm() / expected.norm()) < 0.02


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="3 bit widths for 4 experts"):
        quantize_bank(SwiGLUExperts(4, 32, 32), bits=[2, 3, 4])
    small = quantize_bank(SwiGLUExperts(4, 32, 32), bits=2)
    with pytest.raises(ValueError, match="over 3 experts but the bank holds 4"):
        small(torch.randn(2, 32), Routing.dense(torch.rand(2, 3)))
