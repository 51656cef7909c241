"""Smaller checkpoints: which experts to keep, merge or store in fewer bits."""

from coterie.kernels import PackedWeight
from coterie.shrink.experts import QuantizedExperts
from coterie.shrink.gptq import HessianMean, gptq
from coterie.shrink.importance import IMPORTANCE, importance, kept_experts, mixed, overlap
from coterie.shrink.mask import load_mask, save_mask
from coterie.shrink.measure import Sizes, bytes_on_disk, interleaved_speed, perplexity, sizes
from coterie.shrink.merge import m_smoe
from coterie.shrink.prune import METHODS, Silenced, choose, least_output_error, no_reroute, prune, pruned
from coterie.shrink.quantize import awq, rtn

__all__ = [
    "IMPORTANCE",
    "METHODS",
    "HessianMean",
    "PackedWeight",
    "QuantizedExperts",
    "Silenced",
    "Sizes",
    "awq",
    "bytes_on_disk",
    "choose",
    "gptq",
    "importance",
    "interleaved_speed",
    "kept_experts",
    "least_output_error",
    "load_mask",
    "m_smoe",
    "mixed",
    "no_reroute",
    "overlap",
    "perplexity",
    "prune",
    "pruned",
    "rtn",
    "save_mask",
    "sizes",
]
