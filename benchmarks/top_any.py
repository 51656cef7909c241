"""Tokens per second when masks leave 4 of a token's 8 experts out, by experts implementation.

python -m benchmarks.top_any

A random Qwen3-MoE of 2 layers, 512 wide, 32 experts of width 384, all experts and masked by turns.
"""

from functools import partial

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.hf import PrefixMask, place_masks, unmasked
from coterie.shrink import interleaved_speed


def main() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=512,
        moe_intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    masks = {f"model.layers.{i}.mlp.experts": PrefixMask(512, 8) for i in range(2)}
    for mask in masks.values():
        mask.score.bias.data = 2.0 * (torch.arange(8) == 3)  # the first four stay
    place_masks(model, masks, renormalize=True)
    for batch, length, rounds in ((4, 512, 5), (1, 1, 50)):
        ids_BS = torch.randint(512, (batch, length))
        for implementation in ("grouped_mm", "coterie", "eager"):
            model.set_experts_implementation(implementation)
            masked, whole = interleaved_speed(model, partial(unmasked, model), ids_BS, rounds=rounds)
            print(
                f"{batch * length:5} tokens, {implementation:10}: {whole:6.0f} tokens/s, "
                f"masked {masked:6.0f}, {masked / whole:.2f} times"
            )


if __name__ == "__main__":
    main()
