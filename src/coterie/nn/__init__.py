"""The core: routings, routers (score, then select), expert banks, the MoE layer, balance, monitors."""

from coterie.nn import balance
from coterie.nn.affinity import AttentionAffinity, SimilarityAffinity
from coterie.nn.attention import AttentionHeads
from coterie.nn.contrast import drop_elements, router_contrast
from coterie.nn.cost import parameters_per_expert
from coterie.nn.depth import (
    AdamResidual,
    DepthState,
    MomentumResidual,
    PlainResidual,
    Residual,
    robust_momentum,
)
from coterie.nn.experts import ConcatExperts, Experts, LinearExperts, MLPExperts, ModuleExperts, SwiGLUExperts
from coterie.nn.feature_gate import FeatureGate
from coterie.nn.group_attention import GroupAttention, GroupAttentionExperts
from coterie.nn.grow import append_experts, bias_for_share, hold_experts, keep_experts
from coterie.nn.health import ExpertHealth
from coterie.nn.mix_tokens import MixTokens
from coterie.nn.moe import MLP, Gated, MoE, SwiGLU
from coterie.nn.monitor import Monitor, StabilityTracker, expert_overlap, fluctuation
from coterie.nn.multi_gate import MaskedGates, MultiGateMoE
from coterie.nn.normalized_experts import NormalizedExperts
from coterie.nn.permutation import LearnedPermutation, PermuteLabels, permutation_entropy
from coterie.nn.quantized_experts import QuantizedExperts
from coterie.nn.router_wrappers import LimitCapacity, MaskSlots, SequenceRouter
from coterie.nn.routers import (
    AnyRouter,
    HashRouter,
    NoisyTopK,
    RandomRouter,
    Router,
    switch_router,
)
from coterie.nn.routing import Routing
from coterie.nn.score import (
    CosineScore,
    InputJitter,
    LinearScore,
    LogitNoise,
    MaskExperts,
    MLPScore,
    PermuteExperts,
    PreviousLogits,
    ReferenceExpert,
    RemapScores,
)
from coterie.nn.select import Dense, ExpertChoice, Threshold, TopK, TopP
from coterie.nn.set_attention import SequenceGate, TargetPooling
from coterie.nn.spectrum import curvatures, spectral_radius, stability_limit
from coterie.nn.trees import DSelectKScore, TreeRouter, TreeScore
from coterie.nn.zero_cost import MaskWeights, ZeroCostExperts

__all__ = [
    "MLP",
    "AdamResidual",
    "AnyRouter",
    "AttentionAffinity",
    "AttentionHeads",
    "ConcatExperts",
    "CosineScore",
    "DSelectKScore",
    "Dense",
    "DepthState",
    "ExpertChoice",
    "ExpertHealth",
    "Experts",
    "FeatureGate",
    "Gated",
    "GroupAttention",
    "GroupAttentionExperts",
    "HashRouter",
    "InputJitter",
    "LearnedPermutation",
    "LimitCapacity",
    "LinearExperts",
    "LinearScore",
    "LogitNoise",
    "MLPExperts",
    "MLPScore",
    "MaskExperts",
    "MaskSlots",
    "MaskWeights",
    "MaskedGates",
    "MixTokens",
    "MoE",
    "ModuleExperts",
    "MomentumResidual",
    "Monitor",
    "MultiGateMoE",
    "NoisyTopK",
    "NormalizedExperts",
    "PermuteExperts",
    "PermuteLabels",
    "PlainResidual",
    "PreviousLogits",
    "QuantizedExperts",
    "RandomRouter",
    "ReferenceExpert",
    "RemapScores",
    "Residual",
    "Router",
    "Routing",
    "SequenceGate",
    "SequenceRouter",
    "SimilarityAffinity",
    "StabilityTracker",
    "SwiGLU",
    "SwiGLUExperts",
    "TargetPooling",
    "Threshold",
    "TopK",
    "TopP",
    "TreeRouter",
    "TreeScore",
    "ZeroCostExperts",
    "append_experts",
    "balance",
    "bias_for_share",
    "curvatures",
    "drop_elements",
    "expert_overlap",
    "fluctuation",
    "hold_experts",
    "keep_experts",
    "parameters_per_expert",
    "permutation_entropy",
    "robust_momentum",
    "router_contrast",
    "spectral_radius",
    "stability_limit",
    "switch_router",
]
