"""A Qwen3-MoE of a few thousand weights, and two texts that it can learn by heart in a second."""

import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LENGTH = 16


def tiny_moe(**sizes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 16,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "initializer_range": 0.1,
        "max_position_embeddings": 64,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options | sizes)).eval()


def two_texts(repeats=10):
    """Two tensors of ids [2 · repeats, 16]: the letters of each text are followed by the same ones always."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for first in (10, 100):
        lines = first + torch.stack([torch.randperm(40, generator=generator)[:LENGTH] for _ in range(2)])
        texts.append(lines.repeat(repeats, 1))
    return tuple(texts)


def memorised(steps=80):
    model = tiny_moe()
    ids = torch.cat([text[:2] for text in two_texts()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    return model


def arguments(checkpoint, texts, out, *more):
    """Of `coterie unlearn`, for `two_texts` in files."""
    sides = ["--forget", texts[0], "--retain", texts[1], "--seq-len", 16, "--batch-size", 4]
    return ["unlearn", checkpoint, *sides, "--out", out, "--lr", 3e-3, *more]
