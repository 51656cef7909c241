import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coterie.models import ViT, ViTConfig, count_parameters, load_weights, save_weights, tie_depth
from coterie.nn import LinearScore, MLPExperts, MoE, Router, TopK

SHARED = ["self_attn", "mlp"]


def model_of(layers=4, *, tied=True, hidden=8, bias=True):
    def moe(layer):
        # a selection bias, so that there is a buffer too
        router = Router(LinearScore(16, 4), TopK(2, bias=torch.rand(4) if bias else None))
        return MoE(router, MLPExperts(4, 16, hidden))

    model = ViT(ViTConfig((8, 8), 4, classes=5, dim=16, layers=layers, heads=2, hidden=16, channels=1), moe)
    nn.init.normal_(model.head.weight)
    if tied:
        tie_depth(model.layers, SHARED)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_comes_back_bit_for_bit_and_as_tied_as_it_was(tied, tmp_path):
    model, other, images = model_of(tied=tied), model_of(tied=tied), torch.rand(3, 1, 8, 8)
    assert not torch.equal(other(images)[0], model(images)[0])
    load_weights(other, save_weights(model, tmp_path / "model.safetensors"))
    assert torch.equal(other(images)[0], model(images)[0])
    assert (other.layers[0].mlp is other.layers[3].mlp) == tied
    assert count_parameters(other) == count_parameters(model)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tied_tensor_is_stored_once(tmp_path):
    sizes = []
    for depth in (2, 9):
        model = model_of(depth)
        saved = load_file(save_weights(model, tmp_path / f"{depth}.safetensors"))
        buffers = 4  # the selection bias
        assert sum(t.numel() for t in saved.values()) == count_parameters(model) + buffers
        sizes.append(len(saved))
    assert sizes[1] - sizes[0] == 7 * 4  # weight and bias of two norms per layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 6}, r"lacks norm1.weight, norm1.bias, norm2.weight, norm2.bias of layers 4, 5\. Build"),
        ({"layers": 2}, r"no place for its norm1.bias, .*, norm2.weight of layers 2, 3\. Build"),
        (
            {"tied": False},
            r"lacks self_attn.q_proj.weight, .*, mlp.experts.down_bias of layers 1, 2, 3\. .* tie",
        ),
        ({"hidden": 12}, r"of another shape are mlp.experts.up_proj, .* of layers 0\. Build"),
        ({"bias": False}, "no place for its mlp.router.select.bias of layers 0"),
    ],
)
def test_a_file_of_another_model_is_refused_with_what_is_missing_and_changes_nothing(
    change, message, tmp_path
):
    file = save_weights(model_of(), tmp_path / "model.safetensors")
    other, images = model_of(**change), torch.rand(3, 1, 8, 8)
    before = other(images)[0]
    with pytest.raises(ValueError, match=message):
        load_weights(other, file)
    assert torch.equal(other(images)[0], before)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.safetensors does not exist"):
        load_weights(model_of(), tmp_path / "none.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = save_weights(model_of(), tmp_path / "model.safetensors")
    before = file.read_bytes()

    def broken(tensors, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("coterie.models.weights.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_weights(model_of(), file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
