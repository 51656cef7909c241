"""The reference decoder: a causal transformer whose feed-forward part is dense or a mixture of experts.

With its default router it computes exactly what transformers' Qwen3MoeForCausalLM does (Qwen3ForCausalLM
when dense), so its checkpoints are Hugging Face checkpoints (`coterie.models.checkpoint`). Read top to
bottom: configuration, decoder, layer, attention.

Letters: B sequences, S positions, D model width, H heads, C head width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models.cache import Cache, LayerCache
from coterie.nn import (
    AttentionHeads,
    DepthState,
    LinearScore,
    MoE,
    PlainResidual,
    Residual,
    Router,
    Routing,
    SwiGLU,
    SwiGLUExperts,
    TopK,
)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; a checkpoint stores them under transformers' names.

    Args:
        vocab_size: V.
        dim: D.
        layers: number of layers.
        heads: query heads H.
        kv_heads: key and value heads, a divisor of `heads`.
        head_dim: C, even.
        hidden: width of the dense feed-forward network (of layers without experts).
        num_experts: E; 0 makes a dense decoder.
        top_k: experts per token.
        expert_hidden: F, width inside an expert.
        max_len: longest sequence it is meant for (stored, not enforced).
        rope_theta: base of the rotary frequencies, as in transformers.
        norm_eps: of the RMS norms.
        tie_embeddings: the output matrix is the embedding.
        renormalize: top-k weights sum to one.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    num_experts: int = 0
    top_k: int = 2
    expert_hidden: int = 0
    max_len: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    renormalize: bool = True

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs")
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} but num_experts={self.num_experts}; use 1 ≤ top_k ≤ E")
        if self.num_experts and self.expert_hidden < 1:
            raise ValueError(f"expert_hidden={self.expert_hidden}; a decoder with experts needs their width")


class Decoder(nn.Module):
    """Token ids to next-token logits, with the routings of its MoE layers.

    Args:
        config: the sizes.
        make_ffn: layer index → feed-forward module, either x → y or, like `MoE`, x → (y, Routing).
            None builds the layers of `config`.
        make_residual: layer index → how its feed-forward part joins the residual stream, such as
            `MomentumResidual()`; the state begins anew in every forward. None adds it.

    Returns (from forward, for ids [B, S]): logits [B, S, V] and one Routing per MoE layer, over the B · S
    tokens in row-major order.

    >>> config = DecoderConfig(257, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=64,
    ...                        num_experts=4, top_k=2, expert_hidden=32)
    >>> logits, routings = Decoder(config)(torch.randint(257, (3, 10)))
    >>> logits.shape, len(routings), routings[0].experts.shape
    (torch.Size([3, 10, 257]), 2, torch.Size([30, 2]))
    """

    def __init__(
        self,
        config: DecoderConfig,
        make_ffn: Callable[[int], nn.Module] | None = None,
        make_residual: Callable[[int], Residual] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        make_ffn = make_ffn or (lambda layer: default_ffn(config))
        make_residual = make_residual or (lambda layer: PlainResidual())
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(config, make_ffn(i), make_residual(i)) for i in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._init_weights()

    def forward(
        self, ids_BS: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """See the class.

        Args:
            ids_BS: int64 token ids. With a cache, only the new ones.
            mask: bool [B, S], False for padding; padding is not attended to and uses no expert.
            cache: keys and values so far; filled in place.
        """
        if ids_BS.dim() != 2:
            raise ValueError(f"ids have shape {tuple(ids_BS.shape)}; should be [B, S]")
        if cache is not None and mask is not None:
            raise ValueError(
                "a cache and a padding mask together are not supported; generate unpadded batches"
            )
        start = 0 if cache is None else cache.length
        rotation = rotary_angles(start, ids_BS.shape[1], self.config, ids_BS.device)
        x_BSD = self.embed_tokens(ids_BS)
        routings: list[Routing] = []
        state: DepthState | None = None
        for i, layer in enumerate(self.layers):
            context = {"mask": mask, "token_ids": ids_BS, "previous": routings[-1] if routings else None}
            layer_cache = None if cache is None else cache.layers[i]
            x_BSD, routing, state = layer(x_BSD, rotation, layer_cache, context, state)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += ids_BS.shape[1]
        logits_BSV: Tensor = self.lm_head(self.norm(x_BSD))
        return logits_BSV, routings

    def num_parameters(self) -> int:
        """Parameters stored, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def _init_weights(self) -> None:
        # Width-scaled normal, and layers that write to the residual stream scaled down by depth (GPT-2).
        # A module that `keeps_init` needs its own start, such as a tree that is to begin undecided.
        kept = {
            id(p)
            for m in self.modules()
            if getattr(m, "keeps_init", False)
            for p in m.parameters(recurse=False)
        }
        for name, p in self.named_parameters():
            # a matrix that its module starts at zero stays there
            if p.dim() < 2 or id(p) in kept or not bool(p.any()):
                continue
            std = 0.02 if "embed" in name else p.shape[-1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std *= (2 * self.config.layers) ** -0.5
            nn.init.normal_(p, std=std)


def default_ffn(config: DecoderConfig) -> nn.Module:
    """The feed-forward part that `config` describes: SwiGLU, or top-k over SwiGLU experts."""
    if not config.num_experts:
        return SwiGLU(config.dim, config.hidden)
    router = Router(
        LinearScore(config.dim, config.num_experts), TopK(config.top_k, renormalize=config.renormalize)
    )
    return MoE(router, SwiGLUExperts(config.num_experts, config.dim, config.expert_hidden))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then ffn(norm(x)) joins by the layer's residual: x + ffn(norm(x)) if plain."""

    def __init__(self, config: DecoderConfig, ffn: nn.Module, residual: Residual) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp, self.residual = ffn, residual

    def forward(
        self,
        x_BSD: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        context: dict[str, Any],
        state: DepthState | None,
    ) -> tuple[Tensor, Routing | None, DepthState | None]:
        y_BSD, attention = self.self_attn(self.input_layernorm(x_BSD), rotation, cache, context["mask"])
        x_BSD = x_BSD + y_BSD
        context = context | {"attention": attention, "past": None if cache is None else cache.routing}
        h_BSD = self.post_attention_layernorm(self.residual.point(x_BSD, state))
        routing = None
        if isinstance(self.mlp, MoE):
            y_BSD, routing = self.mlp(h_BSD, **{k: v for k, v in context.items() if v is not None})
        else:
            y_BSD = self.mlp(h_BSD)
        x_BSD, state = self.residual(x_BSD, y_BSD, state)
        return x_BSD, routing, state


class Attention(nn.Module):
    """Grouped-query causal attention with RMS-normalised, rotated queries and keys."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        mask_BS: Tensor | None,
    ) -> tuple[Tensor, AttentionHeads]:
        batch, length, _ = x_BSD.shape
        q_BHSC = self.q_norm(self.q_proj(x_BSD).view(batch, length, self.heads, -1)).transpose(1, 2)
        k_BHSC = self.k_norm(self.k_proj(x_BSD).view(batch, length, self.kv_heads, -1)).transpose(1, 2)
        v_BHSC = self.v_proj(x_BSD).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        q_BHSC, k_BHSC = rotate(q_BHSC, rotation), rotate(k_BHSC, rotation)
        if cache is not None:
            k_BHSC, v_BHSC = cache.append(k_BHSC, v_BHSC)
        past = k_BHSC.shape[2] - length
        attend = None
        if past or mask_BS is not None:
            attend = torch.ones(length, past + length, dtype=torch.bool, device=x_BSD.device).tril(past)
        if mask_BS is not None and attend is not None:
            # a padded query attends to itself: a row with nothing to attend to would be NaN
            itself = torch.eye(length, dtype=torch.bool, device=x_BSD.device)
            attend = (attend & mask_BS.view(batch, 1, 1, length)) | itself
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC,
            k_BHSC,
            v_BHSC,
            attn_mask=attend,
            is_causal=attend is None,
            enable_gqa=self.heads != self.kv_heads,
        )
        y_BSD: Tensor = self.o_proj(y_BHSC.transpose(1, 2).reshape(batch, length, -1))
        return y_BSD, AttentionHeads(
            q_BHSC, k_BHSC, v_BHSC, self.o_proj.weight, attend, causal=attend is None
        )


def rotary_angles(
    start: int, length: int, config: DecoderConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, C] of positions start … start + length - 1, in float32."""
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = config.rope_theta ** -(pairs / config.head_dim)
    position = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x_BHSC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + C/2) of each head by their position's angles (Su et al. 2021)."""
    cos, sin = (r.to(x_BHSC.dtype) for r in rotation)
    first, second = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos + torch.cat((-second, first), dim=-1) * sin
