"""The reference encoder: a bidirectional pre-norm transformer over tokens of any kind.

Its feed-forward parts are dense or a mixture of experts, as in the decoder. What makes tokens of images,
sounds or tables, and what reads them afterwards, is the business of the model around it (`ViT`).

Letters: B sequences, S positions, D model width, H heads, C head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn import MoE, Routing


class Encoder(nn.Module):
    """Tokens to tokens, each informed by all the others.

    Args:
        dim: D.
        layers: how many.
        heads: H, a divisor of D.
        make_ffn: layer index → feed-forward module, either x → y or, like `MoE`, x → (y, Routing).
        dropout: of what each attention and each feed-forward part adds, while training.
        norm_eps: of the layer norms.

    Returns (from forward, for x [B, S, D]): the normalised tokens [B, S, D] and one Routing per MoE layer,
    over the B · S tokens in row-major order.

    Source: Vaswani et al. 2017, with the norms first (Xiong et al. 2020).

    >>> from coterie.nn import MLP
    >>> encoder = Encoder(16, layers=2, heads=4, make_ffn=lambda layer: MLP(16, 32))
    >>> x, routings = encoder(torch.randn(3, 10, 16))
    >>> x.shape, routings
    (torch.Size([3, 10, 16]), [])
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        heads: int,
        make_ffn: Callable[[int], nn.Module],
        *,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, make_ffn(i), dropout=dropout, norm_eps=norm_eps) for i in range(layers)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x_BSD: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """See the class.

        Args:
            x_BSD: the tokens, with their positions.
            mask: bool [B, S], False for padding; padding is not attended to and uses no expert.
        """
        routings: list[Routing] = []
        for layer in self.layers:
            x_BSD, routing = layer(x_BSD, mask, routings[-1] if routings else None)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BSD), routings


class EncoderLayer(nn.Module):
    """x + attention(norm1(x)), then x + ffn(norm2(x))."""

    def __init__(self, dim: int, heads: int, ffn: nn.Module, *, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.self_attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None, previous: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.dropout(self.self_attn(self.norm1(x_BSD), mask_BS))
        h_BSD = self.norm2(x_BSD)
        if not isinstance(self.mlp, MoE):
            return x_BSD + self.dropout(self.mlp(h_BSD)), None
        context = {"mask": mask_BS, "previous": previous}
        y_BSD, routing = self.mlp(h_BSD, **{k: v for k, v in context.items() if v is not None})
        return x_BSD + self.dropout(y_BSD), routing


class SelfAttention(nn.Module):
    """Multi-head attention in both directions, with biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        batch, length, _ = x_BSD.shape
        q_BHSC, k_BHSC, v_BHSC = (
            projection(x_BSD).view(batch, length, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = None
        if mask_BS is not None:
            # a padded query attends to itself: a row with nothing to attend to would be NaN
            itself = torch.eye(length, dtype=torch.bool, device=x_BSD.device)
            attend = mask_BS.view(batch, 1, 1, length) | itself
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, attn_mask=attend)
        y_BSD: Tensor = self.o_proj(y_BHSC.transpose(1, 2).flatten(2))
        return y_BSD
