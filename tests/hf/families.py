"""Every transformers family that uses the experts interface, as a tiny randomly initialised model."""

import ast
import importlib
import inspect
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from coterie.hf import MoEBlock
from coterie.hf.layout import fields_of

LAYERS = 2

# Sizes by the names configurations give them; what a configuration lacks is left out.
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # some latent attention knows no groups
    "head_dim": 16,
    "max_position_embeddings": 128,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # linear attention, state spaces, and what else is large by default
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "vocab_size_per_layer_input": 128,
}

# What the sizes above do not settle.
MORE: dict[str, dict[str, object]] = {
    "cohere2_moe": {"num_shared_experts": 1},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"] * LAYERS},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        }
    },
    "glm5_next": {"qk_rope_head_dim": 0},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hy_v4": {"indexer_types": ["full"] * LAYERS},
    "hy_v4_vl": {
        "indexer_types": ["full"] * LAYERS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "inkling2": {"unpadded_vocab_size": 120, "n_layers_per_attn_res_block": 1},
    "inkling2_loop": {
        "unpadded_vocab_size": 120,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "mimo_v2_flash": {"layer_types": ["full_attention"] * LAYERS, "num_attention_heads": 16},
    "mistral_large4": {"kv_source_layers": list(range(LAYERS))},
    "nemotron_h": {"layers_block_type": ["full_attention", "moe"]},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 32},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[tuple[str, str]]:
    """(family, experts class) for every class that uses the interface, read from the installed sources."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if "@use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_implementation" in ast.unparse(d) for d in node.decorator_list
            ):
                found.append((path.parent.name, node.name))
    return found


def tiny_config(
    config_class: type[PretrainedConfig], sizes: dict[str, Any], **more: object
) -> PretrainedConfig:
    default = config_class()
    values = {k: v for k, v in sizes.items() if _has(default, k)}
    if "qk_rope_head_dim" in values:
        values.pop("head_dim", None)  # derived there
    for name, value in default.to_dict().items():
        whole = getattr(default, "num_hidden_layers", -1)
        if isinstance(value, list) and len(value) == whole and name not in sizes:
            values[name] = value[-sizes["num_hidden_layers"] :]
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if isinstance(sub, type) and hasattr(sub, "model_type") and sub is not transformers.AutoConfig:
            values[name] = tiny_config(sub, sizes)
    return config_class(**(values | more))


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # raised for what varies from layer to layer
        return False


def tiny_model(family: str, experts: str, **sizes: object) -> PreTrainedModel:
    """A family's model of the sizes in TINY, or in `sizes`."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    config_class = _config_class(module, getattr(module, experts))
    candidates = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__module__ == module.__name__
        and c.config_class is config_class
        and "input_ids" in inspect.signature(c.forward).parameters
    ]
    best = max(candidates, key=lambda c: (c.__name__.endswith("ForCausalLM"), "For" not in c.__name__))
    torch.manual_seed(0)
    more = {name: sizes.get(name, value) for name, value in MORE.get(family, {}).items()}
    return best(tiny_config(config_class, TINY | sizes, **more)).eval()


def output(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or hidden states where the model has no head."""
    with torch.no_grad():
        if "Talker" in type(model).__name__:  # takes embeddings of another model's making
            result = model(inputs_embeds=model.codec_embedding(ids))
        else:
            result = model(input_ids=ids)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def table_row(family: str, block: MoEBlock) -> str:
    """A family's row in docs/families.md."""
    layout, bank = block.layout, block.layout.bank
    inside = {role: name.removeprefix(f"{block.name}.") for role, name in layout.router.items()}
    rows = inside.pop("rows")
    traits = {
        "transposed": bank.transposed,
        "interleaved": bank.interleaved,
        "biased": bank.biased,
        "not gated": not bank.gated,
    }
    fields = [fields_of(vars(block.config), what)[0] for what in ("num_experts", "top_k")]
    cells = (
        family,
        f"`{fields[0]}`, `{fields[1]}`",
        f"`{rows}`",
        ", ".join(f"`{name}`" for name in inside.values()),
        ", ".join(trait for trait, present in traits.items() if present),
        "yes" if layout.groups > 1 else "",
        "yes" if block.shared is not None else "",
    )
    return "| " + " | ".join(cells) + " |"


def _config_class(module: ModuleType, experts: type) -> type[PretrainedConfig]:
    """The configuration an experts class takes; where that is not annotated, the one named most like it."""
    annotation = inspect.signature(experts.__init__).parameters["config"].annotation
    if isinstance(annotation, type) and issubclass(annotation, PretrainedConfig):
        return annotation
    if isinstance(annotation, str):
        return getattr(module, annotation.strip("'"))
    models = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    classes = {c.config_class for c in models if c.__module__ == module.__name__} - {None}

    def likeness(config_class: type) -> tuple[int, bool, int]:
        pairs = zip(config_class.__name__, experts.__name__, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return shared, "Text" in config_class.__name__, -len(config_class.__name__)

    return max(classes, key=likeness)
