import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.nn import (
    CosineScore,
    Dense,
    LinearExperts,
    LinearScore,
    MLPExperts,
    MoE,
    Router,
    Routing,
    SwiGLUExperts,
    append_experts,
    bias_for_share,
    hold_experts,
    keep_experts,
)

GROWABLE = {
    "LinearScore": lambda: LinearScore(3, 4, bias=True),
    "CosineScore": lambda: CosineScore(3, 4),
    "LinearExperts": lambda: LinearExperts(4, 3, 2, bias=True),
    "MLPExperts": lambda: MLPExperts(4, 3, 5),
    "SwiGLUExperts": lambda: SwiGLUExperts(4, 3, 5),
}


def rows_of(module, count):
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() and len(p) == 4}
    return {name: torch.randn(count, *p.shape[1:]) for name, p in own.items()}


@pytest.mark.parametrize("kind", GROWABLE)
def test_appending_and_removing_again_gives_back_every_bank_and_scorer(kind):
    module = GROWABLE[kind]()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    append_experts(module, rows_of(module, 2))
    assert module.num_experts == 6
    keep_experts(module, range(4))
    assert module.num_experts == 4
    for name, parameter in module.named_parameters():
        assert parameter.tolist() == before[name].tolist()


def test_a_layer_goes_on_with_the_experts_that_its_router_and_bank_grew():
    moe = MoE(Router(LinearScore(3, 2, bias=True), Dense()), LinearExperts(2, 3, 4, bias=True))
    x = torch.randn(5, 3)
    before, _ = moe(x)
    never = torch.tensor([-torch.inf])
    append_experts(moe.router.score, {"weight": torch.zeros(1, 3), "bias": never})
    append_experts(moe.experts, {"weight": torch.randn(1, 4, 3), "bias": torch.randn(1, 4)})
    after, routing = moe(x)
    assert moe.router.num_experts == routing.validate().num_experts == 3
    torch.testing.assert_close(after, before)  # an expert that is never chosen changes nothing


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_linear_experts_are_the_weighted_sum_of_their_maps(experts, dim_out, seed):
    generator = torch.Generator().manual_seed(seed)
    bank = LinearExperts(experts, 3, dim_out, bias=True).double()
    x, weights = (torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (3, experts))
    expected = torch.zeros(7, dim_out, dtype=torch.float64)
    for e in range(experts):
        expected += weights[:, e : e + 1] * nn.functional.linear(x, bank.weight[e], bank.bias[e])
    torch.testing.assert_close(bank(x, Routing.dense(weights)), expected)


def adam_steps(module, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (module.each(x).squeeze(2) - y).square().sum().backward()
        optimizer.step()


def test_training_goes_on_as_if_the_other_experts_were_not_there():
    """Adam's moments follow the rows: two experts that were once four learn what two alone would have."""
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    alone = LinearExperts(2, 3, 1, bias=True)
    grown = LinearExperts(2, 3, 1, bias=True)
    grown.load_state_dict(alone.state_dict())
    one, other = (torch.optim.Adam(m.parameters(), lr=0.05) for m in (alone, grown))
    adam_steps(alone, one, x, y, 20)
    adam_steps(grown, other, x, y, 10)
    append_experts(grown, {"weight": torch.randn(1, 1, 3), "bias": torch.randn(1, 1)}, other)
    adam_steps(grown, other, x, y, 5)
    keep_experts(grown, [1, 0], other)
    adam_steps(grown, other, x, y, 5)
    torch.testing.assert_close(grown.weight.flip(0), alone.weight)
    assert set(other.state) == set(grown.parameters())


def test_held_experts_stay_bit_for_bit_under_momentum_and_decay():
    bank, x, y = LinearExperts(3, 3, 1, bias=True), torch.randn(20, 3), torch.randn(20, 1)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.05, weight_decay=0.1)
    adam_steps(bank, optimizer, x, y, 5)
    before = bank.weight.tolist()
    with hold_experts(bank, [0, 2], optimizer):
        adam_steps(bank, optimizer, x, y, 5)
    assert [row == old for row, old in zip(bank.weight.tolist(), before, strict=True)] == [True, False, True]
    adam_steps(bank, optimizer, x, y, 1)
    assert bank.weight[0].tolist() != before[0]


@given(st.floats(0.01, 0.99), st.integers(0, 2**16))
def test_a_new_expert_gets_the_share_it_is_given(share, seed):
    generator = torch.Generator().manual_seed(seed)
    others, own = 3 * torch.randn(50, 4, generator=generator), torch.randn(50, generator=generator)
    bias = bias_for_share(others, own, share)
    gate = torch.cat([others, own.unsqueeze(1) + bias], 1).double().softmax(1)
    assert float(gate[:, -1].mean()) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: append_experts(s, {"weight": torch.zeros(1, 3)}), r"should be for \['bias', 'weight'\]"),
        (lambda s: append_experts(s, {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}), r"\[n, 3\]"),
        (lambda s: append_experts(s, {"weight": torch.zeros(1, 3), "bias": torch.zeros(2)}), "as many for"),
        (lambda s: keep_experts(s, []), "at least one"),
        (lambda s: keep_experts(s, [1, 1]), "distinct ones of 0 … 3"),
        (lambda s: keep_experts(s, [4]), "distinct ones of 0 … 3"),
        (
            lambda s: append_experts(MoE(s, MLPExperts(4, 3, 2)), {}),
            "MoE has no parameter with a row per expert",
        ),
        (lambda s: bias_for_share(torch.zeros(2, 2), torch.zeros(2), 1.0), "0 < share < 1"),
    ],
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(LinearScore(3, 4, bias=True))
