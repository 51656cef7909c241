import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import SequenceGate, TargetPooling, drop_elements, router_contrast

B, M, D, K = 3, 5, 4, 2


def example(**options):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    gate = SequenceGate(D, K, **options).double()
    return gate, torch.randn(B, M, D, dtype=torch.float64), mask, torch.randn(B, D, dtype=torch.float64)


def pair(mlp, h, z):
    """The MLP of [h; z; h - z; h · z] in one matrix, for one pair."""
    zero = torch.zeros_like(mlp.element.weight)
    weight = torch.cat([mlp.element.weight, mlp.reference.weight, zero, mlp.product.weight], 1)
    hidden = weight @ torch.cat([h, z, h - z, h * z]) + mlp.element.bias
    return mlp.last.weight @ hidden.relu() + mlp.last.bias


@pytest.mark.parametrize("length_norm", [True, False])
def test_the_gate_is_a_sum_of_votes_times_relevance(length_norm):
    gate, items, mask, reference = example(length_norm=length_norm)
    weights = gate(items, mask, reference)
    for b in range(2):
        total = torch.zeros(K, dtype=torch.float64)
        for j in range(M):
            if mask[b, j]:
                relevance = pair(gate.relevance, items[b, j], reference[b]).sigmoid()
                total += relevance * pair(gate.vote, items[b, j], reference[b])
        scale = math.sqrt(mask[b].sum()) if length_norm else 1
        torch.testing.assert_close(weights[b], total / scale)
    torch.testing.assert_close(weights[2], gate.default)


def test_padding_counts_exactly_nothing_and_order_does_not_matter():
    gate, items, mask, reference = example()
    pooling, weights = TargetPooling(D).double(), gate(items, mask, reference)
    changed = torch.where(mask[..., None], items, 1e3)
    assert torch.equal(gate(changed, mask, reference), weights)
    assert torch.equal(pooling(changed, mask, reference), pooling(items, mask, reference))
    order = torch.randperm(M)
    torch.testing.assert_close(gate(items[:, order], mask[:, order], reference), weights)
    assert bool((pooling(items, mask, reference)[2] == 0).all())


def test_repeating_a_history_doubles_the_vote_there_is_no_softmax():
    gate, items, mask, reference = example(length_norm=False)
    twice = gate(torch.cat([items, items], 1), torch.cat([mask, mask], 1), reference)
    torch.testing.assert_close(twice[:2], 2 * gate(items, mask, reference)[:2])
    gate.vote.last.bias.data.fill_(-5)
    assert bool((gate(items, mask, reference)[:2] < 0).all())  # weights may be negative


def test_an_empty_history_teaches_the_default_and_a_full_one_does_not():
    gate, items, mask, reference = example()
    gate(items, mask, reference)[:2].sum().backward()
    assert gate.default.grad.tolist() == [0, 0]
    gate(items, mask, reference)[2].sum().backward()
    assert gate.default.grad.tolist() == [1, 1]


def test_shapes_that_do_not_fit_are_refused():
    gate, items, mask, reference = example()
    for wrong in ((items, mask[:, 1:], reference), (items, mask, reference[1:])):
        with pytest.raises(ValueError, match=r"should be \[B, M, D\]"):
            gate(*wrong)
        with pytest.raises(ValueError, match=r"should be \[B, M, D\]"):
            TargetPooling(D).double()(*wrong)


@given(st.integers(0, 5), st.floats(0, 0.99))
def test_something_is_left_of_every_sequence_that_had_something(seed, p):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(50, 6, generator=generator) < 0.3
    some = drop_elements(mask, p, generator)
    assert bool((some <= mask).all())
    assert torch.equal(some.any(1), mask.any(1))


def test_about_a_share_p_is_dropped():
    some = drop_elements(torch.ones(200, 50, dtype=torch.bool), 0.3, torch.Generator().manual_seed(0))
    assert abs(some.float().mean() - 0.7) < 0.02
    with pytest.raises(ValueError, match="0 ≤ p < 1"):
        drop_elements(some, 1.0)


def test_the_contrast_is_that_of_a_loop_without_the_pairs_of_one_user():
    weights, view = torch.randn(2, 6, 3, dtype=torch.float64)
    users = torch.tensor([7, 7, 8, 9, 9, 9])
    total = 0.0
    for i in range(6):
        similar = [torch.cosine_similarity(weights[i], view[j], 0) / 0.5 for j in range(6)]
        others = [similar[j].exp() for j in range(6) if users[j] != users[i]]
        total -= (similar[i].exp() / (similar[i].exp() + sum(others))).log()
    torch.testing.assert_close(router_contrast(weights, view, users, temperature=0.5), total / 6)
    assert router_contrast(weights, view, temperature=0.5) > router_contrast(
        weights, view, users, temperature=0.5
    )


def test_gates_of_one_user_are_not_pushed_apart():
    weights = torch.randn(4, 3, requires_grad=True)
    router_contrast(weights, weights.detach().clone(), torch.zeros(4)).backward()
    assert bool((weights.grad == 0).all())
    for wrong in ({"temperature": 0.0}, {"groups_B": torch.zeros(3)}):
        with pytest.raises(ValueError, match="should be"):
            router_contrast(weights, weights, **wrong)
