"""Text generation with a key-value cache. Letters: B sequences, S positions, V vocabulary."""

from collections.abc import Iterator

import torch
from torch import Tensor

from coterie.models.cache import Cache
from coterie.models.decoder import Decoder


@torch.inference_mode()
def generate(
    model: Decoder,
    ids_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token ids [B], one position at a time, with a key-value cache.

    Args:
        ids_BS: the prompt, at least one token.
        max_new_tokens: how many to generate at most.
        temperature: 0 takes the most likely token.
        top_p: sample only from the smallest set of tokens that holds this probability.
        stop: end once every sequence has produced this token.
        generator: randomness for temperature > 0.

    >>> from coterie.models import DecoderConfig
    >>> config = DecoderConfig(257, dim=32, layers=1, heads=2, kv_heads=2, head_dim=16, hidden=64)
    >>> len(list(generate(Decoder(config), torch.tensor([[104, 105]]), 5)))
    5
    """
    if ids_BS.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token")
    model.eval()
    cache = Cache(len(model.layers))
    stopped_B = torch.zeros(ids_BS.shape[0], dtype=torch.bool, device=ids_BS.device)
    for _ in range(max_new_tokens):
        logits_BSV, _ = model(ids_BS, cache=cache)
        next_B = pick(logits_BSV[:, -1], temperature, top_p, generator)
        yield next_B
        if stop is not None:
            stopped_B |= next_B == stop
            if bool(stopped_B.all()):
                return
        ids_BS = next_B.unsqueeze(1)


def pick(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token id per row: the best, or a sample at `temperature` within the nucleus `top_p`."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    best = (logits_BV.float() / temperature).softmax(-1).sort(dim=-1, descending=True)
    outside = best.values.cumsum(-1) - best.values >= top_p
    choice_B1 = torch.multinomial(best.values.masked_fill(outside, 0), 1, generator=generator)
    return best.indices.gather(1, choice_B1).squeeze(1)
