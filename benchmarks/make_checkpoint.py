"""A random-weight Qwen3-MoE checkpoint of a given size; never more than a layer is in memory.

    python -m benchmarks.make_checkpoint FOLDER [--gigabytes 12]

bfloat16, width 2048, 64 experts of hidden width 768 in every layer, 8 of them for each token; the number of
layers follows from the size.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="must not exist yet")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of 10⁹ bytes, about")
    parser.add_argument("--experts", type=int, default=64)
    options = parser.parse_args()
    started = time.perf_counter()
    layers, size = make_checkpoint(options.folder, options.gigabytes, options.experts)
    print(f"{options.folder}: {layers} layers, {size / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s")


def make_checkpoint(folder: Path, gigabytes: float, experts: int) -> tuple[int, int]:
    """Writes the checkpoint; returns its number of layers and bytes."""
    torch.manual_seed(0)
    one = shapes(1, experts)
    layer_bytes = 2 * sum(p.numel() for p in one.model.layers.parameters())
    other_bytes = 2 * sum(p.numel() for p in one.parameters()) - layer_bytes
    layers = max(1, round((gigabytes * 1e9 - other_bytes) / layer_bytes))
    model = shapes(layers, experts)
    folder.mkdir(parents=True)
    places: dict[str, str] = {}

    def write(part: nn.Module, prefix: str, name: str) -> None:
        part.to_empty(device="cpu")
        for key, tensor in part.state_dict().items():
            tensor.fill_(1) if "norm" in key else tensor.normal_(0, 0.02)
        state: dict[str, Tensor] = {f"{prefix}.{key}": t for key, t in part.state_dict().items()}
        state = revert_weight_conversion(
            model, state
        )  # one matrix per expert, as such checkpoints are published
        save_file({key: t.contiguous() for key, t in state.items()}, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(state, name))
        part.to("meta")

    for number, layer in enumerate(model.model.layers):
        write(layer, f"model.layers.{number}", f"layer-{number:03}.safetensors")
    for prefix, part in (
        ("model.embed_tokens", model.model.embed_tokens),
        ("model.norm", model.model.norm),
        ("lm_head", model.lm_head),
    ):
        write(part, prefix, f"{prefix}.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.architectures = ["Qwen3MoeForCausalLM"]
    model.config.save_pretrained(folder)
    return layers, size


def shapes(layers: int, experts: int) -> Qwen3MoeForCausalLM:
    """The model without weights."""
    config = Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=experts // 8,
    )
    with torch.device("meta"):
        return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
