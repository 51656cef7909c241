"""Decoders as Hugging Face checkpoints: Qwen3-MoE with experts, Qwen3 without.

`save_pretrained` writes what `AutoModelForCausalLM.from_pretrained` loads without Coterie;
`load_pretrained` reads any Qwen3 or Qwen3-MoE checkpoint whose layers are all alike.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coterie.models.decoder import Decoder, DecoderConfig
from coterie.models.saved import new_folder
from coterie.models.tying import tie_depth, tied_modules
from coterie.nn import (
    InputJitter,
    LimitCapacity,
    LinearScore,
    LogitNoise,
    MoE,
    PlainResidual,
    Router,
    SwiGLUExperts,
    TopK,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUTER_HERE, _ROUTER_THERE = ".mlp.router.score.weight", ".mlp.gate.weight"
_ROUTER_WRAPPED = re.compile(r"\.mlp\.router(\.router)?(\.score)+\.weight$")
_TIED = "tied_across_depth"  # in their config: names of the modules of which the checkpoint holds copies


def save_pretrained(model: Decoder, folder: str | Path, tokenizer: Any = None) -> Path:
    """Writes a Hugging Face checkpoint (config, safetensors, tokenizer if given).

    Args:
        model: a decoder with its default feed-forward parts and residuals.
        folder: must not exist, be empty, or hold an earlier checkpoint (which is replaced).
        tokenizer: a transformers tokenizer saved beside the weights.

    What is tied across depth (`tie_depth`) is written as one copy per layer, since Qwen3-MoE ties nothing,
    and named in the config, by which `load_pretrained` ties it again. What a router does in training only,
    noise or a capacity, is left out.

    Raises ValueError when the model holds a router, bank or residual that Qwen3-MoE cannot express, or the
    folder holds something else. The checkpoint appears whole or not at all.
    """
    theirs = to_transformers(model)
    with new_folder(folder, "config.json") as draft, _quiet():
        theirs.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    return Path(folder)


def load_pretrained(folder: str | Path) -> Decoder:
    """Reads a Qwen3 or Qwen3-MoE checkpoint into a `Decoder` (float32), tied across depth if it was saved so.

    Copies that training elsewhere has made differ stay separate layers, with a warning.

    Raises ValueError for a missing folder, another architecture, or features a `Decoder` lacks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no checkpoint (no config.json); give the folder of one")
    _check_config(AutoConfig.from_pretrained(folder))
    with _quiet():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return from_transformers(theirs)


def to_transformers(model: Decoder) -> "PreTrainedModel":
    """The same model as transformers' Qwen3MoeForCausalLM or Qwen3ForCausalLM, with copied weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    c = model.config
    for i, layer in enumerate(model.layers):
        _check_expressible(i, layer.mlp, c)
        _check_residual(i, layer.residual)
    sizes: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_len,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "bos_token_id": None,
        "eos_token_id": c.vocab_size - 1,
    }
    if c.num_experts:
        experts: dict[str, Any] = {
            "num_experts": c.num_experts,
            "num_experts_per_tok": c.top_k,
            "moe_intermediate_size": c.expert_hidden,
            "norm_topk_prob": c.renormalize,
        }
        theirs: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**sizes))
    theirs.load_state_dict({_their_name(k): v for k, v in model.state_dict().items()})
    if tied := tied_modules(model.layers):
        setattr(theirs.config, _TIED, tied)
    theirs.train(False)
    return theirs


def from_transformers(theirs: "PreTrainedModel") -> Decoder:
    """The same model as a `Decoder`, with copied weights. ValueError for another architecture."""
    config = theirs.config
    _check_config(config)
    is_moe = config.model_type == "qwen3_moe"
    model = Decoder(
        DecoderConfig(
            vocab_size=config.vocab_size,
            dim=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            hidden=config.intermediate_size,
            num_experts=config.num_experts if is_moe else 0,
            top_k=config.num_experts_per_tok if is_moe else 2,
            expert_hidden=config.moe_intermediate_size if is_moe else 0,
            max_len=config.max_position_embeddings,
            rope_theta=config.rope_parameters["rope_theta"],
            norm_eps=config.rms_norm_eps,
            tie_embeddings=config.tie_word_embeddings,
            renormalize=config.norm_topk_prob if is_moe else True,
        )
    )
    state: dict[str, Tensor] = theirs.state_dict()
    model.load_state_dict({_our_name(k): v.float() for k, v in state.items()})
    if tied := getattr(config, _TIED, []):
        _tie_again(model, tied)
    return model.eval()


def _tie_again(model: Decoder, names: list[str]) -> None:
    first, *others = ([layer.get_submodule(name).state_dict() for name in names] for layer in model.layers)
    differ = [
        name
        for i, name in enumerate(names)
        if not all(torch.equal(layer[i][key], value) for layer in others for key, value in first[i].items())
    ]
    if differ:
        warnings.warn(
            f"{', '.join(differ)} were tied across depth when this checkpoint was saved, but its layers have "
            "been trained apart since; they are loaded as they are, untied",
            stacklevel=3,
        )
    tie_depth(model.layers, [name for name in names if name not in differ])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar over shards, of which there is one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _their_name(name: str) -> str:
    name = _ROUTER_WRAPPED.sub(_ROUTER_THERE, name)
    return name if name.startswith("lm_head") else f"model.{name}"


def _our_name(name: str) -> str:
    return name.removeprefix("model.").replace(_ROUTER_THERE, _ROUTER_HERE)


def _check_expressible(i: int, ffn: Any, c: DecoderConfig) -> None:
    if not isinstance(ffn, MoE):
        return
    router, bank = _in_evaluation(ffn.router), ffn.experts
    score = _in_evaluation(router.score) if isinstance(router, Router) else None
    plain = (
        isinstance(router, Router)
        and type(score) is LinearScore
        and score.bias is None
        and type(router.select) is TopK
        and (router.select.k, router.select.renormalize) == (c.top_k, c.renormalize)
        and (router.select.gate, router.select.scale, router.select.bias) == ("softmax", 1.0, None)
        and router.select.groups == 1
        and type(bank) is SwiGLUExperts
        and (bank.activation, bank.gate_up_bias) == ("silu", None)
        and (bank.num_experts, bank.hidden) == (c.num_experts, c.expert_hidden)
        and ffn.shared is None
    )
    if not plain:
        raise ValueError(
            f"layer {i} cannot be written as Qwen3-MoE, which knows only Router(LinearScore, TopK) over "
            f"SwiGLUExperts as in the decoder's config; found {type(router).__name__} over "
            f"{type(bank).__name__}. Save its state_dict with safetensors instead"
        )


def _in_evaluation(part: Any) -> Any:
    """A router or scorer without the wrappers that do nothing in evaluation mode."""
    if isinstance(part, LimitCapacity) and part.training_only:
        return _in_evaluation(part.router)
    return _in_evaluation(part.score) if isinstance(part, (LogitNoise, InputJitter)) else part


def _check_residual(i: int, residual: Any) -> None:
    if type(residual) is not PlainResidual:
        raise ValueError(
            f"layer {i} cannot be written as Qwen3, whose layers are added; found {type(residual).__name__}. "
            "Save its state_dict with safetensors instead"
        )


def _check_config(config: Any) -> None:
    if config.model_type not in ("qwen3", "qwen3_moe"):
        raise ValueError(
            f"the checkpoint is of architecture {config.model_type!r}; "
            "a Decoder reads 'qwen3' and 'qwen3_moe'"
        )
    rope = dict(config.rope_parameters)
    lacks = {
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.use_sliding_window,
        f"rope_type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "dense layers among MoE ones": config.model_type == "qwen3_moe"
        and (bool(config.mlp_only_layers) or config.decoder_sparse_step != 1),
        f"hidden_act {config.hidden_act!r}": config.hidden_act != "silu",
    }
    found = [name for name, present in lacks.items() if present]
    if found:
        raise ValueError(f"the checkpoint has {', '.join(found)}, which a Decoder does not support")
