import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import Dense, LinearExperts, Routing, TopK, balance


@given(st.integers(1, 5), st.integers(0, 7), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_token_gets_the_weighted_sum_of_its_experts_maps(num_experts, tokens, dense, bias, seed):
    torch.manual_seed(seed)
    bank = LinearExperts(num_experts, 3, 2, bias=bias).double()
    if bias:
        torch.nn.init.normal_(bank.bias)
    x = torch.randn(tokens, 3, dtype=torch.float64)
    select = Dense() if dense else TopK(min(2, num_experts))
    routing = select(torch.randn(tokens, num_experts, dtype=torch.float64))
    expected = torch.zeros(tokens, 2, dtype=torch.float64)
    for t in range(tokens):
        for expert, weight in zip(routing.experts[t].tolist(), routing.weights[t], strict=True):
            y = bank.weight[expert] @ x[t] + (bank.bias[expert] if bias else 0)
            expected[t] += weight * y
    torch.testing.assert_close(bank(x, routing), expected)


def test_the_identity_needs_equal_widths_and_the_routing_as_many_experts():
    with pytest.raises(ValueError, match="identity=True maps 3 to 2; give dim_out=3"):
        LinearExperts(4, 3, 2, identity=True)
    with pytest.raises(ValueError, match="routing is over 5 experts but the bank holds 4"):
        LinearExperts(4, 3)(torch.randn(2, 3), Dense()(torch.zeros(2, 5)))


def test_importance_entropy_is_largest_for_even_use_and_zero_for_one_expert():
    even = Routing.dense(torch.eye(4))
    one = Routing.dense(torch.tensor([[0.0, 1.0, 0.0]] * 3))
    assert balance.importance_entropy(even).item() == pytest.approx(math.log(4))
    assert balance.importance_entropy(one).item() == 0
    assert balance.importance_entropy([even, one]).item() == pytest.approx(math.log(4) / 2)


def test_its_gradient_moves_use_from_the_busy_expert_to_the_idle_one():
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    balance.importance_entropy(Dense()(logits)).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 2]
