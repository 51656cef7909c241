"""A small vision transformer: an image as a sequence of patches, read by the reference encoder.

Letters: B images, N patches, D model width, V classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coterie.models.encoder import Encoder
from coterie.nn import MLP, Routing


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    Args:
        image_size: height and width in pixels, multiples of `patch`.
        patch: height and width of a patch in pixels.
        classes: V.
        dim: D.
        layers: number of layers.
        heads: attention heads, a divisor of D.
        hidden: width of the dense feed-forward network.
        channels: of an image; 3 for colour.
        pool: what the classifier reads: "mean" of the patches, or a "class" token that stands before them.
        representation: put a tanh layer of width D before the classifier.
        dropout: of the embedded patches and of every residual branch, while training.
        norm_eps: of the layer norms.

    Raises ValueError when the patches do not tile the image.
    """

    image_size: tuple[int, int]
    patch: int
    classes: int
    dim: int
    layers: int
    heads: int
    hidden: int
    channels: int = 3
    pool: Literal["mean", "class"] = "mean"
    representation: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        height, width = self.image_size
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height} × {width} pixels are not tiled by patches of {self.patch}")
        if self.pool not in ("mean", "class"):
            raise ValueError(f'pool={self.pool!r}; use "mean" or "class"')

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        height, width = self.image_size
        return (height // self.patch) * (width // self.patch)


class ViT(nn.Module):
    """Images to class logits.

    Args:
        config: the sizes.
        make_ffn: layer index → feed-forward module, either x → y or, like `MoE`, x → (y, Routing). None for
            the dense network of `config`.

    Returns (from forward, for images [B, channels, height, width]): logits [B, V] and one Routing per MoE
    layer, over the tokens of all images, image by image.

    Source: Dosovitskiy et al. 2020 (ViT).

    >>> config = ViTConfig((8, 8), patch=2, classes=10, dim=24, layers=2, heads=4, hidden=48, channels=1)
    >>> logits, routings = ViT(config)(torch.rand(5, 1, 8, 8))
    >>> logits.shape, config.patches
    (torch.Size([5, 10]), 16)
    """

    def __init__(self, config: ViTConfig, make_ffn: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        c = self.config = config
        make_ffn = make_ffn or (lambda layer: MLP(c.dim, c.hidden))
        self.patch_embed = nn.Conv2d(c.channels, c.dim, c.patch, stride=c.patch)
        self.class_token = nn.Parameter(torch.zeros(c.dim)) if c.pool == "class" else None
        self.positions = nn.Embedding(c.patches + (c.pool == "class"), c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.encoder = Encoder(c.dim, c.layers, c.heads, make_ffn, dropout=c.dropout, norm_eps=c.norm_eps)
        self.representation = nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh()) if c.representation else None
        self.head = nn.Linear(c.dim, c.classes)
        nn.init.normal_(self.positions.weight, std=0.02)
        own: tuple[nn.Conv2d | nn.Linear, ...] = (self.patch_embed, self.head)
        for module in own:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's."""
        return self.encoder.layers

    def forward(self, images: Tensor) -> tuple[Tensor, list[Routing]]:
        x_BND, routings = self.encode(images)
        x_BD = x_BND.mean(1) if self.class_token is None else x_BND[:, 0]
        if self.representation is not None:
            x_BD = self.representation(x_BD)
        return self.head(x_BD), routings

    def encode(self, images: Tensor) -> tuple[Tensor, list[Routing]]:
        """The encoded patches [B, N, D], after the class token if there is one, and the routings."""
        expected = (self.config.channels, *self.config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; should be [B, {', '.join(map(str, expected))}]"
            )
        x_BND = self.patch_embed(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_BND = torch.cat([self.class_token.expand(len(images), 1, -1), x_BND], dim=1)
        x_BND = self.dropout(x_BND + self.positions.weight)
        encoded: tuple[Tensor, list[Routing]] = self.encoder(x_BND)
        return encoded
