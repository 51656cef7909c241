"""A decoder of about 300M parameters end to end: each experts implementation of transformers, and llama.cpp.

    python -m benchmarks.generate [--quick] [--json FILE] [--threads N]

Random weights, batch 1: prefill of 512 tokens, then 64 decoded greedily. The contenders take turns within
each round; the figures are medians. llama.cpp takes part where `llama-cpp-python` and `gguf` are installed,
with the same weights in a GGUF file: F32 beside float32, BF16 and F16 beside bfloat16. Its last logits are
compared with transformers' first; ours compete with it in the columns named after it. "coterie prepacked" is
ours with expert weights that are kept packed (`coterie.kernels.prepacked`).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import coterie.hf  # noqa: F401  registers the experts implementation
from benchmarks.llama_cpp_peer import LlamaCpp, missing, write_gguf
from coterie.kernels import Prepacked, native, prepacked

THEIRS = ("eager", "grouped_mm", "batched_mm")
OURS = ("coterie", "coterie prepacked")
RATIOS = {
    "prefill_ratio_to_best_peer": "prefill / best of transformers",
    "decode_ratio_to_best_peer": "decode / best",
    "prefill_ratio_to_llama_cpp": "prefill / llama.cpp",
    "decode_ratio_to_llama_cpp": "decode / llama.cpp",
}
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
        rows += measure(model, prefill, decode, rounds, options.threads)
        with torch.inference_mode():
            print(f"{dtype}: {share_in_kernel(model, decode):.0%} of decoding is in our kernel")
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
def measure(model: Qwen3MoeForCausalLM, prefill: int, decode: int, rounds: int, threads: int) -> list[dict]:
    ids = torch.randint(3, model.config.vocab_size, (1, prefill))
    with llamas(model, ids, prefill + decode, threads) as others:
        contenders = {name: partial(run_transformers, model, name) for name in ("coterie", *THEIRS)}
        contenders |= {"coterie prepacked": partial(run_prepacked, model, Prepacked()), **others}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for round_ in range(rounds + 1):  # the first is to warm up
            for name, run in contenders.items():
                taken = run(ids, decode)
                if round_:
                    times[name].append(taken)
    medians = {n: [statistics.median(v) for v in zip(*values, strict=True)] for n, values in times.items()}
    peers = [[n for n in THEIRS if not _too_large(n, prefill)], THEIRS]

    def ratios(name: str) -> dict[str, float | None]:
        """How many times as fast as the best of transformers, and of llama.cpp, for ours."""
        best = [min(medians[n][i] for n in peers[i]) for i in range(2)]
        best += [min(medians[n][i] for n in others) if others else None for i in range(2)]
        return {
            key: time / medians[name][i % 2] if time and name in OURS else None
            for i, (key, time) in enumerate(zip(RATIOS, best, strict=True))
        }

    return [
        {
            "implementation": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "prefill_tokens_per_second": None if _too_large(name, prefill) else prefill / first,
            "decode_tokens_per_second": decode / rest,
            **ratios(name),
        }
        for name, (first, rest) in medians.items()
    ]


def share_in_kernel(model: Qwen3MoeForCausalLM, decode: int) -> float:
    """Of the time of decoding with our experts, how much is spent in their kernel."""
    ids = torch.randint(3, model.config.vocab_size, (1, 16))
    run_transformers(model, "coterie", ids, decode)  # warm
    return 1 - native.profile(lambda: run_transformers(model, "coterie", ids, decode))["everything else"]


def run_transformers(model: Qwen3MoeForCausalLM, name: str, ids: Tensor, decode: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    model.set_experts_implementation("grouped_mm" if _too_large(name, ids.shape[1]) else name)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    first = time.perf_counter() - start
    model.set_experts_implementation(name)
    start = time.perf_counter()
    for _ in range(decode):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return first, time.perf_counter() - start


def run_prepacked(
    model: Qwen3MoeForCausalLM, copies: Prepacked, ids: Tensor, decode: int
) -> tuple[float, float]:
    with prepacked(copies):
        return run_transformers(model, "coterie", ids, decode)


@contextmanager
def llamas(
    model: Qwen3MoeForCausalLM, ids: Tensor, context: int, threads: int
) -> Iterator[dict[str, Callable[[Tensor, int], tuple[float, float]]]]:
    """llama.cpp with the model's weights, by name; empty where it is not installed."""
    if missing():
        print(f"without llama.cpp: {', '.join(missing())} not installed")
        yield {}
        return
    kinds = {"llama.cpp F32": torch.float32}
    if model.dtype == torch.bfloat16:
        kinds = {"llama.cpp BF16": torch.bfloat16, "llama.cpp F16": torch.float16}
    model.set_experts_implementation("eager")
    expected = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    loaded = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in kinds.items():
            file = Path(folder) / "model.gguf"
            write_gguf(model, file, dtype)
            loaded[name] = LlamaCpp(file, threads=threads, context=context)
            logits = torch.from_numpy(loaded[name].logits(ids[0].tolist()).copy())
            error = ((logits - expected).norm() / expected.norm()).item()
            print(f"{name}: logits differ from transformers' by {error:.1e} of their norm")
            if error > 0.1:
                raise RuntimeError(f"{name} computes another model")
            file.unlink()  # it stays mapped
    try:
        yield {name: partial(run_llama, other) for name, other in loaded.items()}
    finally:
        for other in loaded.values():
            other.close()


def run_llama(llama: LlamaCpp, ids: Tensor, decode: int) -> tuple[float, float]:
    llama.reset()
    start = time.perf_counter()
    logits = llama.logits(ids[0].tolist())
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(decode):
        logits = llama.logits([int(logits.argmax())])
    return first, time.perf_counter() - start


def _too_large(name: str, prefill: int) -> bool:
    return name == "batched_mm" and prefill > BATCHED_PREFILL


def print_table(rows: list[dict]) -> None:
    table = Table("experts", "dtype", "prefill tokens/s", "decode tokens/s", *RATIOS.values())
    for row in rows:
        numbers = [row[key] for key in ("prefill_tokens_per_second", "decode_tokens_per_second", *RATIOS)]
        shown = ["–" if n is None else f"{n:.1f}" if i < 2 else f"{n:.2f}" for i, n in enumerate(numbers)]
        table.add_row(row["implementation"], row["dtype"], *shown)
    console = Console(width=150)
    console.print(f"{rows[0]['parameters'] / 1e6:.0f}M parameters, {rows[0]['threads']} threads")
    console.print(table)


if __name__ == "__main__":
    main()
