"""What one token costs in a decoder, by what the routers really chose."""

from collections.abc import Sequence

from torch import nn

from coterie.models.decoder import Decoder
from coterie.models.tying import count_parameters
from coterie.nn import MoE, Routing, parameters_per_expert


def active_parameters(model: Decoder, routings: Sequence[Routing]) -> float:
    """Mean number of parameters that a token of these routings passed through.

    Embedding and output matrix count once each, or once together if they are tied; a layer counts as often as
    it is applied; of a bank, the experts of the used slots.

    Args:
        model: the decoder.
        routings: what its forward returned, one per MoE layer; for tokens of any number.

    Raises:
        ValueError: not one routing per MoE layer.

    >>> import torch
    >>> from coterie.models import DecoderConfig
    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, top_k=2, expert_hidden=32)
    >>> model = Decoder(config)
    >>> _, routings = model(torch.randint(257, (3, 10)))
    >>> model.num_parameters() - active_parameters(model, routings)  # 2 of 4 experts, in 2 layers
    12288.0
    """
    layers = [module for module in model.layers if isinstance(module.mlp, MoE)]
    if len(layers) != len(routings):
        raise ValueError(f"{len(routings)} routings for {len(layers)} MoE layers; give what forward returned")
    outside = {id(p): p.numel() for p in model.parameters()}
    for layer in model.layers:
        for parameter in layer.parameters():
            outside.pop(id(parameter), None)
    total = float(sum(outside.values()) + sum(count_parameters(layer) for layer in model.layers))
    for layer, routing in zip(layers, routings, strict=True):
        bank: nn.Module = layer.mlp.experts  # type: ignore[union-attr, assignment]
        used = routing.load.double() @ parameters_per_expert(bank).to(routing.load.device).double()
        total += float(used) / max(int(routing.num_tokens), 1) - count_parameters(bank)
    return total


def forward_flops(model: Decoder, routings: Sequence[Routing], seq_len: int) -> float:
    """Floating-point operations per token of a forward pass: two per active weight, and the attention scores.

    Embedding look-ups cost none; a token attends to seq_len / 2 others in the mean. Training takes three
    times as many.
    """
    config = model.config
    looked_up = 0 if config.tie_embeddings else model.embed_tokens.weight.numel()
    scores = 2 * config.layers * config.heads * config.head_dim * seq_len / 2
    return 2 * (active_parameters(model, routings) - looked_up + scores)
