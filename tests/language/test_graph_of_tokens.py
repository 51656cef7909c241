from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from coterie.language.graph_of_tokens import graph_of_tokens, make_ffn
from coterie.models import Cache, Decoder, DecoderConfig, generate, to_transformers
from coterie.nn import MoE, Router, SimilarityAffinity, SwiGLUExperts, TopK, balance

CONFIG = DecoderConfig(
    37, dim=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=16, num_experts=6, top_k=2, expert_hidden=8
)
KINDS = {
    "similarity": {},
    "sharp similarity": {"tau": 0.5},
    "attention": {"affinity": "attention"},
    "learned heads": {"affinity": "attention", "heads": "learned"},
    "posterior heads": {"affinity": "attention", "heads": "posterior"},
}


def make(kind):
    return Decoder(CONFIG, make_ffn(CONFIG, **KINDS[kind])).eval()


@pytest.fixture
def ids():
    return torch.randint(37, (2, 15))


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_neither_routing_nor_logits_of_earlier_ones(kind, ids):
    model, changed = make(kind), ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 37
    (logits, routings), (others, other_routings) = model(ids), model(changed)
    torch.testing.assert_close(logits[:, :9], others[:, :9])
    for a, b in zip(routings, other_routings, strict=True):
        torch.testing.assert_close(a.scores.view(2, 15, -1)[:, :9], b.scores.view(2, 15, -1)[:, :9])
        assert not torch.allclose(a.scores, b.scores, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_for_real_tokens(kind, ids):
    model, mask = make(kind), torch.ones(2, 15, dtype=torch.bool)
    mask[1, 10:] = False
    (padded, routings), (alone, own) = model(ids, mask=mask), model(ids[1:, :10])
    torch.testing.assert_close(padded[1, :10], alone[0], atol=1e-5, rtol=1e-4)
    for a, b in zip(routings, own, strict=True):
        torch.testing.assert_close(a.scores[15:25], b.scores, atol=1e-5, rtol=1e-4)
        assert int(a.load.sum()) == 2 * 25


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_filled_in_pieces_routes_as_a_full_forward_pass(kind, ids):
    model, cache = make(kind), Cache(2)
    pieces = [model(ids[:, a:b], cache=cache) for a, b in ((0, 6), (6, 7), (7, 15))]
    logits, routings = model(ids)
    torch.testing.assert_close(torch.cat([p[0] for p in pieces], 1), logits, atol=1e-5, rtol=1e-4)
    for layer, routing in enumerate(routings):
        scores = torch.cat([p[1][layer].scores.view(2, -1, 6) for p in pieces], 1)
        torch.testing.assert_close(scores.view(-1, 6), routing.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["similarity", "attention"])
def test_generation_with_a_cache_is_generation_without(kind, ids):
    model, slow = make(kind), ids[:, :5]
    fast = torch.stack(list(generate(model, slow, 8)), 1)
    for _ in range(8):
        slow = torch.cat([slow, model(slow)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert fast.tolist() == slow[:, 5:].tolist()


def test_attention_routing_is_that_of_the_layers_attention_written_out(ids):
    model = Decoder(CONFIG, make_ffn(CONFIG, "attention")).double()
    layer, seen = model.layers[0], {}
    layer.mlp.register_forward_pre_hook(
        lambda moe, args, kwargs: seen.update(x=args[0], attention=kwargs["attention"]), with_kwargs=True
    )
    routing = model(ids)[1][0]
    plain = layer.mlp.router.score.score(seen["x"].flatten(0, 1)).softmax(-1).view(2, 15, 6)
    q, k = seen["attention"].q_BHSC, seen["attention"].k_BGPC
    for b in range(2):
        for i in range(15):
            mixed = torch.zeros(6, dtype=torch.float64)
            for h in range(4):
                weights = (k[b, h // 2, : i + 1] @ q[b, h, i] / 8**0.5).softmax(0)
                mixed += weights @ plain[b, : i + 1] / 4
            torch.testing.assert_close(routing.scores[15 * b + i], mixed)


def test_a_decoder_starts_with_w_at_the_identity_and_learns_it(ids):
    model = Decoder(CONFIG, make_ffn(CONFIG))
    offsets = [layer.mlp.router.score.affinity.offset for layer in model.layers]
    assert all(not bool(offset.any()) for offset in offsets)
    logits, routings = model(ids)
    (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + balance.load_balance(routings)
    ).backward()
    assert all(float(offset.grad.abs().sum()) > 0 for offset in offsets)


def test_only_the_decision_is_shared_never_the_input_or_output_of_an_expert():
    layer = graph_of_tokens(SwiGLUExperts(6, 16, 8), 16, SimilarityAffinity(16, causal=False))
    x = torch.randn(2, 5, 16)
    y, routing = layer(x)
    alone = [layer.experts(x.view(-1, 16)[t : t + 1], one_token(routing, t)) for t in range(10)]
    torch.testing.assert_close(y.view(-1, 16), torch.cat(alone))


def one_token(routing, t):
    fields = {name: getattr(routing, name)[t : t + 1] for name in ("experts", "weights", "scores", "logits")}
    return replace(routing, **fields)


def test_a_tiny_tau_is_the_plain_router():
    bank, x = SwiGLUExperts(6, 16, 8), F.normalize(torch.randn(2, 5, 16), dim=-1)
    layer = graph_of_tokens(bank, 16, SimilarityAffinity(16, causal=True, tau=1e-4))
    plain = MoE(Router(layer.router.score.score, TopK(2)), bank)
    assert torch.equal(layer(x)[0], plain(x)[0])


def test_the_balance_loss_is_on_the_scores_that_choose():
    layer = graph_of_tokens(SwiGLUExperts(6, 16, 8), 16, SimilarityAffinity(16, causal=False))
    x = torch.randn(1, 50, 16)
    _, routing = layer(x)
    score = layer.router.score
    mean_E = (score.affinity(x[0])[0] @ score.score(x[0]).softmax(-1)).mean(0)
    torch.testing.assert_close(balance.load_balance(routing), 6 * (routing.load / 100 * mean_E).sum())


def test_a_single_experts_weight_is_its_probability_and_teaches_the_router():
    layer = graph_of_tokens(SwiGLUExperts(6, 16, 8), 16, SimilarityAffinity(16, causal=True), top_k=1)
    y, routing = layer(torch.randn(2, 5, 16))
    torch.testing.assert_close(routing.weights[:, 0], routing.scores.max(-1).values)
    y.square().sum().backward()
    assert float(layer.router.score.score.weight.grad.abs().sum()) > 0


def test_detach_stops_what_the_router_teaches_attention_through_the_affinity(ids):
    grads = {}
    for detach in (False, True):
        torch.manual_seed(0)
        model = Decoder(CONFIG, make_ffn(CONFIG, "attention", detach=detach))
        balance.entropy(model(ids)[1][0]).backward()
        # not zero when detached: queries also shape the tokens that the router sees
        grads[detach] = model.layers[0].self_attn.q_proj.weight.grad
    assert not torch.allclose(grads[False], grads[True])


def test_a_checkpoint_of_transformers_cannot_hold_it():
    with pytest.raises(ValueError, match="layer 0 cannot be written"):
        to_transformers(make("attention"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affinity": "hyperbolic"}, "affinity='hyperbolic' with tau=None"),
        ({"affinity": "attention", "tau": 2.0}, 'use "similarity", which takes tau'),
        ({"affinity": "similarity", "heads": "learned"}, 'or "attention", which takes heads'),
        ({"affinity": "attention", "heads": "max"}, "heads='max'"),
        ({"tau": -1.0}, "tau=-1.0; should be > 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_ffn(CONFIG, **options)
