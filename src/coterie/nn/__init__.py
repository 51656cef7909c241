"""The core: routings, routers (score, then select), expert banks, the MoE layer, balance, monitors."""

from coterie.nn import balance
from coterie.nn.depth import (
    AdamResidual,
    DepthState,
    MomentumResidual,
    PlainResidual,
    Residual,
    robust_momentum,
)
from coterie.nn.experts import ConcatExperts, Experts, MLPExperts, ModuleExperts, SwiGLUExperts
from coterie.nn.moe import Gated, MoE, SwiGLU
from coterie.nn.monitor import Monitor, fluctuation
from coterie.nn.routers import (
    AnyRouter,
    HashRouter,
    LimitCapacity,
    MaskSlots,
    NoisyTopK,
    RandomRouter,
    Router,
    SequenceRouter,
    switch_router,
)
from coterie.nn.routing import Routing
from coterie.nn.score import (
    CosineScore,
    InputJitter,
    LinearScore,
    LogitNoise,
    MaskExperts,
    MixTokens,
    MLPScore,
    PermuteExperts,
    PreviousLogits,
    RemapScores,
)
from coterie.nn.select import Dense, ExpertChoice, Threshold, TopK, TopP
from coterie.nn.spectrum import curvatures, spectral_radius, stability_limit
from coterie.nn.zero_cost import MaskWeights, ZeroCostExperts

__all__ = [
    "AdamResidual",
    "AnyRouter",
    "ConcatExperts",
    "CosineScore",
    "Dense",
    "DepthState",
    "ExpertChoice",
    "Experts",
    "Gated",
    "HashRouter",
    "InputJitter",
    "LimitCapacity",
    "LinearScore",
    "LogitNoise",
    "MLPExperts",
    "MLPScore",
    "MaskExperts",
    "MaskSlots",
    "MaskWeights",
    "MixTokens",
    "MoE",
    "ModuleExperts",
    "MomentumResidual",
    "Monitor",
    "NoisyTopK",
    "PermuteExperts",
    "PlainResidual",
    "PreviousLogits",
    "RandomRouter",
    "RemapScores",
    "Residual",
    "Router",
    "Routing",
    "SequenceRouter",
    "SwiGLU",
    "SwiGLUExperts",
    "Threshold",
    "TopK",
    "TopP",
    "ZeroCostExperts",
    "balance",
    "curvatures",
    "fluctuation",
    "robust_momentum",
    "spectral_radius",
    "stability_limit",
    "switch_router",
]
