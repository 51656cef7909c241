from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routings import routings
from torch import nn

from coterie.nn import (
    Dense,
    LinearScore,
    LogitNoise,
    MLPExperts,
    MoE,
    Router,
    Routing,
    StabilityTracker,
    TopK,
    balance,
    expert_overlap,
    fluctuation,
)


class Noisy(nn.Module):
    """Dropout, then an MoE with router noise; a frozen part stays in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.moe = MoE(Router(LogitNoise(LinearScore(8, 4), 10.0), TopK(2)), MLPExperts(4, 8, 4))

    def forward(self, x):
        y, routing = self.moe(self.frozen(self.dropout(x)))
        return y, [routing, routing]


def test_noise_of_training_is_no_fluctuation_and_the_model_keeps_its_modes():
    model, x = Noisy(), torch.randn(50, 8)
    assert fluctuation(model(x)[1], model(x)[1]) > 0.2
    tracker = StabilityTracker(lambda model: model(x)[1])
    for step in (1, 2, 3):
        tracker.update(model, step)
    assert tracker.fluctuations == [(2, 0.0), (3, 0.0)]
    assert tracker.flip_rate(model, lambda model: model(x)[1]) == 0
    assert model.training
    assert model.moe.router.score.training
    assert not model.frozen.training


def test_the_modes_come_back_when_routing_fails():
    model = Noisy()
    with pytest.raises(ValueError, match="tokens have shape"):
        StabilityTracker(lambda model: model(torch.zeros(2, 3))[1]).update(model, 1)
    assert model.training


def test_a_tracker_counts_the_tokens_that_moved_since_the_update_before():
    router, x = Router(LinearScore(4, 4), TopK(1)), torch.eye(4)
    tracker = StabilityTracker(lambda model: model(x))
    orders = [[0, 1, 2, 3], [1, 0, 2, 3], [1, 0, 2, 3], [3, 2, 0, 1]]
    for step, order in enumerate(orders):
        router.score.weight.data = 5 * torch.eye(4)[order].t()
        tracker.update(router, step)
    assert tracker.fluctuations == [(1, 0.5), (2, 0.0), (3, 1.0)]
    assert tracker.fluctuation() == 0.5
    assert tracker.fluctuation(last=1) == 1
    entropy = balance.entropy(router(x)).item()
    assert [step for step, _ in tracker.entropies] == [0, 1, 2, 3]
    assert tracker.entropies[-1][1] == pytest.approx(entropy)
    assert tracker.flip_rate(router, lambda model: model(x[[0, 1, 3, 2]])) == 0.5


def test_fluctuation_over_layers_is_their_mean_and_padding_does_not_count():
    first, second = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    mask = torch.tensor([True, True, True, False])
    a, b, padded = (Dense()(first), Dense()(second), Dense()(first, mask=mask))
    assert fluctuation([a, a], [a, b]) == 0.25
    assert fluctuation(padded, b) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fluctuation([], []), "routings of 0 and of 0 layers"),
        (lambda: fluctuation([Routing.dense(torch.eye(2))], []), "routings of 1 and of 0 layers"),
        (lambda: StabilityTracker(lambda model: []).fluctuation(), "0 fluctuations so far"),
        (lambda: StabilityTracker(lambda model: []).fluctuation(last=3), "asked for 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(routings(masked=True), st.integers(0, 2**31))
def test_expert_overlap_is_what_a_plain_loop_computes_and_ignores_the_order_of_slots(routing, seed):
    generator = torch.Generator().manual_seed(seed)
    e, slots = routing.num_experts, routing.experts.shape[1]
    other = torch.rand(len(routing.experts), e, generator=generator).argsort(1)[:, :slots]
    after = replace(routing, experts=other)
    shares = [
        len(set(old) & set(new)) / len(old)
        for old, new in (
            (set(a) - {-1}, b) for a, b in zip(routing.experts.tolist(), other.tolist(), strict=True)
        )
        if old
    ]
    if shares:
        assert expert_overlap(routing, after) == pytest.approx(sum(shares) / len(shares))
        assert expert_overlap(routing, replace(routing, experts=routing.experts.flip(1))) == pytest.approx(1)


def test_expert_overlap_refuses_routings_of_other_tokens():
    with pytest.raises(ValueError, match="both must be of the same tokens and experts"):
        expert_overlap(Routing.dense(torch.eye(2)), Routing.dense(torch.eye(3)))
