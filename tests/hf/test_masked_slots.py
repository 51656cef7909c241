"""Masked slots in every transformers family: an expert outside the mask has no say, whatever computes it."""

import pytest
import torch
from families import families, output, tiny_model

from coterie.hf import PrefixMask, find_moe_blocks, masks_of, place_masks, unmasked
from coterie.shrink.packed_blocks import bank_name

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def first_only(dim, k):
    mask = PrefixMask(dim, k)
    mask.score.bias.data = -torch.arange(float(k))
    return mask


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "experts"), families())
def test_a_masked_slot_counts_for_nothing(family, experts):
    model = tiny_model(family, experts)
    blocks = find_moe_blocks(model)
    with torch.no_grad():
        for block in blocks:
            for parameter in block.bank.parameters():
                parameter.normal_(std=0.2)

    def first_slot_by_weights(bank, args, kwargs):
        weights_TK = kwargs.get("top_k_weights", args[-1] if args else None)
        first_TK = torch.zeros_like(weights_TK).scatter(1, weights_TK.argmax(1, keepdim=True), 1.0)
        if "top_k_weights" in kwargs:
            return args, {**kwargs, "top_k_weights": weights_TK * first_TK}
        return (*args[:-1], weights_TK * first_TK), kwargs

    hooks = [b.bank.register_forward_pre_hook(first_slot_by_weights, with_kwargs=True) for b in blocks]
    model.set_experts_implementation("eager")
    expected = output(model, IDS)
    for hook in hooks:
        hook.remove()
    masks = {bank_name(b): first_only(b.experts.up.shape[-1], b.top_k) for b in blocks}
    place_masks(model, masks, renormalize=False)
    assert masks_of(model).keys() == masks.keys()
    for implementation in ("eager", "grouped_mm", "coterie"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(output(model, IDS), expected, rtol=1e-4, atol=1e-5)
    with unmasked(model):
        same = torch.allclose(output(model, IDS), expected, rtol=1e-4, atol=1e-5)
        assert same == (blocks[0].top_k == 1)
