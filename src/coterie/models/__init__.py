"""Small reference backbones made of the core."""

from coterie.models.active import active_parameters, forward_flops
from coterie.models.checkpoint import from_transformers, load_pretrained, save_pretrained, to_transformers
from coterie.models.decoder import Cache, Decoder, DecoderConfig
from coterie.models.generate import generate

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "active_parameters",
    "forward_flops",
    "from_transformers",
    "generate",
    "load_pretrained",
    "save_pretrained",
    "to_transformers",
]
