"""How fast two models are, one of them the other with something in its place, on the same machine."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def interleaved_speed(
    model: PreTrainedModel,
    changed: Callable[[], AbstractContextManager[None]],
    ids_BS: Tensor,
    *,
    rounds: int = 5,
) -> tuple[float, float]:
    """Tokens per second of forward passes, of the model and of the model inside `changed()`.

    They take turns, so that a machine that is busy for a while slows both; each is the median of the rounds.

    Args:
        model: in evaluation mode.
        changed: enters the other model, such as `partial(pruned, blocks, kept)`.
        ids_BS: one batch.
        rounds: of each; one more before them is not counted.

    >>> from contextlib import nullcontext
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)).eval()
    >>> before, after = interleaved_speed(model, nullcontext, torch.arange(8).view(1, 8), rounds=1)
    >>> before > 0, after > 0
    (True, True)
    """
    ids_BS = ids_BS.to(model.device)
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        whole = _seconds(model, ids_BS)
        with changed():
            seconds.append((whole, _seconds(model, ids_BS)))
    before, after = (ids_BS.numel() / statistics.median(each) for each in zip(*seconds[1:], strict=True))
    return before, after


def _seconds(model: PreTrainedModel, ids_BS: Tensor) -> float:
    began = time.perf_counter()
    model(ids_BS).logits.sum().item()  # which waits for a device to finish
    return time.perf_counter() - began
