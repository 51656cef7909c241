"""Whatever fits together works together: any scorer, any selection, any bank, any float type."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coterie.nn import (
    ConcatExperts,
    CosineScore,
    Dense,
    DSelectKScore,
    ExpertChoice,
    LinearScore,
    MaskExperts,
    MaskWeights,
    MLPExperts,
    MLPScore,
    ModuleExperts,
    MoE,
    PermuteExperts,
    PreviousLogits,
    RemapScores,
    Router,
    SwiGLUExperts,
    Threshold,
    TopK,
    TopP,
    TreeScore,
    ZeroCostExperts,
)

D, E = 8, 6
SCORES = {
    "linear": lambda: LinearScore(D, E, bias=True),
    "cosine": lambda: CosineScore(D, E, temperature=0.5),
    "mlp": lambda: MLPScore(D, E, hidden=5),
    "residual": lambda: PreviousLogits(LinearScore(D, E)),
    "residual of an mlp": lambda: PreviousLogits(MLPScore(D, E, hidden=5)),
    "permuted": lambda: PermuteExperts(LinearScore(D, E), torch.tensor([5, 3, 1, 0, 2, 4])),
    "remapped": lambda: RemapScores(LinearScore(D, 4), torch.rand(E, 4)),
    "some": lambda: MaskExperts(LinearScore(D, E), torch.arange(E) != 2),
    "trees": lambda: trees(2),
    "residual of trees": lambda: PreviousLogits(trees(2)),
    "some of one tree": lambda: MaskExperts(trees(1), torch.arange(E) != 2),
    "selectors": lambda: RemapScores(DSelectKScore(D, 4, k=2), torch.rand(E, 4)),
}


def trees(k):
    """Trees with splits certain for most tokens."""
    score = TreeScore(D, E, k)
    nn.init.normal_(score.split_weight)
    return score


@dataclass
class Selection:
    """A selection, and the range in which it leaves a token's summed weights."""

    build: object
    low: float
    high: float


LAST = torch.arange(E) == E - 1
SELECTS = {
    "top-k, renormalised": Selection(lambda: TopK(2), 1, 1),
    "top-k, sigmoid, scaled": Selection(lambda: TopK(3, gate="sigmoid", scale=2.5), 2.5, 2.5),
    "top-k, plain": Selection(lambda: TopK(2, renormalize=False), 2 / E, 1),
    "top-k, last masked": Selection(lambda: MaskWeights(TopK(2), LAST), 1, 1),
    "top-1, last masked": Selection(lambda: MaskWeights(TopK(1), LAST), 0, 1),
    "top-p, plain": Selection(lambda: TopP(0.6), 0.6, 1),
    "top-p, renormalised": Selection(lambda: TopP(0.6, max_k=3, renormalize=True), 1, 1),
    "threshold": Selection(lambda: Threshold(0.2), 1 / E, 1),
    "dense": Selection(lambda: Dense(), 1, 1),
    "expert choice": Selection(lambda: ExpertChoice(1.5), 0, 1),
}


def modules():
    return ModuleExperts([nn.Identity(), *(nn.Linear(D, D) for _ in range(E - 1))])


BANKS = {
    "swiglu": lambda: SwiGLUExperts(E, D, 5, bias=True),
    "mlp": lambda: MLPExperts(E, D, 5),
    "swiglu and zero-cost": lambda: ConcatExperts(SwiGLUExperts(2, D, 5), ZeroCostExperts(D)),
    "zero-cost first": lambda: ConcatExperts(
        ZeroCostExperts(D, zero=1, copy=0, constant=1), MLPExperts(4, D, 5)
    ),
    "zero-cost alone": lambda: ZeroCostExperts(D, zero=1, copy=2, constant=3),
    "modules": modules,
    "everything": lambda: ConcatExperts(
        MLPExperts(1, D, 3),
        ModuleExperts([nn.Tanh()]),
        SwiGLUExperts(1, D, 4),
        ZeroCostExperts(D, constant=1),
    ),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@settings(max_examples=40)
@given(
    score=st.sampled_from(sorted(SCORES)),
    select=st.sampled_from(sorted(SELECTS)),
    bank=st.sampled_from(sorted(BANKS)),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_combination_works(score, select, bank, dtype, masked, seed):
    torch.manual_seed(seed)
    selection = SELECTS[select]
    first = Router(LinearScore(D, E), TopK(2)).to(dtype)
    moe = MoE(Router(SCORES[score](), selection.build()), BANKS[bank]()).to(dtype)
    if "residual" in score:
        nn.init.normal_(moe.router.score.weight)
    x = torch.randn(3, 4, D, dtype=dtype, requires_grad=True)
    mask = torch.rand(3, 4) < 0.7 if masked else None
    if masked:
        mask[0, 0] = True

    def layer(x, mask):
        flat = None if mask is None else mask.reshape(-1)
        return moe(x, previous=first(x.reshape(-1, D), mask=flat), **({} if mask is None else {"mask": mask}))

    y, routing = layer(x, mask)
    routing.validate()

    # shapes and types
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert routing.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert routing.logits.shape == (12, E)

    # weights add up to what the selection promises
    counts = torch.ones(12, dtype=torch.bool) if mask is None else mask.reshape(-1)
    total = routing.weights.sum(1)[counts]
    slack = 1e-5
    assert bool((total >= selection.low - slack).all())
    assert bool((total <= selection.high + slack).all())
    assert float(y.detach()[~counts.view(3, 4)].abs().sum()) == 0  # padding

    # gradients
    y.double().square().sum().backward()
    assert bool(x.grad.isfinite().all())
    for parameter in moe.parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all())

    # tokens in another order give the same results in that order
    order = torch.randperm(12)

    def reorder(t):
        return t.reshape(12, -1)[order].view(t.shape)

    with torch.no_grad():
        again, reordered = layer(reorder(x), None if mask is None else reorder(mask))
    same = {"atol": 1e-5, "rtol": 1e-5} if dtype != torch.bfloat16 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(again, reorder(y.detach()), **same)
    torch.testing.assert_close(reordered.weights_TE, routing.weights_TE[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_p_with_a_gating_residual_over_swiglu_and_zero_cost_experts_just_works(dtype):
    moe = MoE(
        Router(PreviousLogits(LinearScore(D, 8)), TopP(0.6)),
        ConcatExperts(SwiGLUExperts(4, D, 16), ZeroCostExperts(D)),
    ).to(dtype)
    x = torch.randn(2, 10, D, dtype=dtype)
    h, previous = moe(x)
    y, routing = moe(x + h, previous=previous)
    y.double().square().sum().backward()
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert routing.slots_per_token.unique().numel() > 1
    for parameter in moe.parameters():
        assert bool(parameter.grad.isfinite().all())
        assert float(parameter.grad.abs().sum()) > 0
