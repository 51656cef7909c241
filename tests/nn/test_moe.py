import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routings import routings
from torch import nn
from torch.utils.checkpoint import checkpoint

from coterie.nn import (
    ConcatExperts,
    Gated,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoE,
    Router,
    SwiGLU,
    SwiGLUExperts,
    TopK,
    TopP,
)


def make_moe(k=2, shared=False, num_experts=4):
    router = Router(LinearScore(8, num_experts), TopK(k))
    return MoE(router, SwiGLUExperts(num_experts, 8, 16), SwiGLU(8, 12) if shared else None)


@given(routings(max_experts=5), st.sampled_from(["swiglu", "mlp", "modules", "concat"]))
def test_a_bank_gives_the_weighted_sum_of_its_experts_over_used_slots(routing, kind):
    torch.manual_seed(0)
    E = routing.num_experts
    swiglu = SwiGLUExperts(E, 6, 5, dim_out=4, bias=True).double()
    mlp = MLPExperts(E, 6, 5, dim_out=4, activation="relu").double()
    nn.init.normal_(swiglu.gate_up_bias)
    nn.init.normal_(mlp.down_bias)
    modules = ModuleExperts(
        [nn.Sequential(nn.Linear(6, 2 + e), nn.Linear(2 + e, 4)) for e in range(E)]
    ).double()

    def expert(e, x):
        if kind == "modules":
            return modules.experts[e](x)
        if kind == "mlp" or (kind == "concat" and e >= E // 2 and E > 1):
            e = e - E // 2 if kind == "concat" else e
            return mlp.down_proj[e] @ (mlp.up_proj[e] @ x + mlp.up_bias[e]).relu() + mlp.down_bias[e]
        gate, up = (swiglu.gate_up_proj[e] @ x + swiglu.gate_up_bias[e]).chunk(2)
        return swiglu.down_proj[e] @ (nn.functional.silu(gate) * up) + swiglu.down_bias[e]

    bank = {"swiglu": swiglu, "mlp": mlp, "modules": modules}.get(kind)
    if kind == "concat":
        bank = swiglu if E == 1 else ConcatExperts(first(swiglu, E // 2), first(mlp, E - E // 2))
    x = torch.randn(routing.experts.shape[0], 6, dtype=torch.float64)
    expected = torch.zeros(len(x), 4, dtype=torch.float64)
    for t, (experts, weights) in enumerate(zip(routing.experts.tolist(), routing.weights, strict=True)):
        for e, w in zip(experts, weights, strict=True):
            if e >= 0:
                expected[t] += w * expert(e, x[t])
    torch.testing.assert_close(bank(x, routing), expected)


def first(bank, count):
    """The first `count` experts of a bank."""
    part = copy.deepcopy(bank)
    part.num_experts = count
    for name, p in bank.named_parameters():
        setattr(part, name, nn.Parameter(p[:count].detach()))
    return part


def test_the_layer_keeps_leading_shape_and_returns_its_routing():
    y, routing = make_moe()(torch.randn(2, 3, 5, 8))
    assert y.shape == (2, 3, 5, 8)
    assert routing.validate().experts.shape == (30, 2)


@given(seed=st.integers(0, 1000), order_seed=st.integers(0, 1000))
def test_permuting_experts_and_router_rows_together_changes_nothing(seed, order_seed):
    torch.manual_seed(seed)
    moe, x = make_moe().double(), torch.randn(7, 8, dtype=torch.float64)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(order_seed))
    other = copy.deepcopy(moe)
    other.router.score.weight.data = moe.router.score.weight.data[order]
    other.experts.gate_up_proj.data = moe.experts.gate_up_proj.data[order]
    other.experts.down_proj.data = moe.experts.down_proj.data[order]
    torch.testing.assert_close(other(x)[0], moe(x)[0])


@given(seed=st.integers(0, 1000))
def test_tokens_do_not_influence_each_other(seed):
    torch.manual_seed(seed)
    moe, x, order = make_moe().double(), torch.randn(7, 8, dtype=torch.float64), torch.randperm(7)
    torch.testing.assert_close(moe(x[order])[0], moe(x)[0][order])


def test_one_expert_with_weight_one_is_a_dense_network():
    moe, dense = make_moe(k=1, num_experts=1), SwiGLU(8, 16)
    dense.gate_proj.weight.data, dense.up_proj.weight.data = moe.experts.gate_up_proj.data[0].chunk(2)
    dense.down_proj.weight.data = moe.experts.down_proj.data[0]
    x = torch.randn(5, 8)
    torch.testing.assert_close(moe(x)[0], dense(x))


def test_padding_gets_only_the_shared_expert():
    moe, x = make_moe(shared=True), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    y, routing = moe(x, mask=mask)
    torch.testing.assert_close(y[~mask], moe.shared(x)[~mask])
    torch.testing.assert_close(y[mask], moe(x)[0][mask])
    assert int(routing.load.sum()) == 2 * int(mask.sum())


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 0, 8)])
def test_zero_tokens_and_one_token_work_forward_and_backward(shape):
    moe, x = make_moe(), torch.randn(shape, requires_grad=True)
    y, _ = moe(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_experts_nobody_chose_get_zero_gradient():
    moe = make_moe(k=1)
    y, routing = moe(torch.randn(1, 8))
    y.sum().backward()
    for e, n in enumerate(routing.load.tolist()):
        assert (float(moe.experts.down_proj.grad[e].abs().sum()) > 0) == (n > 0)


def test_the_router_learns_through_the_weights():
    moe = make_moe()
    moe(torch.randn(5, 8))[0].square().sum().backward()
    assert float(moe.router.score.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("k", [1, 3])
def test_one_bank_serves_several_routers_and_depths(k):
    bank = SwiGLUExperts(4, 8, 16)
    gates = [MoE(Router(LinearScore(8, 4), TopK(k)), bank) for _ in range(2)]
    x = torch.randn(5, 8)
    (gates[0](x)[0] + gates[1](gates[0](x)[0])[0]).sum().backward()
    assert sum(p.numel() for p in nn.ModuleList(gates).parameters()) == 2 * 32 + sum(
        p.numel() for p in bank.parameters()
    )


def test_bfloat16_and_autocast_come_close_to_float32():
    moe, x = make_moe(shared=True), torch.randn(50, 8)
    y, _ = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, routing = moe(x)
        cast.float().sum().backward()
    assert routing.weights.dtype == torch.float32
    assert (cast - y).norm() / y.norm() < 0.02
    assert moe.experts.down_proj.grad.dtype == torch.float32
    low, _ = moe.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert (low - y).norm() / y.norm() < 0.05


def test_activation_checkpointing_gives_the_same_gradients():
    moe, x = make_moe(), torch.randn(5, 8)
    plain = torch.autograd.grad(moe(x)[0].square().sum(), list(moe.parameters()))
    y = checkpoint(lambda x: moe(x)[0], x, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), list(moe.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("select", [TopK(2), TopP(0.6)])
def test_compiles_to_one_graph_with_the_same_result_and_gradient(select):
    moe = MoE(Router(LinearScore(8, 4), select), SwiGLUExperts(4, 8, 16))
    compiled, x = torch.compile(moe, fullgraph=True), torch.randn(6, 8)
    y, _ = moe(x)
    again, routing = compiled(x)
    torch.testing.assert_close(again, y)
    assert int(routing.load.sum()) >= 6
    plain = torch.autograd.grad(y.square().sum(), list(moe.parameters()))
    for a, b in zip(plain, torch.autograd.grad(again.square().sum(), list(moe.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_gated_shared_expert_is_scaled_per_token():
    gated, x = Gated(SwiGLU(8, 4), dim=8), torch.randn(3, 8)
    torch.testing.assert_close(gated(x), torch.sigmoid(x @ gated.gate.weight.t()) * gated.module(x))


def test_state_dict_round_trips():
    moe, other = make_moe(shared=True), make_moe(shared=True)
    other.load_state_dict(moe.state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(moe(x)[0], other(x)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MoE(Router(LinearScore(8, 4), TopK(2)), SwiGLUExperts(5, 8, 16)),
            "4 experts but the bank holds 5",
        ),
        (lambda: make_moe()(torch.zeros(3, 7)), r"tokens have shape \(3, 7\)"),
        (lambda: make_moe()(torch.zeros(3, 8, dtype=torch.long)), "tokens are torch.int64"),
        (lambda: SwiGLUExperts(4, 8, 16, activation="x"), "activation='x' is not known"),
        (lambda: MLPExperts(4, 8, 16, activation="x"), "activation='x' is not known"),
        (lambda: ModuleExperts([]), "no modules"),
        (lambda: ConcatExperts(), "no banks"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_routing_over_other_experts_is_refused():
    routing = Router(LinearScore(8, 3), TopK(1))(torch.randn(2, 8))
    for bank in (SwiGLUExperts(4, 8, 16), ModuleExperts([nn.Identity()] * 4)):
        with pytest.raises(ValueError, match="over 3 experts but the bank holds 4"):
            bank(torch.randn(2, 8), routing)
