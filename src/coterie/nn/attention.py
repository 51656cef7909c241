"""Attention as a router may look at it.

Letters: B sequences, S positions of queries, P positions of keys (the S, and before those the earlier ones
when decoding with a cache), H heads, G key-value heads, C head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.nn.score import wide


@dataclass(eq=False)
class AttentionHeads:
    """What a router may ask of the attention before it. Nothing is computed before it asks.

    Args:
        q_BHSC: queries, as they enter the dot products.
        k_BGPC, v_BGPC: keys and values; H a multiple of G.
        o_proj_DN: [D, H · C] output projection.
        attend: bool, broadcasts to [B, H, S, P]: which position may attend to which; None for all.
        causal: a position attends to itself and earlier ones only.

    The arguments are those of `F.scaled_dot_product_attention`, whose result these probabilities give; there
    is no dropout in them.

    >>> heads = AttentionHeads(*torch.randn(3, 1, 2, 5, 4), torch.eye(8), causal=True)
    >>> bool(heads.probabilities().sum(-1).allclose(torch.ones(1, 2, 5)))
    True
    """

    q_BHSC: Tensor
    k_BGPC: Tensor
    v_BGPC: Tensor
    o_proj_DN: Tensor
    attend: Tensor | None = None
    causal: bool = False

    def probabilities(self) -> Tensor:
        """[B, H, S, P], at least float32."""
        q_BHSC, k_BHPC = wide(self.q_BHSC), wide(self._per_query_head(self.k_BGPC))
        logits_BHSP = q_BHSC @ k_BHPC.transpose(2, 3) * q_BHSC.shape[-1] ** -0.5
        length, positions = logits_BHSP.shape[2:]
        if self.causal:
            later = torch.ones(length, positions, dtype=torch.bool, device=q_BHSC.device).triu(1)
            logits_BHSP = logits_BHSP.masked_fill(later, -torch.inf)
        if self.attend is not None:
            logits_BHSP = logits_BHSP.masked_fill(~self.attend, -torch.inf)
        weights_BHSP: Tensor = logits_BHSP.softmax(-1)
        return weights_BHSP

    def head_outputs(self, weights_BHSP: Tensor) -> Tensor:
        """[B, H, S, D]: what each head adds to the attention's output, given its probabilities."""
        y_BHSC = weights_BHSP @ self._per_query_head(self.v_BGPC).to(weights_BHSP)
        o_proj_DHC = self.o_proj_DN.view(len(self.o_proj_DN), y_BHSC.shape[1], -1).to(y_BHSC)
        return torch.einsum("bhsc,dhc->bhsd", y_BHSC, o_proj_DHC)

    def _per_query_head(self, x_BGPC: Tensor) -> Tensor:
        return x_BGPC.repeat_interleave(self.q_BHSC.shape[1] // x_BGPC.shape[1], dim=1)
