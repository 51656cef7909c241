"""A decoder of about 300M parameters end to end, with each experts implementation of transformers.

    python -m benchmarks.generate [--quick] [--json FILE] [--threads N]

Random weights, batch 1: prefill of 512 tokens, then 64 decoded greedily. The contenders take turns within
each round; the figures are medians.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import coterie.hf  # noqa: F401  registers the experts implementation

IMPLEMENTATIONS = ("coterie", "eager", "grouped_mm", "batched_mm")
BATCHED_PREFILL = 64  # tokens: batched_mm copies every chosen expert's weights for every token


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="prefill 64, decode 8, one round")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the cache argument's coming rename
    torch.set_num_threads(options.threads)
    prefill, decode, rounds = (64, 8, 1) if options.quick else (512, 64, 5)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder().to(dtype)
        parameters = sum(p.numel() for p in model.parameters())
        rows += measure(model, prefill, decode, rounds)
    for row in rows:
        row |= {"parameters": parameters, "threads": options.threads}
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


def decoder() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=16384,
        hidden_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return Qwen3MoeForCausalLM(config).eval()


@torch.inference_mode()
def measure(model: Qwen3MoeForCausalLM, prefill: int, decode: int, rounds: int) -> list[dict]:
    ids = torch.randint(3, model.config.vocab_size, (1, prefill))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPLEMENTATIONS}
    for round_ in range(rounds + 1):  # the first is to warm up
        for name in IMPLEMENTATIONS:
            model.set_experts_implementation("grouped_mm" if _too_large(name, prefill) else name)
            start = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            first = time.perf_counter() - start
            model.set_experts_implementation(name)
            start = time.perf_counter()
            for _ in range(decode):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            if round_:
                times[name].append((first, time.perf_counter() - start))
    medians = {n: [statistics.median(v) for v in zip(*values, strict=True)] for n, values in times.items()}
    best = [
        min(m[i] for n, m in medians.items() if n != "coterie" and not (i == 0 and _too_large(n, prefill)))
        for i in range(2)
    ]
    return [
        {
            "implementation": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "prefill_tokens_per_second": None if _too_large(name, prefill) else prefill / first,
            "decode_tokens_per_second": decode / rest,
            "prefill_ratio_to_best_peer": best[0] / first if name == "coterie" else None,
            "decode_ratio_to_best_peer": best[1] / rest if name == "coterie" else None,
        }
        for name, (first, rest) in medians.items()
    ]


def _too_large(name: str, prefill: int) -> bool:
    return name == "batched_mm" and prefill > BATCHED_PREFILL


def print_table(rows: list[dict]) -> None:
    table = Table("experts", "dtype", "prefill tokens/s", "decode tokens/s", "prefill ratio", "decode ratio")
    for row in rows:
        numbers = [
            row[key]
            for key in (
                "prefill_tokens_per_second",
                "decode_tokens_per_second",
                "prefill_ratio_to_best_peer",
                "decode_ratio_to_best_peer",
            )
        ]
        shown = ["–" if n is None else f"{n:.1f}" if i < 2 else f"{n:.2f}" for i, n in enumerate(numbers)]
        table.add_row(row["implementation"], row["dtype"], *shown)
    console = Console()
    console.print(f"{rows[0]['parameters'] / 1e6:.0f}M parameters, {rows[0]['threads']} threads")
    console.print(table)


if __name__ == "__main__":
    main()
