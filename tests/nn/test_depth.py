import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import (
    AdamResidual,
    DepthState,
    MomentumResidual,
    PlainResidual,
    robust_momentum,
    spectral_radius,
)

RESIDUALS = {
    "plain": PlainResidual,
    "momentum": MomentumResidual,
    "nesterov": lambda: MomentumResidual(0.6, 0.5, lookahead=0.6),
    "learned": lambda: MomentumResidual(0.6, 0.5, learnable=True),
    "adam": AdamResidual,
    "robust": robust_momentum,
}


def run(residual, x, updates):
    """x and state after a layer per update."""
    state = None
    for update in updates:
        x, state = residual(x, update, state)
    return x, state


@given(mu=st.floats(0, 0.99), gamma=st.floats(0.01, 2), layers=st.integers(1, 9))
def test_momentum_is_torchs_sgd_with_depth_for_time(mu, gamma, layers):
    updates = torch.randn(layers, 3, 5, dtype=torch.float64)
    theirs = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theirs], lr=gamma, momentum=mu)
    for update in updates:
        theirs.grad = -update
        optimizer.step()
    x, state = run(MomentumResidual(mu, gamma), torch.zeros(3, 5, dtype=torch.float64), updates)
    torch.testing.assert_close(x, theirs.detach())
    fading = mu ** torch.arange(layers - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(state.momentum, torch.einsum("l,lnd->nd", fading, updates))


@given(b1=st.floats(0, 0.99), b2=st.floats(0, 0.999), gamma=st.floats(0.01, 2), layers=st.integers(1, 9))
def test_adam_with_bias_correction_is_torchs_adam_with_depth_for_time(b1, b2, gamma, layers):
    updates = torch.randn(layers, 3, 5, dtype=torch.float64)
    theirs = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theirs], lr=gamma, betas=(b1, b2), eps=1e-12)
    for update in updates:
        theirs.grad = -update
        optimizer.step()
    residual = AdamResidual(gamma, betas=(b1, b2), eps=1e-24, bias_correction=True)  # ours is under the root
    x, _ = run(residual, torch.zeros(3, 5, dtype=torch.float64), updates)
    torch.testing.assert_close(x, theirs.detach())


def test_adam_without_bias_correction_is_the_papers_recurrence():
    residual, updates = AdamResidual(0.3, betas=(0.9, 0.999), decay=0.25), torch.randn(4, 7).double()
    x = m = v = torch.zeros(7).double()
    for u in updates:
        m, v = 0.9 * m + 0.1 * u, 0.999 * v + 0.001 * u * u
        x = 0.75 * x + 0.3 / (v + 1e-8).sqrt() * m
    torch.testing.assert_close(run(residual, torch.zeros(7).double(), updates)[0], x)


def test_adams_first_layer_passes_a_sign_and_hardly_a_gradient():
    u = torch.tensor([5.0, -0.5, 0.1], requires_grad=True)
    x, _ = AdamResidual(1.0)(torch.zeros(3), u, None)
    torch.testing.assert_close(x, 0.001**-0.5 * 0.1 * u.sign(), atol=0.01, rtol=0)
    x.sum().backward()
    assert float(u.grad.abs().max()) < 0.05


def test_adam_at_full_decay_leaves_its_input_out():
    u, residual = torch.randn(5), AdamResidual(decay=1.0)
    assert torch.equal(residual(torch.randn(5), u, None)[0], residual(torch.zeros(5), u, None)[0])


def test_adam_hands_on_the_heavy_ball_momentum_that_it_keeps_beside_its_own():
    updates = torch.randn(3, 5)
    _, adam = run(AdamResidual(mu=0.6), torch.zeros(5), updates)
    _, heavy_ball = run(MomentumResidual(mu=0.6), torch.zeros(5), updates)
    assert torch.equal(adam.momentum, heavy_ball.momentum)
    _, after = MomentumResidual(mu=0.6)(torch.zeros(5), updates[0], adam)
    assert (after.mean, after.square, after.adam_layers) == (adam.mean, adam.square, 3)


def test_robust_momentum_is_its_two_step_recurrence():
    rho, smoothness, condition = 0.8, 2.0, 10.0
    a = condition * (1 - rho) ** 2 * (1 + rho) / smoothness
    b = condition * rho**3 / (condition - 1)
    g = rho**3 / ((condition - 1) * (1 - rho) ** 2 * (1 + rho))
    block = torch.nn.Linear(4, 4).double()
    now = before = start = torch.randn(3, 4).double()
    for _ in range(5):
        step = now - before
        now, before = now + b * step + a * block(now + g * step), now
    residual, x, state = robust_momentum(rho, smoothness, condition), start, None
    for _ in range(5):
        x, state = residual(x, block(residual.point(x, state)), state)
    torch.testing.assert_close(x, now)


@given(condition=st.floats(1.5, 200), share=st.floats(0, 1))
def test_robust_momentum_shrinks_every_curvature_in_its_range_by_rho(condition, share):
    fastest, slowest = 1 - condition**-0.5, 1 - 1 / condition
    rho = min(fastest + share * (slowest - fastest), slowest)
    curvature = torch.linspace(3 / condition, 3, 50, dtype=torch.float64)
    # two equal eigenvalues at its ends are found to the root of the precision
    assert float(spectral_radius(robust_momentum(rho, 3.0, condition), curvature).max()) <= rho + 1e-6


@pytest.mark.parametrize("learnable", [False, True])
def test_without_momentum_and_at_step_one_it_is_the_plain_residual_bit_for_bit(learnable):
    x, u = torch.randn(5, 8), torch.randn(5, 8)
    residual = MomentumResidual(0.5, 1.0, learnable=True) if learnable else MomentumResidual(0.0, 1.0)
    assert torch.equal(residual(x, u, None)[0], PlainResidual()(x, u, None)[0])


def test_the_plain_residual_hands_the_state_of_others_on():
    state = DepthState(torch.randn(4))
    assert PlainResidual()(torch.zeros(4), torch.ones(4), state)[1] is state


def test_gradients_flow_through_the_momentum():
    updates = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    x, _ = run(MomentumResidual(0.5, 2.0), torch.zeros(3, dtype=torch.float64), updates)
    x.sum().backward()
    for after, update in zip((3, 2, 1, 0), updates, strict=True):
        assert update.grad.unique().tolist() == [2 * sum(0.5**k for k in range(after + 1))]


@pytest.mark.parametrize("name", RESIDUALS)
def test_nothing_is_kept_between_forwards(name):
    residual, x, updates = RESIDUALS[name](), torch.randn(2, 4), torch.randn(3, 2, 4)
    first = run(residual, x, updates)[0]
    assert torch.equal(run(residual, x, updates)[0], first)
    assert list(residual.buffers()) == []
    assert sorted(residual.state_dict()) == (["log_gamma", "mu_logit"] if name == "learned" else [])


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_tokens_path_is_its_own(name):
    residual, x, updates = RESIDUALS[name](), torch.randn(6, 4), torch.randn(3, 6, 4)
    together, alone = run(residual, x, updates)[0], run(residual, x[2:3], updates[:, 2:3])[0]
    torch.testing.assert_close(together[2:3], alone)


def test_learned_momentum_starts_where_told_and_keeps_to_its_range():
    residual = MomentumResidual(0.7, 0.3, learnable=True)
    assert (residual.mu.item(), residual.gamma.item()) == pytest.approx((0.7, 0.3))
    optimizer = torch.optim.SGD(residual.parameters(), lr=3.0)
    for _ in range(20):
        x, _ = run(residual, torch.zeros(5), torch.ones(3, 5))
        optimizer.zero_grad()
        x.mean().backward()
        assert all(float(p.grad.abs()) > 0 for p in residual.parameters())
        optimizer.step()
    assert 0 < residual.mu.item() < 0.7
    assert 0 < residual.gamma.item() < 0.3


@pytest.mark.parametrize("name", RESIDUALS)
def test_half_precision_stays_and_adams_moments_do_not_underflow(name):
    x, state = run(RESIDUALS[name](), torch.zeros(4).half(), torch.full((2, 4), 1e-3).half())
    assert x.dtype == torch.float16
    assert float(x.detach().min()) > 0
    if name == "adam":
        assert state.square.dtype == torch.float32
        assert float(state.square.min()) > 0


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "robust"])
def test_momentum_cannot_cross_to_another_width(name):
    residual = RESIDUALS[name]()
    _, state = residual(torch.zeros(2, 4), torch.ones(2, 4), None)
    with pytest.raises(
        ValueError, match=r"has shape \(2, 4\), this layer's tokens \(2, 6\): momentum cannot"
    ):
        residual(torch.zeros(2, 6), torch.ones(2, 6), state)
    if residual.__class__ is MomentumResidual and residual.lookahead:
        with pytest.raises(ValueError, match="momentum cannot cross"):
            residual.point(torch.zeros(2, 6), state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MomentumResidual(1.0), "mu=1.0; should lie in 0 ≤ mu < 1"),
        (lambda: MomentumResidual(-0.1), "mu=-0.1"),
        (lambda: MomentumResidual(0.5, 0.0), "gamma=0.0; should be > 0"),
        (lambda: MomentumResidual(0.0, learnable=True), "mu=0 cannot be learned"),
        (lambda: AdamResidual(-1.0), "gamma=-1.0"),
        (lambda: AdamResidual(mu=1.5), "mu=1.5"),
        (lambda: AdamResidual(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda: AdamResidual(eps=0.0), "eps=0.0"),
        (lambda: AdamResidual(decay=1.1), "decay=1.1"),
        (lambda: robust_momentum(condition=1.0), "condition=1.0"),
        (lambda: robust_momentum(smoothness=0.0), "smoothness=0.0"),
        (lambda: robust_momentum(rho=0.95, condition=10.0), "should lie in 0.6838 ≤ rho ≤ 0.9"),
        (lambda: robust_momentum(rho=0.5, condition=10.0), "rho=0.5"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
