"""Tokens that listen to each other: a token's expert scores become a mean of other tokens' scores.

`MixTokens` stands between the scorer and the selection of a router:

    Router(MixTokens(LinearScore(64, 8), SimilarityAffinity(64, causal=True)), TopK(2))

Only decisions are shared: an expert still computes on the token's own vector. Letters as in
`coterie.nn.affinity`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from coterie.nn.affinity import Affinity, Past, itself, may_listen, sequences, with_past
from coterie.nn.score import Scorer, wide


class MixTokens(nn.Module):
    """Each token's expert distribution becomes a mean of the distributions of the tokens it listens to.

    R̄ = A · softmax(logits): probabilities are mixed, before selection. What comes out are logits whose
    softmax is R̄, so any selection with a softmax gate, and every loss on scores, sees the mixture. They are
    written as a change of the token's own logits: where A is the identity they are the scorer's, bit for bit.

    Args:
        score: the scorer to average.
        affinity: gives A from the tokens and the context, such as `SimilarityAffinity`; None reads
            `affinity` [B, S, S] (or [T, T]) from the context.
        detach: no gradient through A.

    Padding (`mask`) and other documents of a packed row (`segment_ids`) are never listened to; their share
    goes to the other tokens. A row that is left with nothing, or is all zeros, listens to itself. A causal
    model needs a causal A. When decoding with a cache, the scores of earlier positions are kept in `past`.

    Raises (from forward):
        ValueError: no affinity; one of another shape; a weight below 0 or a row that does not sum to one
            (within 1e-3, or 0); a mask or segment_ids together with `past`.

    Source: Nguyen et al. 2025 (graph of tokens), equation for R̄ = S R.

    >>> from coterie.nn import LinearScore
    >>> score, x = LinearScore(8, 4), torch.randn(3, 8)
    >>> bool((MixTokens(score)(x, affinity=torch.eye(3)) == score(x)).all())
    True
    """

    def __init__(self, score: Scorer, affinity: Affinity | None = None, *, detach: bool = False) -> None:
        super().__init__()
        self.score, self.affinity, self.detach = score, affinity, detach
        self.dim, self.num_experts = score.dim, score.num_experts

    def forward(
        self,
        x_TD: Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        affinity: Tensor | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past: Past | None = None,
        **context: Any,
    ) -> Tensor:
        if past is not None and not (mask is None and segment_ids is None):
            raise ValueError("a cache together with a mask or segment_ids is not supported by MixTokens")
        context |= {"shape": shape, "mask": mask, "segment_ids": segment_ids, "past": past}
        if self.affinity is not None:
            affinity = self.affinity(x_TD, **context)
        if affinity is None:
            raise ValueError("MixTokens needs affinity=[B, S, S] in the context; none was given")
        logits_TE = self.score(x_TD, affinity=affinity, **context)
        if mask is not None:  # padding may hold anything, and 0 · NaN is NaN
            logits_TE = logits_TE.masked_fill(~mask.unsqueeze(1), 0)
        scores_TE = logits_TE.softmax(-1)
        batch, length = sequences(len(x_TD), shape or affinity.shape[:-1], affinity)
        scores_BPE = with_past(past, "scores", scores_TE.view(batch, length, -1))
        weights_BSP = self._weights(affinity, batch, length, scores_BPE.shape[1], mask, segment_ids)
        mixed_TE = (weights_BSP.to(scores_BPE) @ scores_BPE).view_as(scores_TE)
        return _relative_log(mixed_TE, scores_TE, logits_TE)

    def _weights(
        self,
        affinity: Tensor,
        batch: int,
        length: int,
        positions: int,
        mask: Tensor | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """A with nothing but what may be listened to, rows summing to one again."""
        if affinity.dim() == 2:
            affinity = affinity.unsqueeze(0)
        if affinity.shape != (batch, length, positions):
            raise ValueError(
                f"affinity has shape {tuple(affinity.shape)}; should be [B, S, P] = "
                f"{(batch, length, positions)} for {batch} sequences of {length} tokens"
            )
        _check_rows(affinity, mask)
        weights_BSP = affinity.detach() if self.detach else affinity
        if mask is not None or segment_ids is not None:
            weights_BSP = weights_BSP.where(may_listen(batch, length, mask, segment_ids, affinity.device), 0)
            total_BS1 = weights_BSP.sum(-1, keepdim=True)
            weights_BSP = weights_BSP / total_BS1.where(total_BS1 > 0, 1)
        nothing_BS1 = weights_BSP.detach().sum(-1, keepdim=True) == 0
        return torch.where(nothing_BS1, itself(length, positions, affinity.device), weights_BSP)


def _relative_log(mixed_TE: Tensor, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
    """Logits whose softmax is `mixed`, as a change of `logits`, whose softmax is `scores`."""
    tiny = torch.finfo(scores_TE.dtype).tiny
    log_sum_T1 = logits_TE.logsumexp(-1, keepdim=True)
    log_mixed_TE = mixed_TE.clamp(min=tiny).log()
    with torch.no_grad():
        # a score that underflowed says no more than that it is below the smallest number
        own_TE = torch.where(scores_TE > tiny, logits_TE, log_sum_T1 + math.log(tiny))
        log_scores_TE = scores_TE.clamp(min=tiny).log()
    # in exact numbers this is log mixed + log Σ exp logits; its gradient is taken from there, since that of
    # log scores grows without bound for an expert that the token itself would never choose
    value_TE = own_TE + (log_mixed_TE - log_scores_TE) + (log_sum_T1 - log_sum_T1.detach())
    return value_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)


def _check_rows(affinity_BSP: Tensor, mask: Tensor | None) -> None:
    """Stops at rows that are no distribution. No synchronisation on a GPU."""
    total_BS = wide(affinity_BSP.detach()).sum(-1)
    tolerance = max(1e-3, torch.finfo(affinity_BSP.dtype).eps)  # bfloat16 keeps less than three digits
    good_BS = (((total_BS - 1).abs() <= tolerance) | (total_BS == 0)) & (affinity_BSP >= 0).all(-1)
    if mask is not None:
        good_BS = good_BS | ~mask.view_as(good_BS)
    message = "rows of affinity should hold weights ≥ 0 that sum to 1"
    if torch.compiler.is_compiling() or affinity_BSP.device.type != "cpu":
        torch._assert_async(good_BS.all(), message)
    elif not bool(good_BS.all()):
        bad = affinity_BSP[~good_BS][0]
        raise ValueError(
            f"a row of affinity sums to {float(bad.sum()):.4g} and holds {float(bad.min()):.4g}; {message}"
        )
