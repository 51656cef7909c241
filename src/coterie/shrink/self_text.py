"""Calibration text that a model writes itself.

text = ebss(model, n=128, length=512)
usage = expert_usage(model, [text.ids_NS])
print(text.nll_N.mean(), balance_sigma(usage))

Letters: N sentences, W branches of each, S tokens, V vocabulary, L blocks, E experts of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.hf import find_moe_blocks
from coterie.shrink.usage import balance_sigma, counting, to_shares

FirstToken = Literal["vocab", "bos"] | Sequence[int]
DRAWS = 2  # continuations that expand="sample" draws of each branch


@dataclass(eq=False)
class SelfText:
    """What a model wrote.

    Args:
        ids_NS: token ids, all sentences of one length; an end-of-text token does not end one.
        nll_N: mean negative log-likelihood of a sentence's tokens after the first, nats per token.
    """

    ids_NS: Tensor
    nll_N: Tensor


def self_sample(
    model: PreTrainedModel,
    n: int,
    length: int,
    *,
    first_token: FirstToken = "vocab",
    batch_size: int = 16,
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> SelfText:
    """Text drawn token by token from the model's distribution; the baseline of `ebss`.

    Args:
        model: as of `ebss`, like all that is not named here.
        n: see there.
        length: see there.
        first_token: see there.
        batch_size: see there.
        seed: see there.
        on_batch: see there.

    Raises ValueError as `ebss`.
    """
    draw = torch.Generator().manual_seed(seed)
    first_N = first_tokens(model, n, length, first_token, batch_size, draw)
    return _joined(
        [_sampled(model, ids_N, length, draw, on_batch) for ids_N in torch.split(first_N, batch_size)]
    )


def ebss(
    model: PreTrainedModel,
    n: int,
    length: int,
    *,
    width: int = 4,
    tau: float = 1.2,
    first_token: FirstToken = "vocab",
    expand: Literal["topk", "sample"] = "topk",
    balance_scope: Literal["sentence", "set"] = "sentence",
    batch_size: int = 16,
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> SelfText:
    """Expert-balanced self-sampling: a beam search for likely text that uses all experts.

    A continuation v of a branch S scores -(log P(S) + log P(v | S)) / (tokens of S v) + sigma(S) / tau; the
    `width` lowest scores of a sentence stay. sigma is that of the branch that is continued, since which
    experts v uses is only known once the model has read it.

    Args:
        model: of transformers, in evaluation mode, with MoE blocks.
        n: sentences.
        length: tokens of a sentence.
        width: branches that are kept of a sentence.
        tau: the larger, the less balance counts. Sigma is about 0.01 to 0.05: at 1.2 it decides near ties.
        first_token: uniform over the vocabulary; the model's beginning of text; or uniform over these ids.
            A beam from few starts repeats itself.
        expand: "topk" looks at every continuation; "sample" at two drawn from P for each branch, whose text
            is more varied.
        balance_scope: whose usage sigma is of: the branch's, or that of it and all batches before.
        batch_size: sentences at a time; width times as many rows run at once.
        seed: of all that is drawn.
        on_batch: called after each batch.

    Returns the branch with the lowest score of each sentence.

    Raises ValueError for sizes that make no sense, a length beyond the model's positions, a first token
    outside the vocabulary, a model without MoE blocks, or one that keeps no cache of keys and values.

    Source: MoEQuant (2025, arXiv 2505.03804), section 3.2; expand="sample" and balance_scope="set" are ours.
    """
    if width < 1 or not tau > 0:
        raise ValueError(f"width={width} and tau={tau}; use width ≥ 1 and tau > 0")
    if expand not in ("topk", "sample") or balance_scope not in ("sentence", "set"):
        raise ValueError(
            f"expand={expand!r}, balance_scope={balance_scope!r}; use topk or sample, and sentence or set"
        )
    draw = torch.Generator().manual_seed(seed)
    first_N = first_tokens(model, n, length, first_token, batch_size, draw)
    written = [torch.zeros(block.num_experts) for block in find_moe_blocks(model)]
    parts = []
    for ids_N in torch.split(first_N, batch_size):
        before = written if balance_scope == "set" else [torch.zeros_like(c) for c in written]
        sampler = draw if expand == "sample" else None
        text, counts = _searched(model, ids_N, length, width, tau, before, sampler)
        written = [old + new for old, new in zip(written, counts, strict=True)]
        parts.append(text)
        on_batch()
    return _joined(parts)


@torch.no_grad()
def _searched(
    model: PreTrainedModel,
    first_N: Tensor,
    length: int,
    width: int,
    tau: float,
    before: list[Tensor],
    draw: torch.Generator | None,
) -> tuple[SelfText, list[Tensor]]:
    """Beam search from these first tokens, and how often what it gives used the experts of each block."""
    n, blocks = len(first_N), find_moe_blocks(model)
    ids_NWS, logp_NW = first_N.view(n, 1, 1), torch.zeros(n, 1)
    used = [torch.zeros(n, 1, block.num_experts) for block in blocks]
    read = _Reader(model)
    with counting(blocks) as counts:
        for tokens in range(2, length + 1):
            branches = ids_NWS.shape[1]
            next_NWV = read(ids_NWS[..., -1].flatten()).view(n, branches, -1)
            found = [count.view(n, branches, -1) for count in counts(n * branches)]
            used = [old + new for old, new in zip(used, found, strict=True)]
            usage = [to_shares(mine + others) for mine, others in zip(used, before, strict=True)]
            sigma_NW = balance_sigma(usage)
            score_NWV = -(logp_NW.unsqueeze(2) + next_NWV) / tokens + sigma_NW.unsqueeze(2) / tau
            if draw is not None:
                drawn = torch.multinomial(next_NWV.exp().flatten(0, 1), DRAWS, generator=draw)
                outside = torch.ones_like(score_NWV, dtype=torch.bool)
                outside.scatter_(2, drawn.view(n, branches, -1), False)
                score_NWV = score_NWV.masked_fill(outside, torch.inf)
            candidates = branches * (score_NWV.shape[2] if draw is None else DRAWS)
            best_NW = score_NWV.flatten(1).topk(min(width, candidates), largest=False).indices
            parent_NW, token_NW = best_NW // score_NWV.shape[2], best_NW % score_NWV.shape[2]
            logp_NW = (logp_NW.unsqueeze(2) + next_NWV).flatten(1).gather(1, best_NW)
            rows_NW = torch.arange(n).unsqueeze(1) * branches + parent_NW
            ids_NWS = torch.cat((ids_NWS.flatten(0, 1)[rows_NW], token_NW.unsqueeze(2)), 2)
            used = [count.flatten(0, 1)[rows_NW] for count in used]
            read.reorder(rows_NW.flatten())
    text = SelfText(ids_NWS[:, 0], -logp_NW[:, 0] / (length - 1))
    return text, [count[:, 0].sum(0) for count in used]


@torch.no_grad()
def _sampled(
    model: PreTrainedModel, first_N: Tensor, length: int, draw: torch.Generator, on_batch: Callable[[], None]
) -> SelfText:
    ids_NS, logp_N, read = first_N.unsqueeze(1), torch.zeros(len(first_N)), _Reader(model)
    while ids_NS.shape[1] < length:
        next_NV = read(ids_NS[:, -1])
        token_N1 = torch.multinomial(next_NV.exp(), 1, generator=draw)
        logp_N = logp_N + next_NV.gather(1, token_N1).squeeze(1)
        ids_NS = torch.cat((ids_NS, token_N1), 1)
    on_batch()
    return SelfText(ids_NS, -logp_N / (length - 1))


class _Reader:
    """Reads rows of text one token at a time, with what it read before in the model's cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.past: dict[str, Any] = {}

    def __call__(self, ids_R: Tensor) -> Tensor:
        """[R, V] log-probabilities of what comes next, float32 on the CPU."""
        ids_R1 = ids_R.unsqueeze(1).to(self.model.device)
        output = self.model(ids_R1, **self.past, use_cache=True)
        # the argument goes by the name that the output has: transformers is changing it
        self.past = {name: output[name] for name in list(output) if name in ("cache", "past_key_values")}
        if len(self.past) != 1:
            raise ValueError(f"{type(self.model).__name__} keeps no cache of keys and values to write with")
        logp_RV: Tensor = output.logits[:, -1].float().log_softmax(-1).cpu()
        return logp_RV

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row `rows[i]` was."""
        for cache in self.past.values():
            cache.reorder_cache(rows.to(self.model.device))


def first_tokens(
    model: PreTrainedModel,
    n: int,
    length: int,
    first: FirstToken,
    batch_size: int,
    draw: torch.Generator,
) -> Tensor:
    """The first token of each sentence, [N]; no weight of the model is read.

    Args:
        model: as of `ebss`, like n, length, and batch_size.
        n: see there.
        length: see there.
        first: its `first_token`.
        batch_size: see there.
        draw: is drawn from.

    Raises ValueError as `ebss` for all of these.
    """
    config = model.config.get_text_config()
    if n < 1 or length < 2 or batch_size < 1:
        raise ValueError(
            f"n={n}, length={length}, batch_size={batch_size}; use n ≥ 1, length ≥ 2, batches ≥ 1"
        )
    if length > config.max_position_embeddings:
        raise ValueError(f"length={length}, but the model has positions for {config.max_position_embeddings}")
    if first == "vocab":
        return torch.randint(config.vocab_size, (n,), generator=draw)
    if first == "bos" and config.bos_token_id is None:
        raise ValueError(
            'first_token="bos", but the model has no beginning-of-text token; use "vocab" or ids'
        )
    if isinstance(first, str) and first != "bos":
        raise ValueError(f'first_token={first!r}; use "vocab", "bos" or a list of ids')
    ids = torch.tensor([config.bos_token_id] if isinstance(first, str) else list(first))
    if not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise ValueError(f"first_token holds ids outside the vocabulary of {config.vocab_size}, or none")
    return ids[torch.randint(len(ids), (n,), generator=draw)]


def _joined(parts: Sequence[SelfText]) -> SelfText:
    return SelfText(torch.cat([part.ids_NS for part in parts]), torch.cat([part.nll_N for part in parts]))
