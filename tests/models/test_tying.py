import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.models import Decoder, DecoderConfig, ViT, ViTConfig, count_parameters, tie_depth, tied_modules
from coterie.nn import LinearScore, MLPExperts, MoE, Router, TopK
from coterie.train import adamw, weight_decay_groups

SHARED = ["self_attn", "mlp"]
NORMS = {"decoder": ("input_layernorm", "post_attention_layernorm"), "vit": ("norm1", "norm2")}


def moe(layer, *, experts=4, k=2):
    return MoE(Router(LinearScore(16, experts), TopK(k)), MLPExperts(experts, 16, 8))


def decoder(layers=3, make_ffn=moe):
    sizes = {"vocab_size": 37, "dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 16}
    return Decoder(DecoderConfig(**sizes, layers=layers), make_ffn)


def vit(layers=3, make_ffn=moe):
    model = ViT(
        ViTConfig((8, 8), 4, classes=5, dim=16, layers=layers, heads=2, hidden=16, channels=1), make_ffn
    )
    nn.init.normal_(model.head.weight)  # which starts at zero, and would stop all gradients
    return model


MODELS = {"decoder": decoder, "vit": vit}
INPUTS = {"decoder": lambda: torch.randint(37, (2, 9)), "vit": lambda: torch.rand(3, 1, 8, 8)}


@pytest.mark.parametrize("kind", MODELS)
def test_named_modules_are_one_object_and_every_norm_stays_private(kind):
    model = MODELS[kind]()
    tie_depth(model.layers, SHARED)
    for name in SHARED:
        assert len({id(layer.get_submodule(name)) for layer in model.layers}) == 1
    for name in NORMS[kind]:
        assert len({id(layer.get_submodule(name).weight) for layer in model.layers}) == 3
    assert tied_modules(model.layers) == SHARED


@pytest.mark.parametrize("kind", MODELS)
def test_depth_costs_only_norms(kind):
    shallow, deep = MODELS[kind](3), MODELS[kind](7)
    for model in (shallow, deep):
        tie_depth(model.layers, SHARED)
    private = sum(count_parameters(shallow.layers[0].get_submodule(name)) for name in NORMS[kind])
    assert count_parameters(deep) - count_parameters(shallow) == 4 * private
    assert count_parameters(deep, unique=False) == count_parameters(MODELS[kind](7), unique=False)


@pytest.mark.parametrize("kind", MODELS)
def test_a_tied_model_computes_what_copies_do_and_its_gradient_is_the_sum_of_theirs(kind):
    tied, inputs = MODELS[kind]().double(), INPUTS[kind]()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    tie_depth(tied.layers, SHARED)
    apart = MODELS[kind]().double()
    apart.load_state_dict(copy.deepcopy(tied.state_dict()))
    for model in (tied, apart):
        logits, routings = model(inputs)
        (logits.square().mean() + sum(routing.scores.square().sum() for routing in routings)).backward()
    torch.testing.assert_close(tied(inputs)[0], apart(inputs)[0])
    for name in SHARED:
        parts = [dict(layer.get_submodule(name).named_parameters()) for layer in apart.layers]
        for key, parameter in tied.layers[0].get_submodule(name).named_parameters():
            assert float(parameter.grad.abs().sum()) > 0
            torch.testing.assert_close(parameter.grad, sum(part[key].grad for part in parts))


@pytest.mark.parametrize("kind", MODELS)
def test_an_optimizer_lists_and_decays_a_tied_tensor_once(kind):
    model = MODELS[kind]()
    tie_depth(model.layers, SHARED)
    listed = [p for group in weight_decay_groups(model, 0.1) for p in group["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert sum(p.numel() for p in listed) == count_parameters(model)
    weight = model.layers[1].mlp.experts.up_proj
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5))


@given(names=st.sets(st.sampled_from(["self_attn", "mlp.router", "mlp.experts", "norm1", "norm2"])))
def test_any_modules_can_be_shared_and_are_found_again(names):
    model = vit()
    tie_depth(model.layers, sorted(names))
    assert set(tied_modules(model.layers)) == names  # router and experts, but not the MoE around them
    saved = sum(2 * count_parameters(model.layers[0].get_submodule(name)) for name in names)
    assert count_parameters(model) == count_parameters(vit()) - saved


def test_of_nested_shared_modules_the_outermost_is_named_and_groups_of_layers_are_not():
    model = vit(4)
    tie_depth(model.layers, ["mlp", "mlp.router"])
    assert tied_modules(model.layers) == ["mlp"]
    groups = vit(4)
    tie_depth(groups.layers[:2], ["mlp"])
    tie_depth(groups.layers[2:], ["mlp"])
    assert tied_modules(groups.layers) == []
    assert tied_modules(vit(1).layers) == []


def test_a_stack_of_transformers_is_tied_but_for_what_knows_its_depth():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    layers, before = model.model.layers, count_parameters(model)
    with pytest.raises(ValueError, match=r"self_attn of layer 1 .* layer_idx = 1 there, layer_idx = 0 in"):
        tie_depth(layers, ["self_attn"])
    names = [*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp"]
    tie_depth(layers, names)
    assert before - count_parameters(model) == 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24)
    prompt = torch.tensor([[1, 2, 3]])
    cached, slow = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert cached.tolist() == slow.tolist()


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({}, ["attn"], r"layer 0 has no module 'attn'; it has norm1, self_attn, norm2, mlp, dropout"),
        ({}, [""], "layer 0 has no module ''"),
        (
            {"experts": 6},
            ["self_attn", "mlp"],
            r"mlp of layer 2 cannot be that of layer 0: .* = 6 there, .* = 4",
        ),
        ({"k": 1}, ["self_attn", "mlp"], r"router.select.k = 1 there, router.select.k = 2 in layer 0"),
    ],
)
def test_what_cannot_be_one_is_refused_and_nothing_is_tied(change, names, message):
    model = vit(3, lambda layer: moe(layer, **(change if layer == 2 else {})))
    with pytest.raises(ValueError, match=message):
        tie_depth(model.layers, names)
    assert tied_modules(model.layers) == []
    dense = vit(2, lambda layer: nn.Linear(16, 16) if layer else moe(layer))
    with pytest.raises(ValueError, match="mlp of layer 1 cannot be that of layer 0"):
        tie_depth(dense.layers, ["mlp"])
