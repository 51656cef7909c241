"""Coterie's kernels as an experts implementation of transformers.

import coterie.hf
model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="coterie")
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import moe

from coterie.kernels import ClampedSwiGLU, Dispatch, available_backends, grouped_mlp, native, sort_by_expert

# Names transformers gives to activations that the kernels compute, and the kernels' name.
_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
}
_CLASSES: dict[type, str] = {type(ACT2FN[name]): ours for name, ours in _NAMES.items() if name in ACT2FN}
# Classes whose gate is a clamped SwiGLU, and where they keep its limit and alpha; the shift of up comes last.
_CLAMPED: dict[str, tuple[str, str | None, float]] = {
    "DeepseekV4Experts": ("limit", None, 0.0),
    "Glm5NextTextExperts": ("swiglu_limit", None, 0.0),
    "GptOssExperts": ("limit", "alpha", 1.0),
    "HYV4Experts": ("swiglu_limit", None, 0.0),
    "HYV4VLExperts": ("swiglu_limit", None, 0.0),
    "MiniMaxM3VLExperts": ("swiglu_limit", "swiglu_alpha", 1.0),
    "OpenAIPrivacyFilterExperts": ("limit", "alpha", 1.0),
}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.sigmoid: "sigmoid"}


def register() -> None:
    """Makes `experts_implementation="coterie"` known to transformers; calling it again changes nothing."""
    moe.ALL_EXPERTS_FUNCTIONS.register("coterie", experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's own forward.

    Args:
        self: the experts module: its weights, and the flags has_gate, has_bias, is_transposed,
            is_concatenated, has_post_expert_norm.
        hidden_states: tokens [T, D].
        top_k_index: chosen experts [T, K]; an id outside 0 … E-1 is a slot not computed here.
        top_k_weights: combine weights [T, K].

    Returns [T, D] in the dtype of `hidden_states`. A module whose gate is neither act(gate) · up nor a
    clamped SwiGLU, whose activation the kernels do not know, or that normalises each expert's output is
    computed by transformers' own `grouped_mm`: see `fused_activation`.
    """
    activation = fused_activation(self)
    if activation is None:
        y: Tensor = moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return y
    prefix = "gate_up" if self.has_gate else "up"
    w_in, w_out = getattr(self, f"{prefix}_proj"), self.down_proj
    if self.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    y = grouped_mlp(
        hidden_states.to(w_in.dtype),
        top_k_weights,
        _dispatch(top_k_index, w_in.shape[0]),
        w_in,
        w_out,
        getattr(self, f"{prefix}_proj_bias") if self.has_bias else None,
        self.down_proj_bias if self.has_bias else None,
        activation=activation,
        gated=bool(self.has_gate),
        interleaved=not self.is_concatenated,
    )
    return y.to(hidden_states.dtype)


def fused_activation(experts: Any) -> str | ClampedSwiGLU | None:
    """An experts module's activation as the kernels take it, or None when the module is not of their form."""
    if experts.has_post_expert_norm:
        return None
    if experts.has_gate and type(experts)._apply_gate is not moe._default_apply_gate:
        return _clamped(experts)
    return _named(experts) if experts.is_concatenated else None


def _named(experts: Any) -> str | None:
    act = experts.act_fn
    return _CLASSES.get(type(act)) or _FUNCTIONS.get(act)


def _clamped(experts: Any) -> ClampedSwiGLU | None:
    if type(experts).__name__ not in _CLAMPED:
        return None
    limit, alpha, shift = _CLAMPED[type(experts).__name__]
    if alpha is None and getattr(experts, "act_fn", None) is not None and _named(experts) != "silu":
        return None
    return ClampedSwiGLU(getattr(experts, limit), 1.0 if alpha is None else getattr(experts, alpha), shift)


def _dispatch(experts_TK: Tensor, num_experts: int) -> Dispatch:
    on_cpu = experts_TK.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and "native" in available_backends() and experts_TK.dtype == torch.int64:
        return native.sort_by_expert(experts_TK, num_experts)
    outside = (experts_TK < 0) | (experts_TK >= num_experts)
    return sort_by_expert(experts_TK.long().masked_fill(outside, -1), num_experts)
