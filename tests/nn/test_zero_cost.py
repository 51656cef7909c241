import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routings import routings
from torch import nn

from coterie.nn import (
    ConcatExperts,
    LinearScore,
    MaskWeights,
    MoE,
    PreviousLogits,
    Router,
    Routing,
    SwiGLUExperts,
    TopK,
    TopP,
    ZeroCostExperts,
)


def bank_for(num_experts, dim=6):
    """A bank of exactly that many experts, of all kinds when there is room."""
    zero, copies = int(num_experts > 1), int(num_experts > 2)
    bank = ZeroCostExperts(dim, zero=zero, copy=copies, constant=num_experts - zero - copies).double()
    nn.init.normal_(bank.mix_proj)
    nn.init.normal_(bank.value)
    return bank


def expert(bank, e, x_D):
    """One expert on one token, from the definition."""
    if bank.kinds[e] == "zero":
        return torch.zeros_like(x_D)
    if bank.kinds[e] == "copy":
        return x_D
    a1, a2 = (bank.mix_proj[e] @ x_D).softmax(0)
    return a1 * x_D + a2 * bank.value[e]


def by_definition(bank, x_TD, routing):
    y_TD = torch.zeros_like(x_TD)
    for t, experts in enumerate(routing.experts.tolist()):
        for k, e in enumerate(experts):
            if e >= 0:
                y_TD[t] = y_TD[t] + routing.weights[t, k] * expert(bank, e, x_TD[t])
    return y_TD


@given(routings(masked=True))
def test_the_bank_gives_the_weighted_sum_of_its_experts_over_used_slots(routing):
    torch.manual_seed(0)
    bank = bank_for(routing.num_experts)
    x = torch.randn(len(routing.experts), 6, dtype=torch.float64)
    torch.testing.assert_close(bank(x, routing), by_definition(bank, x, routing))


@pytest.mark.parametrize("counts", [(1, 1, 2), (2, 0, 0), (0, 3, 0), (0, 0, 1), (1, 0, 3)])
def test_gradients_are_those_of_the_definition(counts):
    zero, copies, constant = counts
    bank = ZeroCostExperts(6, zero=zero, copy=copies, constant=constant).double()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(7, bank.num_experts, dtype=torch.float64, requires_grad=True)
    routing = TopP(0.7)(logits)
    leaves = [x, logits, *bank.parameters()]
    again = by_definition(bank, x, routing)
    mine = torch.autograd.grad(bank(x, routing).square().sum(), leaves, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(again.square().sum(), leaves, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(
            torch.zeros(1).double() if a is None else a, b if b is not None else torch.zeros_like(a)
        )


def test_gradcheck_through_router_and_bank():
    bank, score = ZeroCostExperts(4).double(), LinearScore(4, 4).double()
    moe = MoE(Router(score, MaskWeights(TopK(2), torch.tensor([False] * 3 + [True]))), bank)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe(x)[0], x)


def test_padding_gives_zeros_and_no_gradient_even_when_it_holds_nan():
    moe = MoE(Router(LinearScore(8, 4), TopK(2)), ZeroCostExperts(8))
    x = torch.randn(5, 8)
    x[3:] = torch.nan
    x.requires_grad_()
    y, _ = moe(x, mask=torch.arange(5) < 3)
    assert bool((y[3:] == 0).all())
    y.square().sum().backward()
    assert bool(x.grad[3:].eq(0).all())
    for p in moe.experts.parameters():
        assert bool(p.grad.isfinite().all())


def test_null_experts_alone_give_zeros():
    bank = ZeroCostExperts(8, zero=2, copy=0, constant=0)
    assert list(bank.parameters()) == []
    assert float(bank(torch.randn(3, 8), Routing.dense(torch.rand(3, 2))).abs().sum()) == 0


def make_moe():
    bank = ConcatExperts(SwiGLUExperts(4, 8, 16), ZeroCostExperts(8))
    return MoE(Router(PreviousLogits(LinearScore(8, 8)), TopP(0.6, renormalize=True)), bank)


def test_with_a_gating_residual_and_top_p_it_works_beside_other_experts_and_layers():
    first, second = make_moe(), make_moe()
    nn.init.normal_(second.router.score.weight)
    x = torch.randn(2, 10, 8)
    h, routing = first(x)
    y, after = second(x + h, previous=routing)
    y.square().sum().backward()
    assert y.shape == x.shape
    torch.testing.assert_close(after.validate().weights.sum(1), torch.ones(20))
    for p in [*first.router.score.score.parameters(), *second.parameters()]:  # through the residual too
        assert float(p.grad.abs().sum()) > 0
        assert bool(p.grad.isfinite().all())


def test_bfloat16_and_autocast_come_close_to_float32():
    moe, x = make_moe(), torch.randn(50, 8)
    y, _ = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = moe(x)
        cast.float().sum().backward()
    assert cast.dtype == torch.bfloat16
    assert moe.experts.banks[1].value.grad.dtype == torch.float32
    assert (cast - y).norm() / y.norm() < 0.02
    low, _ = copy.deepcopy(moe).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert (low - y).norm() / y.norm() < 0.1  # some tokens change experts: the gate's weights are rounded


def test_compiles_to_one_graph_with_the_same_result_and_gradient():
    moe, x = make_moe(), torch.randn(6, 8)
    compiled = torch.compile(moe, fullgraph=True)
    y, again = moe(x)[0], compiled(x)[0]
    torch.testing.assert_close(again, y)
    leaves = [*moe.experts.parameters()]
    plain = torch.autograd.grad(y.square().sum(), leaves)
    for a, b in zip(plain, torch.autograd.grad(again.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@given(seed=st.integers(0, 1000))
def test_a_masked_expert_keeps_its_slot_and_gives_its_weight_to_the_others(seed):
    torch.manual_seed(seed)
    masked, logits = torch.tensor([False, True, False, True]), torch.randn(20, 4, dtype=torch.float64)
    plain, routing = TopK(2)(logits), MaskWeights(TopK(2), masked)(logits).validate()
    assert routing.experts.tolist() == plain.experts.tolist()
    assert routing.load.tolist() == plain.load.tolist()
    hidden = masked[routing.experts]
    assert float(routing.weights[hidden].abs().sum()) == 0
    alive = (~hidden).any(1)
    torch.testing.assert_close(routing.weights[alive].sum(1), torch.ones(int(alive.sum())).double())
    both = ~hidden.any(1)
    torch.testing.assert_close(routing.weights[both], plain.weights[both])


def test_a_feed_forward_and_a_zero_expert_are_the_feed_forward_expert_alone():
    ffn = SwiGLUExperts(1, 8, 16)
    bank = ConcatExperts(ffn, ZeroCostExperts(8, zero=1, copy=0, constant=0))
    moe = MoE(Router(LinearScore(8, 2), MaskWeights(TopK(2), torch.tensor([False, True]))), bank)
    x = torch.randn(5, 8)
    torch.testing.assert_close(moe(x)[0], ffn(x, Routing.dense(torch.ones(5, 1))))


def test_masking_stays_finite_when_a_zero_expert_wins_by_far_or_twice():
    logits = torch.tensor([[0.0, 90.0, -1.0], [0.0, 1.0, 2.0], [30.0, 60.0, 0.0]], requires_grad=True)
    routing = MaskWeights(TopK(2), torch.tensor([False, True, True]))(logits)
    assert routing.weights.tolist() == [[0, 0], [0, 0], [0, 1]]
    routing.weights.square().sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ZeroCostExperts(8, zero=0, copy=0, constant=0), "one must be positive"),
        (lambda: ZeroCostExperts(8, zero=-1), "zero=-1"),
        (
            lambda: Router(LinearScore(8, 4), MaskWeights(TopK(2), torch.zeros(3))),
            r"masked has shape \(3,\) but the router has 4 experts",
        ),
        (
            lambda: ZeroCostExperts(8)(torch.zeros(2, 8), Routing.dense(torch.rand(2, 3))),
            "over 3 experts but the bank holds 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
