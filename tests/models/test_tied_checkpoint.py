"""Tied decoders as Hugging Face checkpoints, and on the way through an interrupted training run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coterie.language.widenet import widenet_decoder
from coterie.models import (
    Decoder,
    DecoderConfig,
    count_parameters,
    load_pretrained,
    save_pretrained,
    tie_depth,
    tied_modules,
)
from coterie.train import fit

CONFIG = DecoderConfig(
    61, dim=32, layers=3, heads=4, kv_heads=2, head_dim=12, hidden=40, num_experts=6, top_k=2,
    expert_hidden=24, renormalize=False,
)  # fmt: skip


def plain():
    model = Decoder(CONFIG)
    tie_depth(model.layers, ["self_attn", "mlp"])
    return model


BUILDS = {
    "plain": plain,
    "widenet": lambda: widenet_decoder(CONFIG),
    "widenet without capacity": lambda: widenet_decoder(CONFIG, capacity_factor=None),
}


@pytest.fixture
def ids():
    return torch.randint(61, (2, 19))


@pytest.mark.parametrize("kind", BUILDS)
def test_a_tied_decoder_loads_in_transformers_with_copies_and_here_tied(kind, ids, tmp_path):
    model = BUILDS[kind]().eval()
    save_pretrained(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids)[0], atol=1e-5, rtol=0)
    first, last = theirs.model.layers[0].mlp, theirs.model.layers[2].mlp
    assert first is not last
    assert torch.equal(first.gate.weight, last.gate.weight)
    ours = load_pretrained(tmp_path / "model")
    torch.testing.assert_close(ours(ids)[0], model(ids)[0], atol=1e-5, rtol=0)
    assert tied_modules(ours.layers) == ["self_attn", "mlp"]
    assert count_parameters(ours) == count_parameters(model)


def test_copies_trained_apart_elsewhere_stay_apart_with_a_warning(ids, tmp_path):
    save_pretrained(plain(), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32").eval()
    torch.nn.init.normal_(theirs.model.layers[1].mlp.gate.weight)
    theirs.save_pretrained(tmp_path / "tuned")
    with pytest.warns(UserWarning, match="mlp were tied .* trained apart since"):
        ours = load_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=1e-5, rtol=0)
    assert tied_modules(ours.layers) == ["self_attn"]


def test_an_untied_checkpoint_says_nothing_of_tying(tmp_path):
    save_pretrained(Decoder(CONFIG), tmp_path / "model")
    assert "tied_across_depth" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert tied_modules(load_pretrained(tmp_path / "model").layers) == []


def test_a_resumed_run_of_a_tied_model_is_the_unbroken_one(tmp_path):
    data = torch.randint(61, (16, 13))
    common = {"batch_size": 4, "lr": 1e-2, "progress": False}
    torch.manual_seed(0)
    whole = widenet_decoder(CONFIG)
    fit(whole, data, steps=4, out=tmp_path / "whole", **common)
    torch.manual_seed(0)
    broken = widenet_decoder(CONFIG)
    fit(broken, data, steps=4, save_every=2, out=tmp_path / "broken", **common)
    (newest,) = (tmp_path / "broken" / "checkpoints").glob("step-*4")
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = widenet_decoder(CONFIG)
    fit(resumed, data, steps=4, out=tmp_path / "broken", resume=True, **common)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert tied_modules(resumed.layers) == ["self_attn", "mlp"]
    stored = load_file(next((tmp_path / "whole" / "checkpoints" / "step-000004").glob("*.safetensors")))
    assert not any(name.startswith("layers.2.mlp") for name in stored)


def test_a_run_of_another_depth_is_not_resumed(tmp_path):
    data = torch.randint(61, (16, 13))
    common = {"batch_size": 4, "steps": 2, "progress": False, "out": tmp_path}
    fit(widenet_decoder(CONFIG), data, **common)
    deeper = widenet_decoder(DecoderConfig(**{**vars(CONFIG), "layers": 5}))
    with pytest.raises(
        ValueError, match=r"saved with the shape of layers.3.input_layernorm.weight = nothing"
    ):
        fit(deeper, data, **common, resume=True)
