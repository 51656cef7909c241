"""Smaller checkpoints: which experts to keep, merge or store in fewer bits."""

from coterie.kernels import PackedWeight
from coterie.shrink.dern import Recombined, dern
from coterie.shrink.gptq import HessianMean, gptq
from coterie.shrink.importance import IMPORTANCE, gating, importance, kept_experts, mixed, overlap
from coterie.shrink.knapsack import cheapest_choices
from coterie.shrink.mask import load_mask, save_mask
from coterie.shrink.mc_sharp import ExpertStatistics, allocate_bits, allocate_model_bits, expert_statistics
from coterie.shrink.measure import Sizes, perplexity, sizes
from coterie.shrink.merge import m_smoe
from coterie.shrink.packed_blocks import pack_block
from coterie.shrink.packed_checkpoint import save_packed
from coterie.shrink.protect import Attention, attention_received, protected
from coterie.shrink.prune import (
    METHODS,
    Silenced,
    choose,
    least_output_error,
    no_reroute,
    prune,
    pruned,
    restored,
)
from coterie.shrink.quantize import awq, rtn
from coterie.shrink.quantize_bank import quantize_bank
from coterie.shrink.quantize_block import quantize_block, quantize_router
from coterie.shrink.routed import RoutedTokens, block_inputs, routed_tokens
from coterie.shrink.self_text import SelfText, ebss, self_sample
from coterie.shrink.top_any import (
    Kept,
    PrefixMask,
    random_mask,
    ratio_threshold,
    top_any,
    train_top_any,
    weight_ratio,
)
from coterie.shrink.usage import balance_sigma, expert_usage

__all__ = [
    "IMPORTANCE",
    "METHODS",
    "Attention",
    "ExpertStatistics",
    "HessianMean",
    "Kept",
    "PackedWeight",
    "PrefixMask",
    "Recombined",
    "RoutedTokens",
    "SelfText",
    "Silenced",
    "Sizes",
    "allocate_bits",
    "allocate_model_bits",
    "attention_received",
    "awq",
    "balance_sigma",
    "block_inputs",
    "cheapest_choices",
    "choose",
    "dern",
    "ebss",
    "expert_statistics",
    "expert_usage",
    "gating",
    "gptq",
    "importance",
    "kept_experts",
    "least_output_error",
    "load_mask",
    "m_smoe",
    "mixed",
    "no_reroute",
    "overlap",
    "pack_block",
    "perplexity",
    "protected",
    "prune",
    "pruned",
    "quantize_bank",
    "quantize_block",
    "quantize_router",
    "random_mask",
    "ratio_threshold",
    "restored",
    "routed_tokens",
    "rtn",
    "save_mask",
    "save_packed",
    "self_sample",
    "sizes",
    "top_any",
    "train_top_any",
    "weight_ratio",
]
