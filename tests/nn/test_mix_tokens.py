import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn import (
    AttentionAffinity,
    AttentionHeads,
    Dense,
    LinearScore,
    MaskExperts,
    MixTokens,
    MLPExperts,
    MoE,
    PreviousLogits,
    Router,
    SimilarityAffinity,
    TopK,
    TopP,
    balance,
)

B, S, D, E = 2, 5, 8, 6
KINDS = ("similarity", "causal similarity", "attention")


def tokens(batch=B, length=S, dtype=torch.float32):
    return torch.randn(batch, length, D, dtype=dtype)


def affinity_of(kind):
    if kind == "attention":
        return AttentionAffinity(num_heads=2)
    return SimilarityAffinity(D, causal="causal" in kind)


def heads_of(x, mask=None):
    """Two heads of four that attend causally by the tokens themselves."""
    qkv = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
    length = x.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if mask is not None:
        allowed = (allowed & mask.view(-1, 1, 1, length)) | torch.eye(length, dtype=torch.bool)
    return AttentionHeads(qkv, qkv, qkv, torch.eye(D, dtype=x.dtype), allowed)


def layer_of(kind, k=2, **options):
    score = MixTokens(LinearScore(D, E), affinity_of(kind), **options)
    return MoE(Router(score, TopK(k)), MLPExperts(E, D, 4))


@pytest.mark.parametrize("select", [TopK(2), TopK(1, renormalize=False), TopP(0.6), Dense()])
@pytest.mark.parametrize("masked", [False, True])
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_tokens_that_listen_to_themselves_are_routed_as_without_mixing_bit_for_bit(
    select, masked, seed, scale
):
    torch.manual_seed(seed)
    score, bank, x = LinearScore(D, E), MLPExperts(E, D, 4), scale * tokens()
    mask = {"mask": torch.rand(B, S) < 0.7} if masked else {}
    y, plain = MoE(Router(score, select), bank)(x, **mask)
    mixed_y, mixed = MoE(Router(MixTokens(score), select), bank)(
        x, affinity=torch.eye(S).expand(B, S, S), **mask
    )
    assert torch.equal(mixed_y, y)
    for name in ("experts", "weights", "scores", "logits"):
        assert torch.equal(getattr(mixed, name), getattr(plain, name))


@given(seed=st.integers(0, 1000), sharpness=st.sampled_from([0.1, 1.0, 10.0]))
def test_scores_are_the_affinity_times_the_plain_scores_and_sum_to_one(seed, sharpness):
    torch.manual_seed(seed)
    x, affinity = tokens(), (sharpness * torch.randn(B, S, S)).softmax(-1)
    score = LinearScore(D, E)
    routing = MoE(Router(MixTokens(score), TopK(2)), MLPExperts(E, D, 4))(x, affinity=affinity)[1].validate()
    plain = score(x.double().view(-1, D)).softmax(-1).view(B, S, E)
    expected = torch.zeros(B, S, E, dtype=torch.float64)
    for b in range(B):
        for i in range(S):
            for j in range(S):
                expected[b, i] += affinity[b, i, j] * plain[b, j]
    torch.testing.assert_close(routing.scores.double(), expected.view(-1, E), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(B * S), atol=1e-6, rtol=0)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(B * S))


@given(seed=st.integers(0, 1000), sharpness=st.sampled_from([0.3, 3.0]), confidence=st.sampled_from([1, 10]))
def test_entropy_lies_between_that_of_the_tokens_listened_to_and_that_plus_the_affinitys(
    seed, sharpness, confidence
):
    torch.manual_seed(seed)
    x, affinity = confidence * tokens(1, dtype=torch.float64).view(S, D), torch.randn(S, S).double()
    affinity = (sharpness * affinity).softmax(-1)
    score = LinearScore(D, E)
    plain = balance.token_entropy(Router(score, Dense())(x))
    mixed = balance.token_entropy(Router(MixTokens(score), Dense())(x, affinity=affinity))
    lower = affinity @ plain
    assert bool((mixed >= lower - 1e-9).all())
    assert bool((mixed <= lower + torch.special.entr(affinity).sum(-1) + 1e-9).all())


@pytest.mark.parametrize("kind", ["causal similarity", "attention"])
@given(seed=st.integers(0, 100), t=st.integers(1, S - 1))
def test_a_causal_token_does_not_change_the_routing_of_earlier_ones(kind, seed, t):
    torch.manual_seed(seed)
    layer, x = layer_of(kind), tokens()
    changed = x.clone()
    changed[:, t] += 3
    before, after = (layer(h, attention=heads_of(h))[1].scores.view(B, S, E) for h in (x, changed))
    assert torch.equal(before[:, :t], after[:, :t])
    assert bool((before[:, t] != after[:, t]).any())


def test_a_similarity_that_is_not_causal_listens_both_ways():
    layer, x = layer_of("similarity"), tokens()
    changed = x.clone()
    changed[:, -1] += 3
    assert bool((layer(x)[1].scores != layer(changed)[1].scores).view(B, S, E)[:, 0].any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0.0, 1e4, torch.nan])
def test_padding_changes_nothing_whatever_it_holds(kind, padding):
    layer, x, mask = layer_of(kind), tokens(), torch.ones(B, S, dtype=torch.bool)
    mask[1, 3:] = False
    alone = layer(x[1:, :3], attention=heads_of(x[1:, :3]))[1]
    x = x.masked_fill(~mask.unsqueeze(-1), padding).requires_grad_()
    clean = x.detach().masked_fill(~mask.unsqueeze(-1), 0)  # attention has its own way with padding
    routing = layer.router(x.view(-1, D), shape=(B, S), mask=mask.view(-1), attention=heads_of(clean, mask))
    torch.testing.assert_close(routing.scores[S : S + 3], alone.scores)
    assert torch.equal(routing.experts[S : S + 3], alone.experts)
    assert routing.load.sum() == 2 * int(mask.sum())
    routing.weights.square().sum().backward()
    assert bool(x.grad.isfinite().all())
    assert float(x.grad[~mask].abs().sum()) == 0


def test_padding_is_left_out_of_a_given_affinity_and_its_share_goes_to_the_others():
    score, x = LinearScore(D, E), tokens(1, 3).view(3, D)
    mask = torch.tensor([True, True, False])
    affinity = torch.tensor([[0.3, 0.3, 0.4], [0.0, 0.0, 1.0], [torch.nan] * 3])
    scores = Router(MixTokens(score), Dense())(x, affinity=affinity, mask=mask).scores
    plain = score(x).softmax(-1)
    torch.testing.assert_close(scores[0], (plain[0] + plain[1]) / 2)
    torch.testing.assert_close(scores[1], plain[1])  # nothing is left to listen to but itself


def test_a_row_of_zeros_listens_to_itself():
    score, x = LinearScore(D, E), torch.randn(2, D)
    scores = MixTokens(score)(x, affinity=torch.tensor([[0.0, 0.0], [1.0, 0.0]])).softmax(-1)
    torch.testing.assert_close(scores, score(x)[[0, 0]].softmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_packed_in_a_row_do_not_listen_to_each_other(kind):
    layer, x = layer_of(kind), tokens(1, 6)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1]])
    packed = layer(x, segment_ids=segments, attention=heads_of(x))[1].scores
    if kind == "attention":  # the first document of a causal row is as if alone; the second renormalised
        full = heads_of(x).probabilities().mean(1)[:, 4:, 4:]
        second = layer.router.score
        plain = second.score(x[0, 4:]).softmax(-1)
        expected = (full / full.sum(-1, keepdim=True))[0] @ plain
    else:
        expected = layer(x[:, 4:])[1].scores
    torch.testing.assert_close(packed[:4], layer(x[:, :4], attention=heads_of(x[:, :4]))[1].scores)
    torch.testing.assert_close(packed[4:], expected)


def test_the_gradient_is_that_of_the_mixture():
    score = MixTokens(LinearScore(D, E).double(), SimilarityAffinity(D, causal=True).double())
    x = tokens(1, 3, torch.float64).view(3, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Router(score, Dense())(x).scores, (x,))
    assert torch.autograd.gradcheck(lambda x: score(x).logsumexp(-1), (x,))  # router z-loss


def test_an_expert_that_a_token_would_never_choose_is_chosen_for_it_and_has_a_finite_gradient():
    logits = torch.tensor([[0.0, -200.0], [-60.0, 0.0]], requires_grad=True)

    class Given(torch.nn.Module):
        dim, num_experts = None, 2

        def forward(self, x_TD, **context):
            return logits

    affinity = torch.tensor([[0.0, 1.0], [0.25, 0.75]])
    routing = Router(MixTokens(Given()), TopK(1, renormalize=False))(torch.zeros(2, 3), affinity=affinity)
    assert routing.experts.tolist() == [[1], [1]]
    torch.testing.assert_close(routing.scores, affinity @ logits.detach().softmax(-1))
    routing.weights.sum().backward()
    assert bool(logits.grad.isfinite().all())


def test_masked_experts_stay_masked_and_context_reaches_the_inner_scorer():
    inner = PreviousLogits(MaskExperts(LinearScore(D, E), torch.arange(E) != 2))
    x, previous = torch.randn(4, D), Router(LinearScore(D, E), TopK(1))(torch.randn(4, D))
    torch.nn.init.normal_(inner.weight)
    affinity = torch.rand(4, 4).softmax(-1)
    routing = Router(MixTokens(inner), TopK(E))(x, affinity=affinity, previous=previous).validate()
    assert routing.load[2] == 0
    expected = affinity @ inner(x, previous=previous).softmax(-1)
    torch.testing.assert_close(routing.scores, expected)


def test_detached_affinities_get_no_gradient_and_others_do():
    for detach in (False, True):
        layer, x = layer_of("similarity", detach=detach), tokens()
        layer(x)[0].square().sum().backward()
        grad = layer.router.score.affinity.offset.grad
        assert (grad is None) == detach
        assert detach or float(grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", ["causal similarity", "attention"])
def test_reading_a_sequence_in_pieces_routes_as_reading_it_at_once(kind):
    layer, x = layer_of(kind), tokens(length=9)
    whole, past, pieces = layer(x, attention=heads_of(x))[1], {}, []
    qkv, causal = heads_of(x), torch.ones(9, 9, dtype=torch.bool).tril()
    for a, b in ((0, 4), (4, 5), (5, 9)):
        heads = AttentionHeads(
            qkv.q_BHSC[:, :, a:b], qkv.k_BGPC[:, :, :b], qkv.v_BGPC[:, :, :b], qkv.o_proj_DN, causal[a:b, :b]
        )
        pieces.append(layer(x[:, a:b], attention=heads, past=past)[1].scores.view(B, b - a, E))
    torch.testing.assert_close(torch.cat(pieces, 1).view(-1, E), whole.scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_float_types_work_and_gates_keep_their_precision(kind, dtype):
    layer, x = layer_of(kind).to(dtype), tokens(dtype=dtype)
    y, routing = layer(x, attention=heads_of(x))
    assert y.dtype == dtype
    assert routing.scores.dtype == torch.promote_types(dtype, torch.float32)
    y.double().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_an_affinity_kept_in_bfloat16_is_taken():
    affinity = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).bfloat16()
    assert abs(float(affinity.float().sum(-1)[0]) - 1) > 1e-3
    MixTokens(LinearScore(D, E))(torch.randn(2, D), affinity=affinity)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({}, r"MixTokens needs affinity=\[B, S, S\] in the context; none was given"),
        (
            {"affinity": torch.eye(4)[:3].expand(2, 3, 4), "shape": (2, 3)},
            r"affinity has shape \(2, 3, 4\); should be \[B, S, P\] = \(2, 3, 3\)",
        ),
        (
            {"affinity": torch.eye(4), "shape": (2, 3)},
            r"affinity has shape \(1, 4, 4\); should be .*\(2, 3, 3\)",
        ),
        ({"affinity": torch.eye(4)}, r"affinity has shape \(4, 4\); .* B · S = 6 tokens"),
        ({"affinity": torch.full((6, 6), 0.2)}, r"a row of affinity sums to 1\.2 and holds 0\.2"),
        ({"affinity": torch.full((6, 6), torch.nan)}, "a row of affinity sums to nan"),
        ({"affinity": torch.eye(6) - torch.eye(6).roll(1, 1) + torch.eye(6).roll(2, 1)}, "holds -1;"),
        (
            {"affinity": torch.eye(6), "mask": torch.ones(6, dtype=torch.bool), "past": {}},
            "a cache together with a mask",
        ),
    ],
)
def test_an_affinity_that_is_none_is_refused(context, message):
    with pytest.raises(ValueError, match=message):
        Router(MixTokens(LinearScore(D, E)), TopK(2))(torch.zeros(6, D), **context)
