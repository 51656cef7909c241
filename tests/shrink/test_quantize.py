"""What each quantiser promises: exactness where possible, and less output error than the simpler one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.kernels.packed import BITS
from coterie.shrink import HessianMean, awq, gptq, rtn


def correlated_inputs(tokens, columns, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * columns**-0.5 + 0.3
    scale = torch.logspace(-spread, spread, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) @ mix * scale


def hessian_of(x, weights=None):
    hessian = HessianMean(x.shape[1])
    hessian.add(x, weights)
    return hessian.mean()


def output_error(packed, weight, x, weights=None):
    """sum_i c_i ||(W^ - W) x_i||², relative to the output."""
    change = (packed.dequantize() - weight).double()
    c = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    squares = [(x.double() @ w.mT).square().sum(-1) for w in (change, weight.double())]
    return float((c * squares[0]).sum() / (c * squares[1]).sum()) ** 0.5


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([-1, 32, 64]),
    seed=st.integers(0, 50),
)
def test_rtn_errs_by_half_a_step_at_most_and_keeps_zero(bits, symmetric, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 5, 70, generator=generator)
    weight[..., ::7] = 0.0
    packed = rtn(weight, bits, group_size=group_size, symmetric=symmetric)
    step = packed._per_column(packed.scales, torch.float32)
    # A zero point rounded to a whole level shifts the range by up to half a step, and a scale rounded to
    # bfloat16 by 1/256 of half the range: only the two ends of the range can lose more than half a step.
    slack = 1 + 2 ** (bits - 1) / 128
    assert bool(((packed.dequantize() - weight).abs() <= slack * step).all())
    assert bool((packed.dequantize()[weight == 0] == 0).all())


def test_rtn_with_more_bits_errs_less():
    weight = torch.randn(4, 16, 128)
    errors = [float((rtn(weight, bits, group_size=32).dequantize() - weight).norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)


def test_weights_that_lie_on_a_grid_come_back_exactly():
    levels = torch.randint(-8, 8, (6, 64)).float()
    levels[:, :2] = torch.tensor([-8.0, 7.0])
    assert torch.equal(rtn(levels * 0.25, 4).dequantize(), levels * 0.25)


def test_one_bit_is_the_sign_times_the_mean_of_each_group_and_never_zero():
    weight = torch.randn(3, 80)
    weight[0, :10] = 0.0
    got = rtn(weight, 1, group_size=32).dequantize()
    for start in (0, 32, 64):
        group = weight[:, start : start + 32]
        scale = group.abs().mean(1, keepdim=True).bfloat16().float()
        assert torch.equal(got[:, start : start + 32], torch.where(group >= 0, scale, -scale))


def test_symmetric_levels_are_scale_times_q_with_the_largest_at_the_top():
    weight = torch.tensor([[4.0, -4.0, 1.9, 0.0]])
    packed = rtn(weight, 3, symmetric=True)
    assert packed.zeros is None
    assert packed.levels().tolist() == [[3, -3, 1, 0]]


@pytest.mark.parametrize(("factors", "norm"), [((1.0, 0.9, 0.8, 0.7, 0.6, 0.5), 2.0), ((0.9, 1.0, 1.1), 2.4)])
def test_searching_the_range_never_errs_more(factors, norm):
    weight = torch.randn(16, 96) ** 3
    for symmetric in (False, True):
        options = {"bits": 2, "group_size": 32, "symmetric": symmetric, "norm": norm}
        plain, searched = rtn(weight, **options), rtn(weight, **options, factors=factors)
        errors = [
            (q.dequantize() - weight).abs().pow(norm).unflatten(-1, (3, 32)).sum(-1)
            for q in (plain, searched)
        ]
        assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
        assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gptq_errs_less_than_rtn_where_inputs_are_correlated(bits, group_size, act_order):
    x, weight = correlated_inputs(512, 96), torch.randn(24, 96)
    simple = rtn(weight, bits, group_size=group_size)
    careful = gptq(weight, hessian_of(x), bits, group_size=group_size, act_order=act_order)
    assert output_error(careful, weight, x) < 0.9 * output_error(simple, weight, x)


def test_gptq_with_the_identity_is_rtn():
    weight = torch.randn(2, 7, 100)
    for act_order in (False, True):
        ours = gptq(weight, torch.eye(100), 3, group_size=32, act_order=act_order)
        assert torch.equal(ours.dequantize(), rtn(weight, 3, group_size=32).dequantize())


def plain_gptq(weight, hessian, damping):
    """The algorithm itself: symmetric 3 bits per row, column after column without blocks, in float64."""
    weight = weight.double().clone()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scale = (weight.abs().amax(1) / 3).float().bfloat16().double()
    result = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        result[:, i] = (weight[:, i] / scale).round().clamp(-4, 3) * scale
        weight[:, i:] -= ((weight[:, i] - result[:, i]) / upper[i, i])[:, None] * upper[i, i:]
    return result


def test_gptq_in_blocks_is_the_columnwise_algorithm():
    x, weight = correlated_inputs(600, 300, seed=3), torch.randn(6, 300)
    ours = gptq(weight, hessian_of(x), 3, symmetric=True).dequantize()
    exact = plain_gptq(weight, hessian_of(x), 0.01)
    # A sum that falls on the other side of a rounding boundary in float32 changes what follows in its row.
    assert float((ours.double() - exact).abs().lt(1e-6).double().mean()) > 0.97


def test_gptq_over_experts_at_once_is_each_expert_alone():
    weight = torch.randn(3, 2, 10, 64)
    hessians = torch.stack([hessian_of(correlated_inputs(200, 64, seed=s)) for s in range(3)])
    together = gptq(weight, hessians.unsqueeze(1), 2, group_size=32)
    for e in range(3):
        alone = gptq(weight[e], hessians[e], 2, group_size=32)
        torch.testing.assert_close(together[e].dequantize(), alone.dequantize())


def test_a_weighted_hessian_serves_the_tokens_that_weigh():
    weight = torch.randn(32, 64)
    x = torch.cat([correlated_inputs(2000, 64, seed=s, spread=0.5) for s in range(2)])
    c = torch.cat([torch.full((2000,), 0.95), torch.full((2000,), 0.05)])
    plain, weighted = (gptq(weight, hessian_of(x, w), 2, symmetric=True) for w in (None, c))
    assert output_error(weighted, weight, x, c) < output_error(plain, weight, x, c)


def test_the_hessian_counts_tokens_and_not_calls_or_weights():
    x, c = torch.randn(9, 5), torch.rand(9)
    parts = HessianMean(5)
    parts.add(x[:1], c[:1])
    parts.add(x[1:], c[1:])
    expected = 2 / 9 * torch.einsum("t,ti,tj->ij", c.double(), x.double(), x.double())
    torch.testing.assert_close(parts.mean(), expected)
    assert parts.tokens == 9


def test_gptq_with_fewer_tokens_than_columns_still_helps():
    x, weight = correlated_inputs(20, 64), torch.randn(8, 64)
    ours, simple = gptq(weight, hessian_of(x), 3), rtn(weight, 3)
    assert output_error(ours, weight, x) < output_error(simple, weight, x)


def test_a_dead_column_becomes_zero_and_the_others_stay_good():
    x, weight = correlated_inputs(200, 64), torch.randn(8, 64)
    x[:, 5] = 0.0
    got = gptq(weight, hessian_of(x), 4).dequantize()
    assert bool((got[:, 5] == 0).all())
    assert bool((got[:, 6:] != 0).any())


def test_an_expert_without_tokens_is_rounded_to_nearest_with_a_warning_that_names_it():
    weight = torch.randn(3, 8, 64)
    hessians = torch.stack([hessian_of(correlated_inputs(99, 64)), torch.zeros(64, 64).double()] * 2)[:3]
    with pytest.warns(UserWarning, match="matrix 1 has a Hessian of zeros"):
        got = gptq(weight, hessians, 3)
    assert torch.equal(got[1].dequantize(), rtn(weight[1], 3).dequantize())


def test_a_hessian_that_is_none_is_rounded_to_nearest_with_a_warning():
    weight, hessian = torch.randn(8, 64), -torch.eye(64)
    with pytest.warns(UserWarning, match="the matrix has a Hessian without a Cholesky factor"):
        got = gptq(weight, hessian, 3)
    assert torch.equal(got.dequantize(), rtn(weight, 3).dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_errs_less_than_rtn_where_some_channels_are_loud(symmetric):
    x, weight = correlated_inputs(512, 96), torch.randn(24, 96)
    options = {"group_size": 32, "symmetric": symmetric}
    ours = awq(weight, x.abs().mean(0), hessian_of(x), 3, **options)
    assert output_error(ours, weight, x) < 0.9 * output_error(rtn(weight, 3, **options), weight, x)


def test_awq_of_equal_channels_is_rtn():
    weight, flat = torch.randn(8, 64), torch.full((64,), 0.3)
    ours = awq(weight, flat, torch.eye(64), 4)
    torch.testing.assert_close(ours.dequantize(), rtn(weight, 4).dequantize())


def test_awq_gives_gate_and_up_of_an_expert_one_scale_and_experts_their_own():
    x = torch.stack([correlated_inputs(256, 64, seed=s) for s in range(3)])
    hessians = torch.stack([hessian_of(one) for one in x])
    ours = awq(torch.randn(3, 2, 16, 64), x.abs().mean(1), hessians, 3, group_size=32)
    assert ours.input_scale.shape == (3, 2, 64)
    assert torch.equal(ours.input_scale[:, 0], ours.input_scale[:, 1])
    assert not torch.equal(ours.input_scale[0], ours.input_scale[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: rtn(w, 5), "bits=5"),
        (lambda w: rtn(w, 0), "bits=0"),
        (lambda w: rtn(w, 4, group_size=10), "group_size=10"),
        (lambda w: rtn(w, 4, factors=()), "factors is empty"),
        (lambda w: rtn(w.log(), 4), "values are not finite"),
        (lambda w: gptq(w, torch.eye(9), 4), "does not fit"),
        (lambda w: gptq(w, torch.full((64, 64), torch.nan), 4), "not finite"),
        (lambda w: awq(w, torch.ones(9), torch.eye(64), 4), "does not fit"),
        (lambda w: awq(w, torch.ones(64), torch.eye(9), 4), "hessian"),
        (lambda w: awq(w, torch.ones(64), torch.eye(64), 1), "bits=1"),
        (lambda w: HessianMean(64).add(w / 0), "not finite"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(8, 64))
