"""Affinities: whom a token listens to, as rows of weights that sum to one. `MixTokens` averages by them.

Letters: B sequences, S positions, H heads, and P positions that can be listened to: the S, and before those
the earlier ones when decoding with a cache.

Source: Nguyen et al. 2025 (graph of tokens, arXiv 2505.00792).
"""

import math
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from coterie.nn.attention import AttentionHeads
from coterie.nn.score import wide

Past = dict[str, Tensor]


class Affinity(Protocol):
    """Who listens to whom: [B, S, P] weights ≥ 0 whose rows sum to one."""

    def __call__(self, x_TD: Tensor, **context: Any) -> Tensor: ...


class SimilarityAffinity(nn.Module):
    """A = softmax(U W Uᵀ / τ) over the tokens U that the router sees; W is learned, the identity at first.

    Args:
        dim: D, width of a token.
        causal: a token listens to itself and earlier ones only. Every language model needs True: otherwise
            later tokens leak into the routing of earlier ones.
        tau: τ > 0; None for √D. Larger, and all tokens of a sequence get the same experts; smaller, and each
            listens to itself alone.

    Costs O(S² D) per sequence. When decoding with a cache, earlier tokens are kept in `past`.

    Raises:
        ValueError: tau ≤ 0; decoding with a cache where causal is False.

    Source: Nguyen et al. 2025 (graph of tokens), similarity-aware MoE.

    >>> affinity = SimilarityAffinity(8, causal=True)
    >>> affinity(torch.randn(6, 8), shape=(2, 3))[0].triu(1).sum().item()
    0.0
    """

    def __init__(self, dim: int, *, causal: bool, tau: float | None = None) -> None:
        super().__init__()
        self.tau = math.sqrt(dim) if tau is None else tau
        if self.tau <= 0:
            raise ValueError(f"tau={tau}; should be > 0, such as √D = {math.sqrt(dim):.3g}")
        self.causal = causal
        # W less the identity: decay then pulls W to the identity, and a backbone that draws its matrices anew
        # leaves one that is zero alone
        self.offset = nn.Parameter(torch.zeros(dim, dim))

    def forward(
        self,
        x_TD: Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past: Past | None = None,
        **context: Any,
    ) -> Tensor:
        if past is not None and not self.causal:
            raise ValueError(
                "a cache keeps earlier decisions, which a similarity with causal=False would still change; "
                "use causal=True, or run without a cache"
            )
        u_TD = wide(x_TD)
        if mask is not None:  # padding may hold anything, and 0 · NaN is NaN
            u_TD = u_TD.masked_fill(~mask.unsqueeze(1), 0)
        batch, length = sequences(len(u_TD), shape)
        u_BSD = u_TD.view(batch, length, -1)
        u_BPD = with_past(past, "tokens", u_BSD)
        positions = u_BPD.shape[1]
        similarity_BSP = (u_BSD + u_BSD @ self.offset.to(u_BSD)) @ u_BPD.transpose(1, 2) / self.tau
        allowed = torch.ones(length, positions, dtype=torch.bool, device=u_BSD.device)
        if self.causal:
            allowed = allowed.tril(positions - length)
        if mask is not None or segment_ids is not None:
            allowed = allowed & may_listen(batch, length, mask, segment_ids, u_BSD.device)
        allowed = allowed | itself(length, positions, u_BSD.device)  # a row of nothing would be NaN
        return similarity_BSP.masked_fill(~allowed, -torch.inf).softmax(-1)


class AttentionAffinity(nn.Module):
    """A is the attention of the layer that the router belongs to: whom a token attends to, it listens to.

    Reads `attention: AttentionHeads` from the context; the reference decoder gives it. Causal where the
    attention is. Nothing more to keep when decoding with a cache.

    Args:
        num_heads: H.
        heads: how the heads' matrices become one. "mean"; "learned", weighted by a softmax of H scalars that
            start equal; or "posterior": the head is a latent variable with a uniform prior, and each token
            weighs head h by exp(-‖o - o_h‖² / 2σ²), where o_h is H times what the head adds to the
            attention's output, so that o is the mean of the o_h.
        sigma: σ > 0 of the posterior.

    Raises:
        ValueError: sigma ≤ 0 or an unknown `heads`; on call, no attention in the context, or one of another
            number of heads.

    Source: Nguyen et al. 2025 (graph of tokens), attention-aware MoE.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 4)
    >>> affinity = AttentionAffinity(num_heads=2, heads="learned")
    >>> affinity(torch.zeros(5, 8), attention=AttentionHeads(q, k, v, torch.eye(8))).shape
    torch.Size([1, 5, 5])
    """

    def __init__(
        self,
        num_heads: int,
        *,
        heads: Literal["mean", "learned", "posterior"] = "mean",
        sigma: float = 1.0,
    ) -> None:
        super().__init__()
        if heads not in ("mean", "learned", "posterior"):
            raise ValueError(f'heads={heads!r}; use "mean", "learned" or "posterior"')
        if sigma <= 0:
            raise ValueError(f"sigma={sigma}; should be > 0")
        self.num_heads, self.heads, self.sigma = num_heads, heads, sigma
        self.head_logits = nn.Parameter(torch.zeros(num_heads)) if heads == "learned" else None

    def forward(self, x_TD: Tensor, *, attention: AttentionHeads | None = None, **context: Any) -> Tensor:
        if attention is None:
            raise ValueError(
                "AttentionAffinity needs the layer's attention in the context; none was given. Fused "
                "attention keeps no probabilities: pass attention=AttentionHeads(q, k, v, o_proj), from "
                "which they are computed, or use SimilarityAffinity"
            )
        weights_BHSP = attention.probabilities()
        if weights_BHSP.shape[1] != self.num_heads:
            raise ValueError(f"attention has {weights_BHSP.shape[1]} heads; should have {self.num_heads}")
        if self.head_logits is not None:
            return torch.einsum("h,bhsp->bsp", self.head_logits.to(weights_BHSP).softmax(0), weights_BHSP)
        if self.heads == "mean":
            return weights_BHSP.mean(1)
        own_BHSD = self.num_heads * attention.head_outputs(weights_BHSP)
        distance_BHS = (own_BHSD - own_BHSD.mean(1, keepdim=True)).square().sum(-1)
        head_BHS = (-distance_BHS / (2 * self.sigma**2)).softmax(1)
        return torch.einsum("bhs,bhsp->bsp", head_BHS, weights_BHSP)


def sequences(tokens: int, shape: tuple[int, ...] | None, affinity: Tensor | None = None) -> tuple[int, int]:
    """(B, S) of T tokens. All leading dimensions but the last count sequences; without a shape, one."""
    batch, length = (1, tokens) if shape is None else (math.prod(shape[:-1]), shape[-1])
    if batch * length != tokens:
        found = f"shape is {shape}" if affinity is None else f"affinity has shape {tuple(affinity.shape)}"
        raise ValueError(f"{found}; should be of B sequences of S tokens with B · S = {tokens} tokens")
    return batch, length


def with_past(past: Past | None, name: str, new_BSX: Tensor) -> Tensor:
    """[B, P, …]: what `past` holds under the name, then what is new, which it holds from now on."""
    if past is None:
        return new_BSX
    past[name] = torch.cat([past[name], new_BSX], dim=1) if name in past else new_BSX
    return past[name]


def itself(length: int, positions: int, device: torch.device) -> Tensor:
    """[S, P] bool: the position of each token among those that can be listened to."""
    here_P = torch.arange(positions, device=device)
    return here_P == here_P[positions - length :].unsqueeze(1)


def may_listen(
    batch: int, length: int, mask: Tensor | None, segment_ids: Tensor | None, device: torch.device
) -> Tensor:
    """[B, S, S] bool: both are no padding, and of the same document."""
    allowed_BSS = torch.ones(batch, length, length, dtype=torch.bool, device=device)
    if mask is not None:
        mask_BS = mask.view(batch, length)
        allowed_BSS = allowed_BSS & mask_BS.unsqueeze(1) & mask_BS.unsqueeze(2)
    if segment_ids is not None:
        segment_BS = segment_ids.view(batch, length)
        allowed_BSS = allowed_BSS & (segment_BS.unsqueeze(1) == segment_BS.unsqueeze(2))
    return allowed_BSS
