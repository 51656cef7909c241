import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routings import routings

from coterie.nn import Routing


@given(routings())
def test_load_and_importance_count_what_a_plain_loop_counts(routing):
    load, importance = [0] * routing.num_experts, [0.0] * routing.num_experts
    for experts, weights in zip(routing.experts.tolist(), routing.weights.tolist(), strict=True):
        for e, w in zip(experts, weights, strict=True):
            if e >= 0:
                load[e] += 1
                importance[e] += w
    assert routing.validate().load.tolist() == load
    torch.testing.assert_close(routing.importance, torch.tensor(importance, dtype=torch.float64))
    assert int(routing.load.sum()) == int(routing.slots_per_token.sum())


@given(routings())
def test_dispatch_groups_every_used_slot_by_expert_and_keeps_token_order(routing):
    dispatch, flat = routing.dispatch, routing.experts.reshape(-1).tolist()
    assert sorted(dispatch.order_N.tolist()) == list(range(len(flat)))
    start = 0
    for e, end in enumerate(dispatch.ends_E.tolist()):
        slots = dispatch.order_N[start:end].tolist()
        assert slots == sorted(slots)
        assert {flat[s] for s in slots} <= {e}
        start = end
    assert all(flat[s] == -1 for s in dispatch.order_N[start:].tolist())
    assert dispatch.inverse_N[dispatch.order_N].tolist() == list(range(len(flat)))


@given(routings(masked=True), st.floats(0, 2), st.sampled_from(["position", "weight"]))
def test_no_expert_exceeds_its_capacity_and_none_drops_a_token_while_it_has_room(routing, factor, by):
    kept = routing.drop_over_capacity(factor, by=by).validate()
    capacity = math.ceil(factor * int(routing.load.sum()) / routing.num_experts)
    assert kept.load.tolist() == [min(n, capacity) for n in routing.load.tolist()]
    assert kept.dropped.tolist() == [max(0, n - capacity) for n in routing.load.tolist()]
    assert bool((kept.experts.eq(routing.experts) | kept.experts.eq(-1)).all())


def test_capacity_keeps_first_choices_by_position_and_largest_by_weight():
    logits = torch.zeros(3, 2)
    routing = Routing(
        torch.tensor([[0, 1], [1, 0], [0, 1]]),
        torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]]),
        logits.softmax(-1),
        logits,
        2,
    )
    by_position = routing.drop_over_capacity(torch.tensor([0.66, 0.33]))  # capacities 2 and 1
    assert by_position.experts.tolist() == [[0, -1], [1, -1], [0, -1]]
    by_weight = routing.drop_over_capacity(1 / 3, by="weight")
    assert by_weight.experts.tolist() == [[-1, -1], [1, -1], [0, -1]]


def test_capacity_refuses_what_does_not_fit():
    routing = Routing.dense(torch.rand(3, 4))
    with pytest.raises(ValueError, match="one for each of 4 experts"):
        routing.drop_over_capacity(torch.ones(3))
    with pytest.raises(ValueError, match='by=\'age\'; use "position" or "weight"'):
        routing.drop_over_capacity(1.0, by="age")


@given(routings())
def test_parts_of_a_routing_add_up_to_it(routing):
    cut = routing.num_experts // 2
    parts = [routing.narrow(0, cut), routing.narrow(cut, routing.num_experts - cut)]
    assert torch.cat([p.load for p in parts]).tolist() == routing.load.tolist()
    torch.testing.assert_close(torch.cat([p.weights_TE for p in parts], 1), routing.weights_TE)


def test_dense_uses_every_expert_with_its_score_except_for_padding():
    scores = torch.rand(4, 3)
    mask = torch.tensor([True, False, True, True])
    routing = Routing.dense(scores, mask=mask).validate()
    assert routing.load.tolist() == [3, 3, 3]
    torch.testing.assert_close(routing.weights_TE, scores * mask.unsqueeze(1))


def test_detach_and_to_keep_every_field():
    logits = torch.randn(4, 3, requires_grad=True)
    routing = Routing.dense(logits.softmax(-1), logits, torch.tensor([True] * 4))
    assert routing.weights.requires_grad
    copy = routing.detach().to("cpu")
    assert not copy.weights.requires_grad
    assert not copy.logits.requires_grad
    assert copy.experts.tolist() == routing.experts.tolist()
    assert copy.mask.tolist() == routing.mask.tolist()


def test_repeat_gives_each_decision_to_several_tokens():
    routing = Routing.dense(torch.tensor([[0.9, 0.1], [0.2, 0.8]])).drop_over_capacity(0.5).repeat(3)
    assert routing.experts.shape == (6, 2)
    assert routing.dropped.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.rand(2, 2)}, r"weights has shape \(2, 2\)"),
        ({"experts": torch.zeros(3, 2)}, "experts are torch.float32"),
        ({"experts": torch.tensor([[0, 5]] * 3)}, "experts run from 0 to 5"),
        ({"experts": torch.tensor([[0, -1]] * 3)}, "an unused slot has a weight"),
        ({"weights": torch.full((3, 2), torch.nan)}, "NaN"),
        ({"experts": torch.tensor([[1, 1]] * 3)}, "one expert in two slots"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, "a padding token uses a slot"),
    ],
)
def test_validate_names_the_broken_invariant(change, message):
    routing = Routing.dense(torch.rand(3, 2))
    with pytest.raises(ValueError, match=message):
        replace(routing, **change).validate()
