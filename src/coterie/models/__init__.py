"""Small reference backbones made of the core."""

from coterie.models.checkpoint import from_transformers, load_pretrained, save_pretrained, to_transformers
from coterie.models.decoder import Cache, Decoder, DecoderConfig
from coterie.models.generate import generate

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "from_transformers",
    "generate",
    "load_pretrained",
    "save_pretrained",
    "to_transformers",
]
