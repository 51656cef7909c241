import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.language.widenet import (
    make_ffn,
    routing_loss,
    widenet_decoder,
    widenet_moe,
    widenet_vit,
)
from coterie.models import (
    Decoder,
    DecoderConfig,
    ViTConfig,
    count_parameters,
    load_weights,
    save_weights,
)
from coterie.nn import MLPExperts, Monitor, balance
from coterie.reproduce.widenet import Shifted, read_data
from coterie.train import classification_loss, fit, language_model_loss

DIM = 24
SIZES = {"patch": 2, "classes": 10, "dim": DIM, "heads": 4, "hidden": 48, "channels": 1}
CONFIG = DecoderConfig(
    37, dim=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden=16, num_experts=4, expert_hidden=16,
    renormalize=False,
)  # fmt: skip


def digits_vit(layers=4, **options):
    return widenet_vit(ViTConfig((8, 8), layers=layers, **SIZES), **options)


def blobs(items, seed):
    """Ten noisy pictures, an image and its label per item."""
    pictures = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (items,), generator=generator)
    return pictures[labels] + 0.3 * torch.randn(items, 1, 8, 8, generator=generator), labels


@given(shallow=st.integers(1, 4), deeper=st.integers(1, 5))
def test_depth_costs_two_norms_and_nothing_else(shallow, deeper):
    few, many = digits_vit(shallow), digits_vit(shallow + deeper)
    assert count_parameters(many) - count_parameters(few) == deeper * 4 * DIM


def test_eight_layers_hold_four_times_four_d_more_than_four():
    assert count_parameters(digits_vit(8)) - count_parameters(digits_vit(4)) == 4 * 4 * DIM


def test_all_depths_have_one_moe_and_one_attention_but_their_own_norms():
    layers = digits_vit().layers
    assert len({id(layer.mlp) for layer in layers}) == len({id(layer.self_attn) for layer in layers}) == 1
    assert len({id(layer.norm1) for layer in layers}) == len({id(layer.norm2) for layer in layers}) == 4


@pytest.mark.parametrize(
    ("dim", "heads", "layers", "hidden", "millions"),
    [(768, 12, 12, 4096, 29), (1024, 16, 24, 4096, 40), (1280, 16, 32, 5120, 63)],
)
def test_the_papers_models_have_the_papers_parameters(dim, heads, layers, hidden, millions):
    with torch.device("meta"):
        model = widenet_vit(
            ViTConfig((224, 224), 16, classes=1000, dim=dim, layers=layers, heads=heads, hidden=hidden,
                      representation=True)
        )  # fmt: skip
    assert count_parameters(model) // 10**6 == millions


def test_after_training_a_token_goes_to_other_experts_at_another_depth():
    model, (images, labels) = digits_vit(), blobs(256, seed=1)
    history = fit(
        model, torch.utils.data.TensorDataset(images, labels), steps=60, batch_size=32, lr=5e-3,
        loss=classification_loss(routing_loss), progress=False,
    )  # fmt: skip
    assert history.cross_entropy[-1] < history.cross_entropy[0] / 2
    routings = model.eval()(blobs(32, seed=2)[0])[1]
    first, last = routings[0].used_TE, routings[-1].used_TE
    assert bool((first != last).any())


def test_the_balance_loss_of_a_depth_is_alpha_when_scores_are_uniform():
    model = digits_vit(5, capacity_factor=None).eval()
    nn.init.zeros_(model.layers[0].mlp.router.score.score.weight)
    routings = model(torch.rand(4, 1, 8, 8))[1]
    assert [round(routing_loss([routing], alpha=0.01).item(), 8) for routing in routings] == [0.01] * 5
    assert routing_loss(routings, alpha=0.01).item() == pytest.approx(5 * 0.01)


def test_the_loss_is_the_papers_formula_summed_over_depths():
    routings = digits_vit(3).eval()(torch.rand(4, 1, 8, 8))[1]
    expected = 0.0
    for routing in routings:
        one_hots = sum(nn.functional.one_hot(routing.experts[:, k], 4).double() for k in range(2))
        m, p = (one_hots / 2).mean(0), routing.logits.double().softmax(-1).mean(0)
        expected += 0.3 * 4 * (m * p).sum().item()
    assert routing_loss(routings, alpha=0.3).item() == pytest.approx(expected, rel=1e-5)


def test_the_one_router_gets_the_balance_gradient_of_every_depth():
    model = digits_vit(3, capacity_factor=None).eval()
    weight = model.layers[0].mlp.router.score.score.weight

    def gradient(loss):
        return torch.autograd.grad(loss, weight, retain_graph=True)[0]

    routings = model(torch.rand(4, 1, 8, 8))[1]
    parts = [gradient(0.01 * balance.load_balance(routing)) for routing in routings]
    torch.testing.assert_close(gradient(routing_loss(routings)), sum(parts))
    assert all(float(part.abs().max()) > 0 for part in parts)


def test_the_layer_is_the_sum_of_the_two_best_experts_times_their_softmax_scores():
    layer = widenet_moe(MLPExperts(4, 8, 16), 8).double().eval()
    x, bank = torch.randn(20, 8).double(), layer.experts
    y, routing = layer(x)
    for t in range(20):
        p = (x[t] @ layer.router.router.score.score.weight.t()).softmax(-1)
        expected = torch.zeros(8).double()
        for e in p.topk(2).indices.tolist():
            inner = nn.functional.gelu(bank.up_proj[e] @ x[t] + bank.up_bias[e])
            expected += p[e] * (bank.down_proj[e] @ inner + bank.down_bias[e])
        torch.testing.assert_close(y[t], expected)
    assert bool((routing.weights.sum(1) < 1).all())


def test_logits_are_noisy_by_1_over_e_in_training_and_exact_in_evaluation():
    layer, x = widenet_moe(MLPExperts(8, 16, 4), 16, capacity_factor=None), torch.randn(4000, 16)
    exact = layer.eval()(x)[1].logits
    assert torch.equal(exact, layer(x)[1].logits)
    noise = layer.train()(x)[1].logits - exact
    assert noise.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert abs(noise.mean().item()) < 0.005


def test_over_capacity_a_token_goes_on_by_its_residual_alone_in_training_only():
    layer = widenet_moe(MLPExperts(4, 8, 16), 8, top_k=1, capacity_factor=0.5)
    x = torch.randn(1, 8).expand(40, 8)  # all want the same expert, which has 5 places
    y, routing = layer(x)
    monitor = Monitor()
    monitor.update(routing)
    taken = routing.slots_per_token
    assert int(monitor.loads[0].max()) <= 5
    assert monitor.drop_rate.item() >= 0.5
    assert torch.equal(y[taken == 0], torch.zeros_like(y[taken == 0]))
    assert layer.eval()(x)[1].slots_per_token.unique().tolist() == [1]


def test_the_smallest_batch_has_a_place():
    layer = widenet_moe(MLPExperts(16, 8, 4), 8, top_k=1, capacity_factor=1.2)
    assert int(layer(torch.randn(1, 8))[1].load.sum()) == 1


def test_load_and_drops_are_counted_by_depth():
    monitor = Monitor()
    monitor.update(digits_vit(5, capacity_factor=0.5)(torch.rand(6, 1, 8, 8))[1])
    assert monitor.load.shape == (5, 4)
    assert bool((monitor.drop_rate > 0.4).all())


def test_it_trains_inside_the_reference_decoder():
    model, ids = widenet_decoder(CONFIG), (torch.arange(17) * 5 + torch.arange(24).unsqueeze(1)) % 37
    assert (
        count_parameters(model)
        == count_parameters(widenet_decoder(DecoderConfig(**{**vars(CONFIG), "layers": 5}))) - 2 * 2 * 16
    )
    history = fit(
        model, ids, steps=80, batch_size=8, lr=1e-2, progress=False, loss=language_model_loss(balance=0.03)
    )
    assert history.cross_entropy[-1] < history.cross_entropy[0] / 2
    assert all(layer.mlp is model.layers[0].mlp for layer in model.layers)
    loose = Decoder(CONFIG, make_ffn(CONFIG))
    assert loose.layers[0].mlp is not loose.layers[1].mlp


def test_a_checkpoint_of_another_depth_is_refused_by_the_norms_it_lacks(tmp_path):
    file = save_weights(digits_vit(4), tmp_path / "widenet.safetensors")
    with pytest.raises(ValueError, match=r"lacks norm1.weight, .* of layers 4, 5, 6, 7\."):
        load_weights(digits_vit(8), file)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: digits_vit(top_k=5), "top_k=5 but the router has 4 experts"),
        (lambda: digits_vit(capacity_factor=0.0), "capacity_factor=0.0; should be > 0"),
        (
            lambda: make_ffn(DecoderConfig(**{**vars(CONFIG), "renormalize": True})),
            "renormalize=True; WideNet",
        ),
        (lambda: widenet_vit(ViTConfig((9, 8), layers=2, **SIZES)), "9 × 8 pixels are not tiled"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_experiment_moves_an_image_by_up_to_a_pixel_over_background():
    image = torch.full((1, 8, 8), -1.0)
    image[0, 0, 3] = 1.0
    shifted = Shifted(image.unsqueeze(0), torch.tensor([7]))
    places = set()
    for _ in range(200):
        moved, label = shifted[0]
        assert (moved.shape, int(label)) == ((1, 8, 8), 7)
        places.update(map(tuple, (moved[0] == 1).nonzero().tolist()))
        assert int((moved == -1).sum()) >= 63
    assert places == {(row, column) for row in (0, 1) for column in (2, 3, 4)}


def test_the_experiment_reads_enough_digits_or_says_how_many_it_needs(tmp_path):
    row = ",".join(["3"] * 64 + ["7"])
    (tmp_path / "few.tes").write_text("\n".join([row] * 20))
    with pytest.raises(ValueError, match=r"few.tes has 20 digits; training and test need 1600"):
        read_data(tmp_path / "few.tes")
