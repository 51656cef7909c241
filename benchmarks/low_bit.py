"""A few tokens through a bank of experts in bfloat16, and through the same experts in 8, 4, 3, 2 and 1 bits.

    python -m benchmarks.low_bit [--quick] [--json FILE] [--threads N] [--tokens 1,16] [--dtype float32]

Every bank takes its turn within each round, on the same tokens and routing; a row keeps the median. Tokens
and routing change from round to round, and the other banks' turns lie between, so that experts come from
memory. The baseline is the native kernel on the unquantised bank, in bfloat16 or the --dtype given. GB/s
counts the bytes of the experts that were chosen.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from coterie.kernels import native
from coterie.kernels.dispatch import sort_by_expert
from coterie.nn import Routing, SwiGLUExperts
from coterie.shrink import quantize_bank

# name: experts E, experts per token K, width D, hidden F
SHAPES = {"8×3584 top-2": (8, 2, 1024, 3584), "64×512 top-8": (64, 8, 1024, 512)}
BITS = (8, 4, 3, 2, 1)
GROUP_SIZE = 128
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="1", help="comma-separated; default 1")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of tokens and unquantised bank")
    options = parser.parse_args()
    if native.why_unavailable():
        parser.exit(1, f"{native.why_unavailable()}\n")
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    _, bandwidth = native.machine_floor(dtype)
    rows = []
    for name in list(SHAPES)[-1:] if options.quick else SHAPES:
        banks = make_banks(name, dtype)
        for tokens in (int(t) for t in options.tokens.split(",")):
            rows += measure(name, banks, tokens, dtype, rounds=5 if options.quick else 60)
    console = Console()
    console.print(
        f"{options.threads} thread(s), {native.instruction_set()}, reads {bandwidth / 1e9:.1f} GB/s"
    )
    console.print(table_of(rows))
    if options.json:
        floor = {"threads": options.threads, "bandwidth": bandwidth, "instructions": native.instruction_set()}
        options.json.write_text(json.dumps({"floor": floor, "rows": rows}, indent=1))


def make_banks(name: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    experts, _, dim, hidden = SHAPES[name]
    bank = SwiGLUExperts(experts, dim, hidden).requires_grad_(False)
    banks = {f"{bits} bits": quantize_bank(bank, bits, group_size=GROUP_SIZE) for bits in BITS}
    return {str(dtype).removeprefix("torch."): bank.to(dtype)} | banks


@torch.inference_mode()
def measure(
    name: str, banks: dict[str, torch.nn.Module], tokens: int, dtype: torch.dtype, rounds: int
) -> list[dict]:
    experts, slots, dim, _ = SHAPES[name]
    seconds: dict[str, list[float]] = {kind: [] for kind in banks}
    chosen = []
    for round_ in range(rounds + 1):  # the first is to warm up
        x = torch.randn(tokens, dim).to(dtype)
        scores, ids = torch.randn(tokens, experts).topk(slots)
        routing = Routing(ids, scores.softmax(-1), scores, scores, experts)
        routing.dispatch  # noqa: B018  computed once and kept: no bank pays for it
        chosen.append(int((sort_by_expert(ids, experts).ends_E.diff(prepend=torch.zeros(1)) > 0).sum()))
        for kind, bank in banks.items():
            start = time.perf_counter()
            bank(x, routing)
            if round_:
                seconds[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(s) for kind, s in seconds.items()}
    baseline = next(iter(medians.values()))
    share = statistics.median(chosen) / experts
    return [
        {
            "shape": name,
            "tokens": tokens,
            "bank": kind,
            "megabytes": size(banks[kind]) / 1e6,
            "milliseconds": 1e3 * s,
            "gigabytes_per_second": share * size(banks[kind]) / s / 1e9,
            "times_faster": baseline / s,
        }
        for kind, s in medians.items()
    ]


def size(bank: torch.nn.Module) -> int:
    return sum(t.nbytes for t in bank.state_dict().values())


def table_of(rows: list[dict]) -> Table:
    table = Table("experts", "tokens", "bank", "MB", "ms", "GB/s", "× baseline")
    for row in rows:
        numbers = (row["milliseconds"], row["gigabytes_per_second"], row["times_faster"])
        shown = [f"{numbers[0]:.3f}", f"{numbers[1]:.1f}", f"{numbers[2]:.2f}"]
        table.add_row(row["shape"], str(row["tokens"]), row["bank"], f"{row['megabytes']:.1f}", *shown)
    return table


if __name__ == "__main__":
    main()
