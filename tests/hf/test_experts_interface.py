"""`experts_implementation="coterie"` in every transformers family that has the experts interface."""

from pathlib import Path

import pytest
import torch
from families import families, output, tiny_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import coterie.hf
from coterie.hf import experts as bridge

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["activation"])
        return grouped_mlp(*args, **kwargs)

    grouped_mlp = bridge.grouped_mlp
    monkeypatch.setattr(bridge, "grouped_mlp", counted)
    return calls


def output_with(model, implementation, ids):
    model.set_experts_implementation(implementation)
    return output(model, ids)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "experts"), families())
def test_logits_are_those_of_eager(family, experts, fused_calls):
    model = tiny_model(family, experts)
    banks = [m for m in model.modules() if type(m).__name__ == experts]
    assert banks, "the tiny model has no expert layer"
    with torch.no_grad():
        for bank in banks:  # larger than the default, so that a wrong expert shows in the logits
            for parameter in bank.parameters():
                parameter.normal_(std=0.2)
            for limit in {"limit", "swiglu_limit"} & vars(bank).keys():
                setattr(bank, limit, 0.3)  # so that values are clamped
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    eager, ours = output_with(model, "eager", ids), output_with(model, "coterie", ids)
    assert float((eager - ours).norm() / eager.norm()) < 1e-5
    fused = [bridge.fused_activation(bank) for bank in banks]
    if None in fused:
        assert f"`{family}`" in PAGE.read_text(), "a family that is not fused must be listed with the reason"
    else:
        assert fused_calls, "the kernels were never called"


def test_the_check_above_would_notice_a_wrong_expert(monkeypatch):
    model = tiny_model("qwen3_moe", "Qwen3MoeExperts")
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.2)
    eager = output_with(model, "eager", ids)
    swapped = bridge._dispatch
    monkeypatch.setattr(bridge, "_dispatch", lambda chosen, n: swapped((chosen + 1) % n, n))
    assert float((eager - output_with(model, "coterie", ids)).norm() / eager.norm()) > 1e-2


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        initializer_range=0.5,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_loads_with_it_and_generates_the_tokens_of_eager(checkpoint, fused_calls):
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    tokens = {}
    for implementation in ("eager", "coterie"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation=implementation)
        tokens[implementation] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    assert torch.equal(tokens["eager"], tokens["coterie"])
    assert len(tokens["eager"][0].unique()) > 5
    assert fused_calls


def test_gradients_are_those_of_eager(checkpoint):
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    gradients = {}
    for implementation in ("eager", "coterie"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation=implementation)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients[implementation] = {n: p.grad for n, p in model.named_parameters()}
    for name, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients["coterie"][name], gradient, rtol=1e-3, atol=1e-5)


def test_registering_twice_is_harmless():
    coterie.hf.register()
    coterie.hf.register()
    assert ALL_EXPERTS_FUNCTIONS["coterie"] is bridge.experts_forward
