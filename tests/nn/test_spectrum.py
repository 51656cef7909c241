import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.nn import (
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoE,
    MomentumResidual,
    Router,
    TopK,
    curvatures,
    spectral_radius,
    stability_limit,
)


@given(mu=st.floats(0, 0.95), gamma=st.floats(0.05, 3))
def test_a_stack_is_stable_up_to_the_limit_and_no_further(mu, gamma):
    edge = stability_limit(mu) / gamma
    curvature = torch.tensor([0.01 * edge, 0.5 * edge, 0.999 * edge, 1.001 * edge], dtype=torch.float64)
    stable = spectral_radius(MomentumResidual(mu, gamma), curvature) < 1
    assert stable.tolist() == [True, True, True, False]


@given(mu=st.floats(0.1, 0.95), share=st.floats(0.05, 0.95))
def test_where_it_oscillates_the_factor_is_the_root_of_mu(mu, share):
    low, high = (1 - mu**0.5) ** 2, (1 + mu**0.5) ** 2
    s = torch.tensor([low + share * (high - low)], dtype=torch.float64)
    assert spectral_radius(MomentumResidual(mu, 1.0), s).item() == pytest.approx(mu**0.5)


@pytest.mark.parametrize("s", [0.3, 1.7, 3.6, 0.4 + 0.8j])
@pytest.mark.parametrize("lookahead", [0.0, 0.7])
def test_the_factor_is_how_a_long_stack_grows(s, lookahead):
    residual, state = MomentumResidual(0.6, 1.0, lookahead=lookahead), None
    s = torch.tensor([s], dtype=torch.complex128)
    x, lengths = torch.ones_like(s), []
    for _ in range(200):
        x, state = residual(x, -s * residual.point(x, state), state)
        lengths.append((x.abs() ** 2 + state.momentum.abs() ** 2).sqrt())
    growth = (lengths[199] / lengths[99]) ** (1 / 100)
    torch.testing.assert_close(growth, spectral_radius(residual, s), rtol=0.02, atol=0)


def test_without_momentum_it_is_one_minus_the_step():
    s = torch.tensor([0.5, 1.5, 2.5, 1 + 1j])
    torch.testing.assert_close(
        spectral_radius(MomentumResidual(0.0, 0.8), s), (1 - 0.8 * s.to(torch.complex128)).abs()
    )


def test_the_curvatures_of_one_linear_expert_are_its_eigenvalues():
    expert = nn.Linear(5, 5).double()
    hessian = torch.randn(5, 5).double()
    hessian = hessian @ hessian.t()
    with torch.no_grad():
        expert.weight.copy_(-hessian)
    moe = MoE(Router(LinearScore(5, 1).double(), TopK(1)), ModuleExperts([expert]))
    found = curvatures(lambda x: moe(x)[0], torch.randn(3, 5).double())
    expected = torch.linalg.eigvalsh(hessian).expand(3, 5)
    torch.testing.assert_close(found.real.sort(dim=-1).values, expected)
    assert float(found.imag.abs().max()) < 1e-9


def test_the_curvatures_of_a_sparse_layer_are_those_of_autograds_jacobian_token_by_token():
    norm = nn.LayerNorm(6).double()
    moe = MoE(Router(LinearScore(6, 4), TopK(2)), MLPExperts(4, 6, 8)).double()
    block, x = lambda x: moe(norm(x))[0], torch.randn(3, 6).double()
    for token, found in zip(x, curvatures(block, x), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda t: block(t.unsqueeze(0)).squeeze(0), token)
        for power in range(1, 7):  # eigenvalues come in no order: the sums of their powers tell them all
            traced = torch.linalg.matrix_power(-jacobian, power).trace()
            torch.testing.assert_close(found.pow(power).sum().real, traced)


def test_a_fixed_point_attracts_where_the_linearised_layer_says_so():
    expert = nn.Linear(4, 4).double()
    with torch.no_grad():
        expert.weight.copy_(-torch.diag(torch.tensor([0.2, 0.5, 1.0, 1.3])))
        expert.bias.zero_()
    moe = MoE(Router(LinearScore(4, 1).double(), TopK(1)), ModuleExperts([expert]))
    s = curvatures(lambda x: moe(x)[0], torch.zeros(1, 4).double())
    for gamma in (1.4, 1.6, 2.5, 2.7):  # the plain limit is at 2 / 1.3, that of momentum at 3.4 / 1.3
        for mu in (0.0, 0.7):
            residual, x, state = MomentumResidual(mu, gamma), torch.full((1, 4), 1e-3).double(), None
            for _ in range(300):
                x, state = residual(x, moe(x)[0], state)
            assert (float(x.norm()) < 1e-3) == (float(spectral_radius(residual, s).max()) < 1)


def test_what_cannot_be_linearised_is_refused():
    with pytest.raises(ValueError, match=r"maps \(3, 4\) to \(3, 2\); the shape should stay"):
        curvatures(nn.Linear(4, 2), torch.randn(3, 4))
    with pytest.raises(ValueError, match="mu=1; should lie in 0 ≤ mu < 1"):
        stability_limit(1)
