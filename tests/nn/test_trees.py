import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import (
    Dense,
    DSelectKScore,
    InputJitter,
    LimitCapacity,
    LinearScore,
    LogitNoise,
    MaskExperts,
    MLPExperts,
    MoE,
    PermuteExperts,
    PreviousLogits,
    Router,
    SequenceRouter,
    TopK,
    TreeRouter,
    TreeScore,
    balance,
)
from coterie.nn.trees import smooth_step

D = 6


def trees(experts=6, k=2, std=1.0, kind=TreeScore, dtype=torch.float64):
    """A scorer whose splits are certain for some tokens (std = 1) or nearly all (std = 100)."""
    score = kind(D, experts, k).to(dtype)
    for name, parameter in score.named_parameters():
        torch.nn.init.normal_(parameter, std=std if "leaf" not in name else 1.0)
    return score


def paths_by_descent(score, x):
    """P of every (tree, leaf), walking from the leaf to the root of a heap."""
    n, paths = score.num_experts, torch.zeros(len(x), score.k, score.num_experts, dtype=x.dtype)
    for t, j, leaf in ((t, j, i) for t in range(len(x)) for j in range(score.k) for i in range(n)):
        node, probability = n - 1 + leaf, 1.0
        while node:
            parent = (node - 1) // 2
            z = (x[t] @ score.split_weight[j, parent] + score.split_bias[j, parent]).item() / score.gamma
            left = 0.0 if z <= -0.5 else 1.0 if z >= 0.5 else -2 * z**3 + 1.5 * z + 0.5
            probability *= left if node == 2 * parent + 1 else 1 - left
            node = parent
        paths[t, j, leaf] = probability
    return paths


def test_smooth_step_is_the_papers_cubic_and_exact_at_its_ends():
    t, gamma = torch.linspace(-1, 1, 201, dtype=torch.float64), 1.3
    inside = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
    expected = torch.where(t <= -gamma / 2, 0.0, torch.where(t >= gamma / 2, 1.0, inside))
    torch.testing.assert_close(smooth_step(t, gamma), expected)
    for width in (0.3, 1.0, 7.0):
        ends = torch.tensor([-width / 2, width / 2, -9 * width, 9 * width])
        assert smooth_step(ends, width).tolist() == [0, 1, 0, 1]


@given(experts=st.integers(2, 9), k=st.integers(1, 2), std=st.sampled_from([0.1, 1.0, 100.0]))
def test_paths_are_the_products_of_the_splits_above_each_leaf(experts, k, std):
    score, x = trees(experts, k, std), torch.randn(5, D, dtype=torch.float64)
    torch.testing.assert_close(score.paths(x), paths_by_descent(score, x))
    torch.testing.assert_close(score.paths(x).sum(-1), torch.ones(5, k, dtype=torch.float64))


def test_the_gate_is_one_softmax_over_all_pairs_of_tree_and_leaf():
    score, x = trees(5, 3), torch.randn(40, D, dtype=torch.float64)
    paths = paths_by_descent(score, x)
    leaves = torch.einsum("td,jed->tje", x, score.leaf_weight) + score.leaf_bias
    joint = torch.where(paths > 0, leaves.exp() * (paths + 1e-8), 0)
    gate = joint.sum(1) / joint.sum((1, 2), keepdim=True).squeeze(2)
    routing = Router(score, Dense())(x).validate()
    torch.testing.assert_close(routing.weights_TE, gate)
    assert routing.used_TE.equal(paths.sum(1) > 0)  # nothing exactly zero takes a slot
    assert 1 < routing.slots_per_token.double().mean() < 5


@pytest.mark.parametrize("kind", [TreeScore, DSelectKScore])
def test_certain_trees_use_at_most_k_experts(kind):
    routing = TreeRouter(trees(8, 3, std=1e6, kind=kind))(torch.randn(200, D, dtype=torch.float64))
    assert routing.slots_per_token.max() == 3
    assert routing.slots_per_token.min() >= 1
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(200, dtype=torch.float64))
    assert abs(float(balance.path_entropy(routing))) < 1e-4


def test_dead_subtrees_get_exactly_no_gradient_and_the_others_a_right_one():
    x = torch.randn(12, D, dtype=torch.float64)
    score = trees(6, 2, std=1.0)
    parameters = [score.split_weight, score.split_bias, score.leaf_weight, score.leaf_bias]
    target = torch.randn(12, 6, dtype=torch.float64)

    def gate(*_):
        return (Router(score, Dense())(x).weights_TE * target).sum()

    assert (score.paths(x) == 0).any()
    assert torch.autograd.gradcheck(gate, parameters)
    score.zero_grad()
    with torch.no_grad():
        score.split_bias[:, 0] = 100.0  # left at the root: node 2 and all below it is dead
    Router(score, Dense())(x).weights_TE.square().sum().backward()
    assert float(score.split_weight.grad[:, [0, 2]].abs().sum()) == 0
    assert float(score.split_weight.grad[:, [1, 3]].abs().sum()) > 0
    assert all(bool(p.grad.isfinite().all()) for p in parameters)


def test_experts_that_no_tree_reaches_are_not_run():
    score = trees(4, 1, dtype=torch.float32)
    with torch.no_grad():
        score.split_weight.zero_()
        score.split_bias.fill_(1.0)  # left, left: the first leaf of the lowest level
    bank = MLPExperts(4, D, 5)
    with torch.no_grad():
        bank.up_proj[1:] = torch.nan
    y, routing = MoE(TreeRouter(score), bank)(torch.randn(7, D))
    assert routing.load.tolist() == [7, 0, 0, 0]
    assert bool(y.isfinite().all())


def test_untrained_splits_are_undecided_at_any_gamma():
    x = torch.randn(100, D)
    for gamma in (0.01, 1.0, 10.0):
        paths = TreeScore(D, 8, k=2, gamma=gamma).paths(x)
        assert float((paths - 1 / 8).abs().max()) < 0.1


def test_selectors_spell_their_expert_in_bits():
    score, x = trees(8, 2, kind=DSelectKScore), torch.randn(9, D, dtype=torch.float64)
    bits = smooth_step(torch.einsum("td,jmd->tjm", x, score.bit_weight) + score.bit_bias, 1.0)
    selector = (torch.einsum("td,jnd->tjn", x, score.selector_weight) + score.selector_bias).softmax(1)
    expected = torch.zeros(9, 8, dtype=torch.float64)
    for expert in range(8):
        share = torch.ones(9, 2, dtype=torch.float64)
        for m, digit in enumerate(f"{expert:03b}"):
            share = share * (bits[..., m] if digit == "1" else 1 - bits[..., m])
        expected[:, expert] = (selector.squeeze(2) * share).sum(1)
    torch.testing.assert_close(Dense()(score(x)).weights_TE, expected, atol=1e-7, rtol=1e-6)


WRAPPED = {
    "noise": lambda: LogitNoise(trees(), std=0.3),
    "jitter": lambda: InputJitter(trees(), eps=0.1),
    "residual": lambda: PreviousLogits(trees()),
    "masked": lambda: MaskExperts(trees(), torch.arange(6) != 3),
    "permuted": lambda: PermuteExperts(trees(), torch.tensor([5, 3, 1, 0, 2, 4])),
    "two": lambda: MaskExperts(PreviousLogits(trees()), torch.arange(6) != 3),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("select", [None, TopK(2)])
def test_every_wrapper_of_scorers_takes_trees(wrapped, select):
    router = TreeRouter(WRAPPED[wrapped](), select).double()
    x, mask = torch.randn(20, D, dtype=torch.float64), torch.arange(20) < 15
    previous = TreeRouter(trees())(x)
    assert bool((previous.logits == -torch.inf).any())
    routing = router(x, mask=mask, previous=previous).validate()
    torch.testing.assert_close(routing.paths, router.trees().paths(x))  # not the permuted or masked ones
    (routing.weights.square().sum() + balance.path_entropy(routing)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in router.parameters())
    assert float(router.trees().split_weight.grad.abs().sum()) > 0


def test_wrappers_of_routers_keep_the_paths():
    x, mask = torch.randn(12, D, dtype=torch.float64), torch.arange(12) < 10
    limited = LimitCapacity(TreeRouter(trees()), 0.5)(x).validate()
    assert int(limited.dropped.sum()) > 0
    assert limited.paths.shape == (12, 2, 6)
    broadcast = SequenceRouter(TreeRouter(trees()))(x, shape=(3, 4), mask=mask)
    assert broadcast.validate().paths.shape == (12, 2, 6)
    assert broadcast.paths[:4].unique(dim=0).shape[0] == 1


def test_a_token_whose_only_expert_is_masked_goes_to_all_allowed_ones():
    score = trees(4, 1, dtype=torch.float32)
    with torch.no_grad():
        score.split_weight.zero_()
        score.split_bias.fill_(1.0)
    allowed = torch.tensor([False, True, False, True])
    for select, used in ((Dense(), [[1, 3]]), (TopK(1), [[1]])):
        routing = TreeRouter(MaskExperts(score, allowed), select)(torch.randn(3, D)).validate()
        assert routing.used_TE.nonzero()[:, 1].view(3, -1).unique(dim=0).tolist() == used
        torch.testing.assert_close(routing.weights.sum(1), torch.ones(3))


def test_path_entropy_is_the_papers_formula_over_tokens_that_count():
    x, mask = torch.randn(10, D, dtype=torch.float64), torch.arange(10) < 6
    router = TreeRouter(trees())
    paths = router(x).paths[:6]
    expected = sum(-p * math.log(p + 1e-6) for p in paths.flatten().tolist()) / 6
    x[6:] = torch.randn(4, D, dtype=torch.float64)
    assert float(balance.path_entropy(router(x, mask=mask))) == pytest.approx(expected)
    both = balance.path_entropy([router(x), router(x, mask=mask)])
    torch.testing.assert_close(
        both, (balance.path_entropy(router(x)) + balance.path_entropy(router(x[:6]))) / 2
    )


def test_the_gate_computes_in_float32_under_autocast_and_in_bfloat16_models():
    router, x = TreeRouter(trees(dtype=torch.float32)), torch.randn(5, D)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router(x).weights, router(x.float()).weights)
        assert router(x).paths.dtype == torch.float32
    routing = router.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert routing.weights.dtype == routing.paths.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TreeScore(D, 1, 1), "num_experts=1; a tree needs at least 2 leaves"),
        (lambda: TreeScore(D, 4, 0), "k=0 trees over 4 experts; use 1 ≤ k ≤ 4"),
        (lambda: TreeScore(D, 4, 5), "k=5 trees over 4 experts"),
        (lambda: TreeScore(D, 4, 2, gamma=0.0), "gamma=0.0; should be > 0"),
        (lambda: DSelectKScore(D, 6, 2), "num_experts=6 is not a power of 2"),
        (lambda: DSelectKScore(D, 8, 2, gamma=math.nan), "gamma=nan"),
        (lambda: TreeRouter(LinearScore(D, 4)), "LinearScore holds no trees; give TreeScore"),
        (lambda: TreeRouter(TreeScore(D, 4, 2), TopK(5)), "top_k=5 but the router has 4"),
        (lambda: TreeRouter(TreeScore(D, 4, 2))(torch.zeros(3, 5)), r"this router takes \[T, 6\]"),
        (lambda: TreeRouter(TreeScore(D, 4, 2))(torch.full((3, D), math.nan)), "logits hold NaN"),
        (lambda: TreeRouter(TreeScore(D, 4, 2))(torch.full((3, D), math.inf)), "logits hold NaN"),
        (
            lambda: balance.path_entropy(Router(TreeScore(D, 4, 2), Dense())(torch.zeros(3, D))),
            "route with TreeRouter",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
