import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import (
    CosineScore,
    Dense,
    ExpertChoice,
    HashRouter,
    InputJitter,
    LimitCapacity,
    LinearScore,
    LogitNoise,
    MaskExperts,
    MaskSlots,
    MixTokens,
    MLPScore,
    NoisyTopK,
    PermuteExperts,
    PreviousLogits,
    RandomRouter,
    ReferenceExpert,
    RemapScores,
    Router,
    Routing,
    SequenceRouter,
    SimilarityAffinity,
    Threshold,
    TopK,
    TopP,
    switch_router,
)

SCORES = {
    "linear": lambda: LinearScore(8, 6, bias=True),
    "cosine": lambda: CosineScore(8, 6, proj_dim=4),
    "mlp": lambda: MLPScore(8, 6, hidden=5),
    "noise": lambda: LogitNoise(LinearScore(8, 6), std=0.3),
    "jitter": lambda: InputJitter(LinearScore(8, 6), eps=0.1),
    "permuted": lambda: PermuteExperts(CosineScore(8, 6), torch.tensor([5, 3, 1, 0, 2, 4])),
    "remapped": lambda: RemapScores(LinearScore(8, 4), torch.rand(6, 4)),
    "reference": lambda: ReferenceExpert(LinearScore(8, 5)),
    "some": lambda: MaskExperts(LinearScore(8, 6), torch.tensor([True, False, True, True, False, True])),
    "residual": lambda: PreviousLogits(LinearScore(8, 6)),
    "mixed over tokens": lambda: MixTokens(LinearScore(8, 6), SimilarityAffinity(8, causal=False)),
}
SELECTS = {
    "top-k": lambda: TopK(2),
    "softmax before selection": lambda: TopK(3, renormalize=False, scale=2.5),
    "sigmoid, biased, grouped": lambda: TopK(
        2, gate="sigmoid", bias=torch.linspace(-1, 1, 6), groups=3, top_groups=2
    ),
    "signed": lambda: TopK(2, gate="identity", renormalize=False),
    "top-p": lambda: TopP(0.6, max_k=4),
    "threshold": lambda: Threshold(0.2),
    "expert choice": lambda: ExpertChoice(1.5),
    "dense": lambda: Dense(),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("select", SELECTS)
def test_any_scorer_with_any_selection_gives_a_valid_routing_that_honours_padding(score, select):
    router = Router(SCORES[score](), SELECTS[select]())
    x, mask = torch.randn(10, 8, requires_grad=True), torch.arange(10) < 7
    routing = router(x, mask=mask).validate()
    assert int(routing.load.sum()) > 0
    assert routing.mask is mask
    routing.weights.square().sum().backward()
    assert bool(x.grad[:7].isfinite().all())
    assert float(x.grad[7:].abs().sum()) == 0


@pytest.mark.parametrize("select", SELECTS)
def test_padding_does_not_change_where_the_other_tokens_go(select):
    router = Router(LinearScore(8, 6), SELECTS[select]()).eval()
    x, mask = torch.randn(10, 8), torch.arange(10) < 7
    padded, alone = router(x, mask=mask), router(x[:7])
    torch.testing.assert_close(padded.weights_TE[:7], alone.weights_TE)


@pytest.mark.parametrize("select", SELECTS)
@given(seed=st.integers(0, 1000))
def test_relabelling_experts_relabels_the_routing(select, seed):
    if "grouped" in select:
        return  # groups are defined by label
    torch.manual_seed(seed)
    score, order = LinearScore(8, 6), torch.randperm(6)
    x = torch.randn(10, 8)
    plain = Router(score, SELECTS[select]())(x)
    relabelled = Router(PermuteExperts(score, order), SELECTS[select]())(x)
    torch.testing.assert_close(relabelled.weights_TE, plain.weights_TE[:, order])


@given(seed=st.integers(0, 1000))
def test_reordering_tokens_reorders_the_routing(seed):
    torch.manual_seed(seed)
    router, x, order = Router(LinearScore(8, 6), TopP(0.7)), torch.randn(10, 8), torch.randperm(10)
    torch.testing.assert_close(router(x[order]).weights_TE, router(x).weights_TE[order])


@given(seed=st.integers(0, 1000), k=st.integers(1, 6))
def test_top_k_takes_the_largest_and_renormalised_weights_are_softmax_after_selection(seed, k):
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    routing = TopK(k)(logits)
    for row, experts, weights in zip(logits, routing.experts, routing.weights, strict=True):
        best = sorted(range(6), key=lambda e: -row[e].item())[:k]
        assert experts.tolist() == best
        torch.testing.assert_close(weights, row[best].softmax(-1))
        torch.testing.assert_close(weights, row.softmax(-1)[best] / row.softmax(-1)[best].sum())


def test_top_k_matches_deepseek_v3_router():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True, moe_intermediate_size=4, n_shared_experts=1,
    )  # fmt: skip
    block = DeepseekV3MoE(config)
    torch.nn.init.normal_(block.gate.weight)
    torch.nn.init.normal_(block.gate.e_score_correction_bias)
    x = torch.randn(20, 16)
    _, weights, experts = block.gate(x)
    select = TopK(
        3, gate="sigmoid", scale=2.5, bias=block.gate.e_score_correction_bias, groups=4, top_groups=2
    )
    score = LinearScore(16, 8)
    score.weight.data = block.gate.weight.data
    routing = Router(score, select)(x)
    theirs = torch.zeros(20, 8).scatter(1, experts, weights.float())
    torch.testing.assert_close(routing.weights_TE, theirs)


def test_a_selection_bias_changes_the_choice_and_not_the_weight():
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 5.0])
    routing = TopK(1, gate="sigmoid", renormalize=False, bias=bias)(logits)
    assert routing.experts.tolist() == [[2]]
    torch.testing.assert_close(routing.weights, torch.tensor([[-1.0]]).sigmoid())


def test_choosing_more_than_the_allowed_experts_leaves_slots_unused():
    score = MaskExperts(LinearScore(8, 6), torch.tensor([True] + [False] * 5))
    routing = Router(score, TopK(3))(torch.randn(4, 8)).validate()
    assert routing.experts.tolist() == [[0, -1, -1]] * 4
    torch.testing.assert_close(routing.weights[:, 0], torch.ones(4))


@given(seed=st.integers(0, 1000), p=st.floats(0.05, 1.0), max_k=st.integers(1, 6))
def test_top_p_takes_the_smallest_set_that_reaches_p(seed, p, max_k):
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    routing = TopP(p, max_k=max_k)(logits).validate()
    for row, experts in zip(logits.softmax(-1), routing.experts, strict=True):
        chosen = [e for e in experts.tolist() if e >= 0]
        reached = row[chosen].sum().item()
        assert 1 <= len(chosen) <= max_k
        assert chosen == sorted(range(6), key=lambda e: -row[e].item())[: len(chosen)]
        assert reached >= p - 1e-6 or len(chosen) == max_k
        assert reached - row[chosen[-1]].item() < p or len(chosen) == 1


def test_threshold_takes_at_least_the_best():
    logits = torch.tensor([[3.0, 2.0, -3.0], [-3.0, -2.0, -4.0]])
    assert Threshold(0.5, gate="sigmoid")(logits).slots_per_token.tolist() == [2, 1]
    assert Threshold(0.5, gate="sigmoid", min_k=0)(logits).slots_per_token.tolist() == [2, 0]
    assert Threshold(0.5, gate="sigmoid", max_k=1)(logits).slots_per_token.tolist() == [1, 1]


def test_expert_choice_gives_every_expert_its_best_tokens():
    logits = torch.randn(9, 3)
    routing = ExpertChoice(1.0)(logits).validate()
    scores = logits.softmax(-1)
    for e in range(3):
        assert set(routing.used_TE[:, e].nonzero().flatten().tolist()) == set(
            scores[:, e].topk(3).indices.tolist()
        )


def test_noisy_top_k_probability_is_the_share_of_draws_that_choose_the_expert():
    router = NoisyTopK(4, 5, k=2)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 4)
    torch.manual_seed(1)
    draws = [router(x) for _ in range(4000)]
    frequency = torch.stack([d.used_TE.float() for d in draws]).mean(0)
    estimate = torch.stack([d.choice_probability for d in draws]).mean(0)
    torch.testing.assert_close(estimate, frequency, atol=0.03, rtol=0)
    assert router.eval()(x).choice_probability is None


def test_noise_and_jitter_act_only_while_training():
    for score in (LogitNoise(LinearScore(8, 6), 1.0), InputJitter(LinearScore(8, 6), 0.5)):
        x = torch.randn(4, 8)
        assert not torch.equal(score(x), score(x))
        score.eval()
        torch.testing.assert_close(score(x), score.score(x))


def test_previous_logits_are_added_through_a_learned_map():
    score = PreviousLogits(LinearScore(8, 6), previous_experts=4)
    x, previous = torch.randn(5, 8), Routing.dense(torch.rand(5, 4))
    torch.testing.assert_close(score(x, previous=previous), score(x))
    torch.nn.init.normal_(score.weight)
    expected = score(x) + previous.logits @ score.weight.t()
    torch.testing.assert_close(score(x, previous=previous), expected)


def test_remapped_scores_are_the_matrix_times_the_scores():
    matrix = torch.rand(3, 6)
    matrix /= matrix.sum(0)
    score = RemapScores(LinearScore(8, 6), matrix)
    x = torch.randn(5, 8)
    torch.testing.assert_close(Router(score, Dense())(x).scores, score.score(x).softmax(-1) @ matrix.t())


def test_a_sequence_router_decides_once_per_sequence_and_ignores_padding():
    router = SequenceRouter(Router(LinearScore(8, 6), TopK(2)))
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    routing = router(x.view(10, 8), shape=(2, 5), mask=mask.view(10)).validate()
    alone = router(x[1, :3], shape=(1, 3))
    torch.testing.assert_close(routing.weights_TE.view(2, 5, 6)[1, :3], alone.weights_TE)
    assert len({tuple(e) for e in routing.experts[:5].tolist()}) == 1


def test_masked_slots_are_unused_and_a_float_mask_learns():
    strength = torch.tensor([1.0, 0.0], requires_grad=True)
    router = MaskSlots(Router(LinearScore(8, 6), TopK(2)), lambda x, r: strength.expand_as(r.weights))
    routing = router(torch.randn(4, 8)).validate()
    assert routing.slots_per_token.tolist() == [1] * 4
    routing.weights.sum().backward()
    assert float(strength.grad[0]) > 0
    rescaled = MaskSlots(
        Router(LinearScore(8, 6), TopK(2)),
        lambda x, r: torch.tensor([True, False]).expand_as(r.weights),
        renormalize=True,
    )
    torch.testing.assert_close(rescaled(torch.randn(4, 8)).weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("by", ["position", "weight"])
def test_limited_capacity_drops_what_exceeds_it(by):
    inner = Router(LinearScore(8, 6), TopK(2))
    routing = LimitCapacity(inner, 1.0, by=by)(torch.randn(30, 8)).validate()
    assert int(routing.load.max()) <= 10
    assert int((routing.load + routing.dropped).sum()) == 60


def test_hash_and_random_routers_choose_distinct_experts_with_equal_weights():
    ids = torch.tensor([3, 3, 7, 0])
    routing = HashRouter.random(10, 6, k=2)(torch.zeros(4, 8), token_ids=ids).validate()
    assert routing.experts[0].tolist() == routing.experts[1].tolist()
    assert routing.weights.unique().tolist() == [0.5]
    assert RandomRouter(6, k=3)(torch.zeros(50, 8)).validate().slots_per_token.unique().tolist() == [3]


def test_switch_routes_to_one_expert_with_its_probability():
    routing = switch_router(8, 4).eval()(torch.randn(5, 8)).validate()
    torch.testing.assert_close(routing.weights[:, 0], routing.scores.max(1).values)


def test_gates_compute_in_float32_under_autocast_and_in_bfloat16_models():
    router, x = Router(LinearScore(8, 6), TopK(2)), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router(x).logits, router(x.float()).logits, rtol=0, atol=0)
    low = router.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.logits.dtype == low.weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Router(LinearScore(8, 4), TopK(9)),
            "top_k=9 but the router has 4 experts; use 1 ≤ top_k ≤ 4",
        ),
        (lambda: Router(LinearScore(8, 4), TopK(0)), "top_k=0"),
        (lambda: NoisyTopK(8, 4, k=5), "top_k=5"),
        (lambda: RandomRouter(4, k=5), "top_k=5"),
        (lambda: TopP(0.0), "p=0.0; should lie in 0 < p ≤ 1"),
        (lambda: TopP(1.5), "p=1.5"),
        (lambda: Router(LinearScore(8, 4), TopP(0.5, max_k=5)), "max_k=5"),
        (lambda: Router(LinearScore(8, 4), TopK(1, groups=3)), "groups=3 does not divide 4"),
        (lambda: TopK(1, groups=2, top_groups=3), "top_groups=3"),
        (lambda: Router(LinearScore(8, 4), TopK(3, groups=2)), "2 experts in 1 of 2 groups"),
        (lambda: TopK(1, gate="relu"), "gate='relu' is not known; use one of softmax, sigmoid, identity"),
        (lambda: Router(LinearScore(8, 4), TopK(1, bias=torch.zeros(3))), "bias has 3 entries"),
        (lambda: Router(LinearScore(8, 4), Threshold(0.5, min_k=5)), "min_k=5"),
        (lambda: ExpertChoice(0.0), "capacity_factor=0.0"),
        (lambda: CosineScore(8, 4, temperature=0), "temperature=0"),
        (lambda: InputJitter(LinearScore(8, 4), 1.0), "eps=1.0"),
        (lambda: PermuteExperts(LinearScore(8, 3), torch.tensor([0, 0, 1])), "not a reordering"),
        (lambda: RemapScores(LinearScore(8, 3), torch.ones(2, 4)), r"should be \[E′, 3\]"),
        (lambda: RemapScores(LinearScore(8, 3), -torch.ones(2, 3)), "entries should be ≥ 0"),
        (lambda: MaskExperts(LinearScore(8, 3), torch.zeros(3, dtype=torch.bool)), "at least one"),
        (lambda: HashRouter(torch.tensor([0, 9]), 4), "table names experts 0 … 9"),
        (lambda: MLPScore(8, 4, hidden=4, activation="swish9"), "activation='swish9' is not known"),
    ],
)
def test_what_does_not_fit_is_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_tokens_are_refused_in_one_line():
    router = Router(LinearScore(8, 4), TopK(2))
    with pytest.raises(ValueError, match=r"tokens are torch.int64; a router takes floating point"):
        router(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens have shape \(3, 7\); this router takes \[T, 8\]"):
        router(torch.zeros(3, 7))
    bad = torch.zeros(3, 8)
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="logits hold NaN"):
        router(bad)
    with pytest.raises(ValueError, match="needs token_ids"):
        HashRouter(torch.tensor([0]), 1)(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="needs shape"):
        SequenceRouter(router)(torch.zeros(3, 8))


def test_a_previous_layer_of_another_size_is_refused():
    score = PreviousLogits(LinearScore(8, 6))
    with pytest.raises(ValueError, match="routed over 4 experts but this scorer maps 6"):
        score(torch.zeros(5, 8), previous=Routing.dense(torch.rand(5, 4)))


def test_capacity_for_training_only_drops_nothing_in_evaluation():
    router = LimitCapacity(Router(LinearScore(8, 6), TopK(2)), 0.5, training_only=True)
    assert int(router(torch.randn(30, 8)).dropped.sum()) > 0
    assert int(router.eval()(torch.randn(30, 8)).dropped.sum()) == 0


def test_a_dense_router_with_a_reference_expert_is_a_multinomial_logit():
    score = LinearScore(8, 1, bias=True)
    x = torch.randn(5, 8)
    weights = Router(ReferenceExpert(score), Dense())(x).weights
    torch.testing.assert_close(weights[:, 1], score(x)[:, 0].sigmoid())
    torch.testing.assert_close(weights.log().diff(dim=1), score(x))  # log odds against the reference
