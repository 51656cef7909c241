import pytest
import torch
from torch import nn

from coterie.models import Encoder, ViT, ViTConfig
from coterie.nn import MLP, LinearScore, MLPExperts, MoE, PreviousLogits, Router, TopK

SIZES = {"image_size": (8, 12), "patch": 4, "classes": 5, "dim": 16, "layers": 2, "heads": 4, "hidden": 24}


def vit(make_ffn=None, **change):
    model = ViT(ViTConfig(**(SIZES | change)), make_ffn).eval()
    nn.init.normal_(model.head.weight)
    return model


def moe(layer):
    score = LinearScore(16, 4)
    return MoE(Router(PreviousLogits(score) if layer else score, TopK(2)), MLPExperts(4, 16, 24))


def test_a_layer_computes_what_torchs_pre_norm_encoder_layer_does():
    ours = Encoder(16, 1, 4, lambda layer: MLP(16, 24)).double().eval()
    theirs = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    layer = ours.layers[0]
    with torch.no_grad():
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(projection.bias)
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        theirs.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    theirs.self_attn.out_proj.load_state_dict(attention.o_proj.state_dict())
    theirs.linear1.load_state_dict(layer.mlp.up_proj.state_dict())
    theirs.linear2.load_state_dict(layer.mlp.down_proj.state_dict())
    theirs.norm1.load_state_dict(layer.norm1.state_dict())
    theirs.norm2.load_state_dict(layer.norm2.state_dict())
    x, mask = torch.randn(3, 7, 16).double(), torch.arange(7) < torch.tensor([[7], [4], [1]])
    expected = nn.functional.layer_norm(theirs(x, src_key_padding_mask=~mask), (16,), eps=1e-6)
    torch.testing.assert_close(ours(x, mask=mask)[0][mask], expected[mask])


def test_the_encoder_follows_a_permutation_of_its_tokens():
    encoder, x, order = Encoder(16, 2, 4, moe).eval(), torch.randn(2, 7, 16), torch.randperm(7)
    torch.testing.assert_close(encoder(x[:, order])[0], encoder(x)[0][:, order])


def test_padding_changes_nothing_for_real_tokens_and_uses_no_expert():
    encoder, x, mask = (
        Encoder(16, 2, 4, moe).eval(),
        torch.randn(2, 7, 16),
        torch.ones(2, 7, dtype=torch.bool),
    )
    mask[1, 5:] = False
    y, routings = encoder(x, mask=mask)
    torch.testing.assert_close(y[1, :5], encoder(x[1:, :5])[0][0])
    assert [int(routing.load.sum()) for routing in routings] == [24, 24]
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_images_do_not_influence_each_other_and_every_pixel_counts(pool):
    model, images = vit(moe, pool=pool), torch.rand(3, 3, 8, 12).requires_grad_()
    logits, routings = model(images)
    tokens = 3 * (6 + (pool == "class"))
    assert logits.shape == (3, 5)
    assert [routing.experts.shape for routing in routings] == [(tokens, 2)] * 2
    torch.testing.assert_close(model(images[1:2])[0], logits[1:2])
    logits[1].square().sum().backward()
    touched = (images.grad != 0).flatten(1).any(1)
    assert touched.tolist() == [False, True, False]
    assert bool((images.grad[1] != 0).all())


def test_patches_go_row_by_row():
    model = vit(layers=0)
    plain, changed = torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 8, 12)
    changed[0, :, 5, 9] = 1  # second row of patches, third column
    difference = (model.encode(changed)[0] - model.encode(plain)[0]).abs().sum(-1)
    assert (difference[0] > 0).tolist() == [False] * 5 + [True]


def test_the_position_of_a_patch_matters():
    model, image = vit(), torch.zeros(1, 3, 8, 12)
    nn.init.normal_(model.positions.weight)
    image[0, :, :4, :4] = torch.rand(3, 4, 4)
    moved = image.roll((4, 4), (2, 3))
    assert not torch.allclose(model(moved)[0], model(image)[0], atol=1e-4)


def test_dropout_acts_in_training_only():
    model, images = vit(dropout=0.5), torch.rand(2, 3, 8, 12)
    assert torch.equal(model(images)[0], model(images)[0])
    model.train()
    assert not torch.equal(model(images)[0], model(images)[0])


def test_the_representation_is_a_tanh_layer_before_the_classifier():
    model, images = vit(representation=True), torch.rand(2, 3, 8, 12)
    linear = model.representation[0]
    pooled = model.encode(images)[0].mean(1)
    torch.testing.assert_close(model(images)[0], model.head(linear(pooled).tanh()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, "images of 8 × 12 pixels are not tiled by patches of 5"),
        ({"pool": "max"}, 'pool=\'max\'; use "mean" or "class"'),
        ({"heads": 3}, "dim=16 is not a multiple of heads=3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vit(**change)


@pytest.mark.parametrize("shape", [(2, 3, 12, 8), (2, 1, 8, 12), (3, 8, 12)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images have shape .*; should be \[B, 3, 8, 12\]"):
        vit()(torch.rand(shape))
