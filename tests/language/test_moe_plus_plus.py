import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.language.moe_plus_plus import (
    capacity_factors,
    expert_weights,
    make_ffn,
    moe_plus_plus,
    routing_loss,
)
from coterie.models import Decoder, DecoderConfig
from coterie.nn import MLPExperts, SwiGLUExperts

CONFIG = DecoderConfig(
    37, dim=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden=16, num_experts=8, expert_hidden=8
)


def route_to(layer, experts, tokens=1):
    """One-token inputs for which a linear gate of a layer chooses these experts."""
    score = layer.router.router.score
    gate = score.score if hasattr(score, "score") else score
    nn.init.zeros_(gate.weight)
    gate.weight.data[experts, 0] = 1.0
    x = torch.randn(tokens, gate.dim)
    x[:, 0] = 5.0
    return x


def test_a_token_sent_to_a_feed_forward_and_the_zero_expert_is_a_top_1_token():
    layer = moe_plus_plus(SwiGLUExperts(4, 8, 16), 8).eval()
    x = route_to(layer, [2, 7])
    y, routing = layer(x)
    assert routing.weights.sort().values.tolist() == [[0.0, 1.0]]
    gate, up = (layer.experts.banks[0].gate_up_proj[2] @ x[0]).chunk(2)
    torch.testing.assert_close(y[0], layer.experts.banks[0].down_proj[2] @ (nn.functional.silu(gate) * up))


def test_a_token_sent_to_the_copy_and_the_zero_expert_is_copied():
    layer = moe_plus_plus(SwiGLUExperts(4, 8, 16), 8).eval()
    x = route_to(layer, [6, 7])
    torch.testing.assert_close(layer(x)[0], x)


def test_without_masking_the_zero_experts_weight_scales_its_partner_down():
    layer = moe_plus_plus(SwiGLUExperts(4, 8, 16), 8, mask_zero=False).eval()
    x = route_to(layer, [6, 7])
    torch.testing.assert_close(layer(x)[0], x / 2)


@given(
    num_ffn=st.integers(1, 32),
    zero_cost=st.integers(1, 8),
    tau=st.floats(0.05, 1.0),
    gamma=st.floats(0.5, 2.0),
)
def test_capacities_sum_to_gamma_times_all_slots_and_differ_by_tau(num_ffn, zero_cost, tau, gamma):
    factors = capacity_factors(num_ffn, zero_cost, tau, gamma)
    assert factors.mean().item() == pytest.approx(gamma)
    assert (factors[0] / factors[-1]).item() == pytest.approx(tau)


def test_capacity_counts_slots_so_that_balanced_choices_are_kept():
    torch.manual_seed(0)
    layer = moe_plus_plus(SwiGLUExperts(8, 16, 8), 16, tau=1.0, capacity_factor=1.5)
    _, routing = layer(torch.randn(3000, 16))
    assert int(routing.load.sum()) > 0.8 * 6000
    assert int(layer.eval()(torch.randn(3000, 16))[1].load.sum()) == 6000


def test_capacity_limits_training_and_not_evaluation():
    layer, x = moe_plus_plus(SwiGLUExperts(4, 8, 16), 8, tau=0.5, capacity_factor=0.8), torch.randn(61, 8)
    _, routing = layer(x)
    limits = (capacity_factors(4, 4, 0.5, 0.8) * 122 / 8).ceil()
    assert bool((routing.load <= limits).all())
    _, free = layer.eval()(x)
    assert int(free.dropped.sum()) == 0
    assert (routing.load + routing.dropped).tolist() == free.load.tolist()


def test_training_with_a_smaller_tau_sends_fewer_slots_to_feed_forward_experts():
    used = {}
    for tau in (1.0, 0.2):
        torch.manual_seed(0)
        layer = moe_plus_plus(SwiGLUExperts(8, 16, 8), 16, tau=tau, capacity_factor=None)
        optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
        for _ in range(100):
            _, routing = layer(torch.randn(256, 16))
            optimizer.zero_grad()
            routing_loss([routing], 8, tau=tau, beta=1.0).backward()
            optimizer.step()
        used[tau] = routing.narrow(0, 8).slots_per_token.double().mean().item()
    assert used[1.0] == pytest.approx(2 * 8 / 12, abs=0.15)
    assert used[0.2] < used[1.0] - 0.3


def test_the_balance_loss_is_the_papers_sum_scaled_by_experts_over_k():
    layer = moe_plus_plus(SwiGLUExperts(4, 8, 16), 8, tau=0.5)
    _, routing = layer.eval()(torch.randn(50, 8))
    eta, f, score = expert_weights(4, 4, 0.5).tolist(), routing.load / 50, routing.scores.mean(0)
    paper = sum(eta[i] * f[i].item() * score[i].item() for i in range(8))
    ours = routing_loss([routing, routing], 4, tau=0.5, beta=0.1)
    assert ours.item() == pytest.approx(2 * 0.1 * 8 / 2 * paper)


def test_decoder_layers_hand_their_logits_on_and_their_gradient_back():
    model = Decoder(CONFIG, make_ffn(CONFIG, capacity_factor=None))
    for layer in model.layers[1:]:
        nn.init.normal_(layer.mlp.router.score.weight)
    _, routings = model(torch.randint(37, (2, 12)))
    routings[2].logits.square().sum().backward()
    for layer in model.layers[1:]:
        assert float(layer.mlp.router.score.weight.grad.abs().sum()) > 0
    assert float(model.layers[0].mlp.router.score.weight.grad.abs().sum()) > 0
    assert [routing.num_experts for routing in routings] == [12] * 3


@pytest.mark.parametrize("options", [{}, {"gate_hidden": 24}, {"gating_residual": False}, {"zero": 0}])
def test_the_decoder_learns_with_it(options):
    torch.manual_seed(0)
    model = Decoder(CONFIG, make_ffn(CONFIG, **options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.arange(24).remainder(7).expand(4, -1)
    losses = []
    for _ in range(30):
        logits, routings = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + routing_loss(routings, 8)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_padding_is_left_out_of_loss_and_load():
    layer, x = moe_plus_plus(SwiGLUExperts(4, 8, 16), 8).eval(), torch.randn(10, 8)
    mask = torch.arange(10) < 6
    padded, alone = layer(x, mask=mask)[1], layer(x[:6])[1]
    assert padded.load.tolist() == alone.load.tolist()
    torch.testing.assert_close(routing_loss([padded], 4), routing_loss([alone], 4))


def test_two_zero_experts_chosen_together_discard_the_token():
    layer = moe_plus_plus(MLPExperts(4, 8, 16), 8, zero=2).eval()
    y, routing = layer(route_to(layer, [7, 8]))
    assert y.tolist() == [[0.0] * 8]
    assert routing.load[7:].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: moe_plus_plus(SwiGLUExperts(4, 8, 16), 8, tau=0.0), "tau=0.0; should be > 0"),
        (lambda: moe_plus_plus(SwiGLUExperts(4, 8, 16), 8, zero=0, copy=0, constant=0), "must be positive"),
        (lambda: moe_plus_plus(SwiGLUExperts(4, 8, 16), 8, top_k=9), "top_k=9 but the router has 8 experts"),
        (lambda: expert_weights(4, 0, 0.5), "at least one of each"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
