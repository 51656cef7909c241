import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from coterie.nn import AttentionAffinity, AttentionHeads, SimilarityAffinity

D = 8


def attention(batch=2, heads=4, groups=2, length=5, positions=None, width=3, **options):
    """Random heads, and what torch's fused attention computes from them."""
    positions = positions or length
    q = torch.randn(batch, heads, length, width, dtype=torch.float64)
    k, v = torch.randn(2, batch, groups, positions, width, dtype=torch.float64)
    o_proj = torch.randn(D, heads * width, dtype=torch.float64)
    fused = F.scaled_dot_product_attention(
        q, k, v, attn_mask=options.get("attend"), is_causal=options.get("causal", False), enable_gqa=True
    )
    return AttentionHeads(q, k, v, o_proj, **options), fused.transpose(1, 2).flatten(2) @ o_proj.t()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"positions": 8, "attend": torch.ones(5, 8, dtype=torch.bool).tril(3)},
        {"groups": 4, "attend": (torch.arange(5) < torch.tensor([5, 3]).view(2, 1, 1, 1))},
    ],
)
def test_the_heads_outputs_by_their_probabilities_add_up_to_fused_attention(options):
    heads, fused = attention(**options)
    weights = heads.probabilities()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(heads.head_outputs(weights).sum(1), fused)


def test_probabilities_are_at_least_float32():
    q, k, v = torch.randn(3, 1, 2, 4, 3, dtype=torch.bfloat16)
    assert AttentionHeads(q, k, v, torch.zeros(D, 6)).probabilities().dtype == torch.float32


def test_similarity_is_the_softmax_of_scaled_dot_products_and_learns_a_bilinear_form():
    affinity, x = SimilarityAffinity(D, causal=False).double(), torch.randn(6, D, dtype=torch.float64)
    u = x.view(2, 3, D)
    torch.testing.assert_close(affinity(x, shape=(2, 3)), (u @ u.mT / math.sqrt(D)).softmax(-1))
    torch.nn.init.normal_(affinity.offset)
    w = torch.eye(D) + affinity.offset
    torch.testing.assert_close(affinity(x, shape=(2, 3)), (u @ w @ u.mT / math.sqrt(D)).softmax(-1))


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 100.0]), causal=st.booleans())
def test_similarity_rows_are_distributions_over_what_may_be_listened_to(seed, scale, causal):
    torch.manual_seed(seed)
    x, mask = scale * torch.randn(2, 7, D), torch.rand(14) < 0.6
    segments = torch.randint(3, (14,)).view(2, 7).sort(1).values
    weights = SimilarityAffinity(D, causal=causal)(
        x.view(-1, D), shape=(2, 7), mask=mask, segment_ids=segments.view(-1)
    )
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))
    m = mask.view(2, 7)
    for b in range(2):
        for i in range(7):
            for j in range(7):
                allowed = m[b, i] and m[b, j] and segments[b, i] == segments[b, j] and (j <= i or not causal)
                assert allowed or i == j or weights[b, i, j] == 0


def test_a_small_tau_listens_to_itself_and_a_large_one_to_all_alike():
    x = F.normalize(torch.randn(5, D), dim=-1)
    torch.testing.assert_close(SimilarityAffinity(D, causal=False, tau=1e-3)(x)[0], torch.eye(5))
    uniform = SimilarityAffinity(D, causal=False, tau=1e6)(x)[0]
    torch.testing.assert_close(uniform, torch.full((5, 5), 0.2), atol=1e-5, rtol=0)


def test_leading_dimensions_but_the_last_count_sequences():
    affinity, x = SimilarityAffinity(D, causal=True), torch.randn(2, 3, 4, D)
    deep = affinity(x.view(-1, D), shape=(2, 3, 4))
    torch.testing.assert_close(deep, affinity(x.view(-1, D), shape=(6, 4)))


def test_mean_and_untrained_learned_heads_are_the_mean_of_the_heads():
    heads, _ = attention(causal=True)
    mean = heads.probabilities().mean(1)
    for kind in ("mean", "learned"):
        torch.testing.assert_close(
            AttentionAffinity(4, heads=kind)(torch.zeros(10, D), attention=heads), mean
        )


def test_learned_heads_are_weighted_by_a_softmax():
    heads, affinity = attention()[0], AttentionAffinity(4, heads="learned")
    affinity.head_logits.data = torch.tensor([0.3, 0.1, 0.4, 0.2]).log()
    weights = heads.probabilities()
    expected = 0.3 * weights[:, 0] + 0.1 * weights[:, 1] + 0.4 * weights[:, 2] + 0.2 * weights[:, 3]
    result = affinity(torch.zeros(10, D), attention=heads)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    result.square().sum().backward()
    assert float(affinity.head_logits.grad.abs().sum()) > 0


def test_posterior_heads_are_weighed_by_how_near_their_output_is_to_the_attentions():
    heads, fused = attention(heads=2)
    weights = heads.probabilities()
    result = AttentionAffinity(2, heads="posterior", sigma=3.0)(torch.zeros(10, D), attention=heads)
    for b in range(2):
        for i in range(5):
            responsibility = []
            for h in range(2):
                value = weights[b, h, i] @ heads.v_BGPC[b, h]
                own = 2 * heads.o_proj_DN[:, 3 * h : 3 * h + 3] @ value
                responsibility.append(torch.exp(-(fused[b, i] - own).square().sum() / 18))
            expected = sum(r * weights[b, h, i] for h, r in enumerate(responsibility)) / sum(responsibility)
            torch.testing.assert_close(result[b, i], expected)


def test_a_sharp_posterior_is_the_nearest_head():
    heads, _ = attention(batch=1, heads=3, groups=3)
    weights = heads.probabilities()
    own = 3 * heads.head_outputs(weights)
    nearest = (own - own.mean(1, keepdim=True)).square().sum(-1).argmin(1)[0]
    result = AttentionAffinity(3, heads="posterior", sigma=1e-3)(torch.zeros(5, D), attention=heads)
    torch.testing.assert_close(result[0], weights[0, nearest, torch.arange(5)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SimilarityAffinity(D, causal=True, tau=0), r"tau=0; should be > 0, such as √D = 2\.83"),
        (lambda: SimilarityAffinity(D, causal=False)(torch.zeros(3, D), past={}), "use causal=True"),
        (lambda: SimilarityAffinity(D, causal=True)(torch.zeros(3, D), shape=(2, 2)), r"shape is \(2, 2\)"),
        (lambda: AttentionAffinity(2, heads="max"), 'heads=\'max\'; use "mean", "learned" or "posterior"'),
        (lambda: AttentionAffinity(2, sigma=0), "sigma=0; should be > 0"),
        (lambda: AttentionAffinity(2)(torch.zeros(3, D)), "Fused attention keeps no probabilities"),
        (
            lambda: AttentionAffinity(2)(torch.zeros(10, D), attention=attention()[0]),
            "attention has 4 heads; should have 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
