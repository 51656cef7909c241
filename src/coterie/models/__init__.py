"""Small reference backbones made of the core."""

from coterie.models.active import active_parameters, forward_flops
from coterie.models.cache import Cache
from coterie.models.checkpoint import from_transformers, load_pretrained, save_pretrained, to_transformers
from coterie.models.decoder import Decoder, DecoderConfig
from coterie.models.encoder import Encoder
from coterie.models.generate import generate
from coterie.models.saved import estimator_kind, load_estimator, new_folder, save_estimator
from coterie.models.tying import count_parameters, tie_depth, tied_modules
from coterie.models.vit import ViT, ViTConfig
from coterie.models.weights import load_weights, save_weights

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "ViT",
    "ViTConfig",
    "active_parameters",
    "count_parameters",
    "estimator_kind",
    "forward_flops",
    "from_transformers",
    "generate",
    "load_estimator",
    "load_pretrained",
    "load_weights",
    "new_folder",
    "save_estimator",
    "save_pretrained",
    "save_weights",
    "tie_depth",
    "tied_modules",
    "to_transformers",
]
