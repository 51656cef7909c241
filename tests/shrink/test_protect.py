"""Tokens that others attend to keep all their experts."""

import pytest
import torch

from coterie.hf import find_moe_blocks
from coterie.shrink import attention_received, protected, top_any, weight_ratio
from coterie.shrink.protect import Attention, gives_attention

IDS = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model):
    return model(IDS, output_attentions=True)


def test_attention_received_is_the_mean_over_heads_and_the_queries_that_see_a_token(model):
    model.set_attn_implementation("eager")
    with attention_received([block.layer for block in find_moe_blocks(model)]) as received:
        attentions = run(model).attentions
    for record, weights_BHSS in zip(received, attentions, strict=True):
        expected = [
            sum(weights_BHSS[b, h, i, j].item() for h in range(2) for i in range(j, 16)) / (2 * (16 - j))
            for b in range(3)
            for j in range(16)
        ]
        assert record.mean_T.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_most_important_tokens_keep_what_the_rule_would_drop():
    x_TD = torch.ones(100, 4)
    x_TD[7] = -5  # long, and with less attention than 50
    attention = Attention(torch.ones(100))
    attention.mean_T[50] = 3
    drop_all_but_first = weight_ratio(1.0)
    weights_TK = torch.tensor([[0.6, 0.4]]).expand(100, 2)
    kept_TK = protected(drop_all_but_first, attention)(x_TD, weights_TK)
    assert kept_TK[:, 0].sum() == 100
    assert kept_TK[:, 1].nonzero().flatten().tolist() == [7, 50]


def test_a_share_of_the_tokens_is_protected_in_every_layer(model):
    model.set_attn_implementation("eager")
    blocks = find_moe_blocks(model)
    with attention_received([block.layer for block in blocks]) as received:
        masks = [protected(weight_ratio(1.0), attention, share=0.25) for attention in received]
        with top_any([block.bank for block in blocks], masks, renormalize=True) as kept:
            run(model)
    assert [(k.slots, k.kept) for k in kept] == [(96, 48 + 12)] * 2


def test_what_is_missing_is_said(model):
    blocks = find_moe_blocks(model)
    model.set_attn_implementation("sdpa")
    with (
        attention_received([blocks[0].layer]),
        pytest.raises(ValueError, match=r'call model.set_attn_implementation\("eager"\) first'),
        torch.no_grad(),
    ):
        model(IDS)
    with pytest.raises(ValueError, match="attention to 0 tokens is known, but the block has 5"):
        protected(weight_ratio(1.0), Attention())(torch.ones(5, 4), torch.ones(5, 2))


def test_which_layers_give_attention_weights_is_found_out(model):
    layers = [block.layer for block in find_moe_blocks(model)]
    model.set_attn_implementation("eager")
    assert gives_attention(model, layers, IDS)
    model.set_attn_implementation("sdpa")
    assert not gives_attention(model, layers, IDS)
    del layers[0].self_attn  # as in a layer of another kind
    assert not gives_attention(model, layers, IDS)


def test_attention_to_summaries_of_tokens_is_not_attention_to_tokens(model):
    layers = [block.layer for block in find_moe_blocks(model)]
    model.set_attn_implementation("eager")
    layers[1].self_attn.register_forward_hook(lambda m, args, y: (y[0], torch.cat((y[1], y[1]), -1)))
    assert not gives_attention(model, layers, IDS)
