import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routings import routings

from coterie.nn import (
    Dense,
    HashRouter,
    LearnedPermutation,
    LimitCapacity,
    LinearScore,
    MLPExperts,
    MoE,
    NoisyTopK,
    PermuteLabels,
    Router,
    TopK,
    TopP,
    TreeRouter,
    TreeScore,
    permutation_entropy,
)
from coterie.nn.permutation import round_to_permutation, sinkhorn

D, E = 8, 5
ROUTERS = {
    "top-k": lambda: Router(LinearScore(D, E), TopK(2)),
    "unnormalised": lambda: Router(LinearScore(D, E), TopK(2, renormalize=False)),
    "top-p": lambda: Router(LinearScore(D, E), TopP(0.6)),
    "noisy top-k": lambda: NoisyTopK(D, E, 2),
    "dense": lambda: Router(LinearScore(D, E), Dense()),
    "trees": lambda: TreeRouter(TreeScore(D, E, 2)),
    "capacity": lambda: LimitCapacity(Router(LinearScore(D, E), TopK(2)), 0.8),
    "hash": lambda: HashRouter(torch.arange(E), E),
}
IDS = torch.arange(20) % E


def permutation_of(order, **settings):
    """A learned permutation whose matrix is as good as `order`."""
    learned = LearnedPermutation(len(order), **settings)
    with torch.no_grad():
        learned.logits.copy_(1000 * torch.eye(len(order))[order])
    return learned


@given(size=st.integers(2, 7), scale=st.floats(0.1, 10), seed=st.integers(0, 1000))
def test_sinkhorn_ends_with_rows_and_columns_that_sum_to_one(size, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = sinkhorn(scale * torch.rand(size, size, generator=generator, dtype=torch.float64), 500)
    torch.testing.assert_close(matrix.sum(0), torch.ones(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-3, rtol=0)


def test_sinkhorn_is_scaling_of_rows_and_columns_in_turn():
    logits = torch.randn(4, 4, dtype=torch.float64)
    plain = logits.exp()
    for _ in range(7):
        plain = plain / plain.sum(1, keepdim=True)
        plain = plain / plain.sum(0, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, 7), plain)


def test_sinkhorn_at_the_papers_lowest_temperature_overflows_nowhere():
    matrix = sinkhorn(torch.empty(8, 8).uniform_(-0.05, 0.05) / 1e-7, 150)
    assert bool(matrix.isfinite().all())


@given(size=st.integers(2, 5), seed=st.integers(0, 1000))
def test_rounding_keeps_as_much_as_any_permutation_could(size, seed):
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(size)
    best = max(float(matrix[rows, list(p)].sum()) for p in itertools.permutations(range(size)))
    permutation = round_to_permutation(matrix)
    assert sorted(permutation.tolist()) == list(range(size))
    assert float(matrix[rows, permutation].sum()) == pytest.approx(best)


def test_rounding_always_gives_a_permutation_where_the_best_of_each_row_would_not():
    assert round_to_permutation(torch.tensor([[0.5, 0.5], [0.5, 0.5]])).unique().numel() == 2


def test_temperature_and_iterations_follow_the_search():
    learned = LearnedPermutation(4, tau=(1.0, 0.01), iterations=(20, 150))
    for progress, tau, iterations in ((0.0, 1.0, 20), (0.5, 0.1, 85), (1.0, 0.01, 150)):
        learned.progress.fill_(progress)
        torch.testing.assert_close(learned.matrix(), sinkhorn(learned.logits / tau, iterations))


@pytest.mark.parametrize("kind", ROUTERS)
def test_in_evaluation_labels_are_exchanged_and_nothing_else_changes(kind):
    router, x = ROUTERS[kind]().eval(), torch.randn(20, D)
    order = torch.tensor([3, 0, 4, 1, 2])  # label i → expert order[i]
    before = router(x, token_ids=IDS)
    after = PermuteLabels(router, permutation_of(order)).eval()(x, token_ids=IDS).validate()
    expected = before.experts.where(before.experts < 0, order[before.experts.clamp(min=0)])
    assert after.experts.equal(expected)
    assert after.weights.equal(before.weights)
    assert after.logits[:, order].equal(before.logits)
    assert after.scores[:, order].equal(before.scores)
    assert after.dropped[order].equal(before.dropped)
    if before.paths is not None:
        torch.testing.assert_close(after.paths, before.paths)


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind not in ("noisy top-k", "capacity")])
def test_a_sharp_relaxation_routes_as_its_rounding_does(kind):
    router = PermuteLabels(ROUTERS[kind](), permutation_of(torch.tensor([3, 0, 4, 1, 2])))
    x, mask = torch.randn(20, D), torch.arange(20) < 16
    soft = router.train()(x, token_ids=IDS, mask=mask).validate()
    hard = router.eval()(x, token_ids=IDS, mask=mask)
    torch.testing.assert_close(soft.weights_TE, hard.weights_TE)
    torch.testing.assert_close(soft.scores, hard.scores)
    finite = hard.logits.isfinite()
    torch.testing.assert_close(soft.logits[finite], hard.logits[finite], atol=1e-4, rtol=1e-4)
    assert soft.used_TE.equal(hard.used_TE)


@pytest.mark.parametrize("kind", ROUTERS)
def test_relaxed_weights_are_those_through_the_matrix_at_the_sum_they_had(kind):
    router = PermuteLabels(ROUTERS[kind](), LearnedPermutation(E, iterations=(3, 3)))
    torch.nn.init.normal_(router.permutation.logits)
    x = torch.randn(20, D)
    torch.manual_seed(1)
    inner = router.router(x, token_ids=IDS)
    torch.manual_seed(1)
    routing = router(x, token_ids=IDS).validate()
    mixed = inner.weights_TE @ router.permutation.matrix()
    expected = mixed / mixed.sum(1, keepdim=True).clamp(min=1e-9) * inner.weights.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_TE, expected)
    # and they teach both the router and the permutation
    (routing.weights_TE * torch.randn(20, E)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in router.parameters() if p.grad is not None)
    assert float(router.permutation.logits.grad.abs().sum()) > 0


def test_the_relaxation_leaves_padding_and_dropped_tokens_without_a_slot():
    router = PermuteLabels(LimitCapacity(Router(LinearScore(D, E), TopK(1)), 0.3))
    mask = torch.arange(20) < 15
    routing = router(torch.randn(20, D), mask=mask).validate()
    inner = router.router(torch.randn(20, D), mask=mask)
    assert int((inner.slots_per_token == 0).sum()) > 5
    assert set(routing.slots_per_token.tolist()) == {0, E}


@given(routings(max_experts=5, masked=True))
def test_hardening_keeps_any_routing_valid_and_its_total_weight(routing):
    relabel = PermuteLabels(Fixed(routing), LearnedPermutation(routing.num_experts))
    relabel.permutation.harden()
    after = relabel(torch.zeros(len(routing.experts), D)).validate()
    torch.testing.assert_close(after.weights.sum(1), routing.weights.sum(1))
    assert sorted(after.load.tolist()) == sorted(routing.load.tolist())


class Fixed(torch.nn.Module):
    def __init__(self, routing):
        super().__init__()
        self.routing, self.num_experts = routing, routing.num_experts

    def forward(self, x_TD, **context):
        return self.routing


def test_after_the_search_the_permutation_stays_and_learns_no_more():
    moe = MoE(PermuteLabels(Router(LinearScore(D, E), TopK(2))), MLPExperts(E, D, 4))
    learned, x = moe.router.permutation, torch.randn(30, D)
    torch.nn.init.normal_(learned.logits)
    rounded = learned.permutation
    evaluated = moe.eval()(x)[0]
    learned.harden()
    with torch.no_grad():
        learned.logits.normal_()
    assert learned.permutation.equal(rounded)
    learned.harden()
    assert learned.permutation.equal(rounded)
    y, routing = moe.train()(x)
    torch.testing.assert_close(y, evaluated)
    assert routing.slots_per_token.unique().tolist() == [2]
    y.sum().backward()
    assert learned.logits.grad.count_nonzero() == 0  # and not None, for which several processes would wait
    # a model that loads it has ended its search too
    other = MoE(PermuteLabels(Router(LinearScore(D, E), TopK(2))), MLPExperts(E, D, 4))
    other.load_state_dict(moe.state_dict())
    torch.testing.assert_close(other.train()(x)[0], evaluated)


def test_routers_of_several_tasks_may_share_a_permutation():
    shared = LearnedPermutation(E)
    first, second = (PermuteLabels(Router(LinearScore(D, E), TopK(1)), shared).eval() for _ in range(2))
    assert len(list(torch.nn.ModuleList([first, second]).parameters())) == 3
    assert first.permutation is second.permutation


def test_entropy_falls_from_the_even_matrix_to_a_permutation():
    even, permutation = torch.full((4, 4), 0.25), torch.eye(4)[[2, 0, 3, 1]]
    assert float(permutation_entropy(even)) == pytest.approx(2 * 4 * torch.tensor(4.0).log().item(), abs=1e-4)
    assert float(permutation_entropy(permutation)) == pytest.approx(0, abs=1e-4)
    unscaled = torch.tensor([[0.5, 0.25], [0.5, 0.75]], requires_grad=True)
    entropies = -(unscaled * unscaled.log()).sum()
    rows = unscaled / unscaled.sum(1, keepdim=True)
    torch.testing.assert_close(
        permutation_entropy(unscaled), entropies - (rows * rows.log()).sum(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LearnedPermutation(4, tau=(1.0, 0.0)), r"tau=\(1.0, 0.0\); both temperatures should be > 0"),
        (lambda: LearnedPermutation(4, iterations=(0, 9)), r"iterations=\(0, 9\); both should be at least 1"),
        (
            lambda: PermuteLabels(Router(LinearScore(D, E), TopK(2)), LearnedPermutation(4)),
            "the permutation is over 4 experts but the router over 5",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
