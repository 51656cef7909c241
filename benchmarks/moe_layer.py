"""One mixture-of-experts layer: coterie beside transformers and st-moe-pytorch, and the machine's floor.

    python -m benchmarks.moe_layer [--quick] [--json FILE] [--plot FILE] [--threads 1,2] [--tokens 1,16]
        [--dtype bfloat16] [--profile]

Every contender computes the same experts (Qwen3-MoE's) from the same routing, in turn within each round; a
row keeps their medians. One that is ten times slower than the quickest in the first round stands with that
time. "prepacked" is ours with weights that are kept packed (`coterie.kernels.prepacked`), forward only.
st-moe-pytorch has experts and a gate of its own, of the same sizes, and takes part in float32 when
it is installed; the ratio is to the best of transformers. The floor of a row is the larger of FLOPs/peak and
bytes/bandwidth, both measured at the start of the same run. With --profile, a second table says what ours
spends its time on, as shares of all threads' time.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import coterie.hf  # noqa: F401  registers the experts implementation
from coterie.kernels import Prepacked, native, prepacked

# name: experts E, experts per token K, width D, hidden F
SHAPES = {
    "8×3584 top-2": (8, 2, 1024, 3584),
    "64×512 top-8": (64, 8, 1024, 512),
    "128×384 top-8": (128, 8, 1024, 384),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREPACKED = "prepacked"
KEPT = ("prepacked_ratio_to_best_peer", "prepacked_share_of_floor")
WIDTH = 180  # of the tables
PEERS = ("eager", "grouped_mm", "batched_mm")
HOPELESS = 10  # times slower than the quickest in the first round: not called again, that time stands
BATCHED_LIMIT = 2 << 30  # bytes: batched_mm copies the weights of every (token, expert) pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape, few tokens, few rounds")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write a bar chart of the ratios here")
    parser.add_argument("--threads", help="comma-separated; default 1 and all processors")
    parser.add_argument("--tokens", help="comma-separated; default 1,16,512,4096")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--profile", action="store_true", help="say where our time goes")
    options = parser.parse_args()
    if native.why_unavailable():
        parser.exit(1, f"{native.why_unavailable()}\n")
    cpus = len(os.sched_getaffinity(0))
    threads = [int(t) for t in options.threads.split(",")] if options.threads else sorted({1, cpus})
    shapes = dict(list(SHAPES.items())[-1:]) if options.quick else SHAPES
    tokens = [
        int(t) for t in (options.tokens or ("1,16,128" if options.quick else "1,16,512,4096")).split(",")
    ]
    dtypes = {name: DTYPES[name] for name in ([options.dtype] if options.dtype else DTYPES)}
    rows, floors = [], []
    for count in threads:
        torch.set_num_threads(count)
        for dtype_name, dtype in dtypes.items():
            flops, bandwidth = native.machine_floor(dtype)
            floors.append({"dtype": dtype_name, "threads": count, "flops": flops, "bandwidth": bandwidth})
            for name in shapes:
                layer = Layer(name, dtype)
                plan = [(t, "forward") for t in tokens] + [
                    (t, "forward+backward") for t in tokens if 128 <= t <= 512
                ]
                for amount, kind in plan:
                    seconds = layer.measure(
                        amount, kind, rounds=3 if options.quick else 5 if amount > 512 else 9
                    )
                    rows.append(layer.row(amount, kind, seconds, flops, bandwidth))
                    if options.profile:
                        rows[-1]["profile"] = layer.profile(amount, kind)
                    print_row(rows[-1])
                if options.json:
                    options.json.write_text(json.dumps({"floors": floors, "rows": rows}, indent=1))
    print_table(rows, floors)
    if options.profile:
        print_profile(rows)
    if options.plot:
        plot(rows, options.plot)


class Layer:
    """The experts of one shape in one dtype, and every contender's way to compute them."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.experts, self.slots, self.dim, self.hidden = SHAPES[name]
        config = Qwen3MoeConfig(
            num_experts=self.experts,
            num_experts_per_tok=self.slots,
            hidden_size=self.dim,
            moe_intermediate_size=self.hidden,
        )
        torch.manual_seed(0)
        self.module = Qwen3MoeExperts(config).to(dtype)
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.st_moe = st_moe_layer(self.experts, self.slots, self.dim, self.hidden, dtype)

    def measure(self, tokens: int, kind: str, rounds: int) -> dict[str, float]:
        """Median seconds of each contender, one call of each per round."""
        backward = kind != "forward"
        x, ids, weights, direction = self.inputs(tokens, backward)
        self.chosen = ids.unique().numel()

        def experts(implementation: str) -> Callable[[], Tensor]:
            def run() -> Tensor:
                self.module.config._experts_implementation = implementation
                return self.module(x, ids, weights)

            return run

        contenders = {name: experts(name) for name in ("coterie", *PEERS)}
        if not backward:
            contenders[PREPACKED] = kept_packed(contenders["coterie"])
        if tokens * self.slots * 3 * self.dim * self.hidden * x.element_size() > BATCHED_LIMIT:
            del contenders["batched_mm"]
        if self.st_moe is not None:
            contenders["st-moe-pytorch"] = lambda: self.st_moe(x.unsqueeze(0)).squeeze(0)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        inputs = [x, weights, *self.module.parameters()]
        for round_ in range(rounds + 1):  # the first is to warm up
            for name, run in list(contenders.items()):
                start = time.perf_counter()
                with torch.set_grad_enabled(backward):
                    y = run()
                    if backward and name == "st-moe-pytorch":
                        torch.autograd.grad(y, [x, *self.st_moe.parameters()], direction, allow_unused=True)
                    elif backward:
                        torch.autograd.grad(y, inputs, direction)
                del y
                times[name].append(time.perf_counter() - start)
            if not round_:
                quickest = min(seconds[0] for seconds in times.values())
                for name, seconds in times.items():
                    if seconds[0] > HOPELESS * quickest:
                        del contenders[name]
                    else:
                        seconds.clear()
        return {name: statistics.median(values) for name, values in times.items()}

    def inputs(self, tokens: int, backward: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, their experts, combine weights, and the gradient of the result."""
        for parameter in self.module.parameters():
            parameter.requires_grad_(backward)
        x = torch.randn(tokens, self.dim).to(self.dtype).requires_grad_(backward)
        scores, ids = torch.randn(tokens, self.experts).topk(self.slots)
        weights = scores.softmax(-1).to(self.dtype).requires_grad_(backward)
        return x, ids, weights, torch.randn(tokens, self.dim).to(self.dtype)

    def profile(self, tokens: int, kind: str, calls: int = 5) -> dict[str, float]:
        """Shares of our time per kind of work, over several calls."""
        backward = kind != "forward"
        x, ids, weights, direction = self.inputs(tokens, backward)
        self.module.config._experts_implementation = "coterie"

        def run() -> None:
            for _ in range(calls):
                with torch.set_grad_enabled(backward):
                    y = self.module(x, ids, weights)
                    if backward:
                        torch.autograd.grad(y, [x, weights, *self.module.parameters()], direction)

        run()  # warm
        return native.profile(run)

    def row(self, tokens: int, kind: str, seconds: dict[str, float], peak: float, bandwidth: float) -> dict:
        size = torch.empty(0, dtype=self.dtype).element_size()
        bank = 3 * self.dim * self.hidden * size
        flops, moved = 6 * tokens * self.slots * self.dim * self.hidden, self.chosen * bank
        if kind != "forward":  # gradients of rows and weights; weights read again, every gradient written
            flops, moved = 3 * flops, 2 * moved + self.experts * bank
        floor = max(flops / peak, moved / bandwidth)
        ours, kept = seconds["coterie"], seconds.get(PREPACKED)
        best = min(time for name, time in seconds.items() if name in PEERS)
        return {
            "shape": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens": tokens,
            "pass": kind,
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "ratio_to_best_peer": best / ours,
            "share_of_floor": floor / ours,
            "prepacked_ratio_to_best_peer": best / kept if kept else None,
            "prepacked_share_of_floor": floor / kept if kept else None,
            "bound": "arithmetic" if flops / peak > moved / bandwidth else "memory",
            "gflops": flops / ours / 1e9,
            "gbytes_per_second": moved / ours / 1e9,
        }


def kept_packed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    copies = Prepacked()

    def with_copies() -> Tensor:
        with prepacked(copies):
            return run()

    for _ in range(2):  # a bank is packed at its second sight
        with_copies()
    return with_copies


def st_moe_layer(
    experts: int, slots: int, dim: int, hidden: int, dtype: torch.dtype
) -> torch.nn.Module | None:
    """st-moe-pytorch's layer of the same sizes, or None where it cannot run."""
    if dtype != torch.float32:  # its gate computes in float32 and does not take other tokens
        return None
    try:
        from st_moe_pytorch import MoE
    except ImportError:
        return None
    layer = MoE(dim=dim, num_experts=experts, gating_top_n=slots, expert_hidden_mult=1.5 * hidden / dim)
    layer = layer.eval()

    class Output(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    return Output()


def print_row(row: dict) -> None:
    print(
        f"{row['dtype']:9} {row['shape']:14} {row['tokens']:5} {row['pass']:17} {row['threads']} threads "
        f"{row['seconds']['coterie'] * 1e3:9.2f} ms, ratio {row['ratio_to_best_peer']:.2f}, "
        f"share {row['share_of_floor']:.2f}{prepacked_text(row)}",
        flush=True,
    )


def prepacked_text(row: dict) -> str:
    if row["prepacked_ratio_to_best_peer"] is None:
        return ""
    return (
        f"; prepacked {row['seconds'][PREPACKED] * 1e3:.2f} ms, "
        f"{row['prepacked_ratio_to_best_peer']:.2f}, {row['prepacked_share_of_floor']:.2f}"
    )


def print_table(rows: list[dict], floors: list[dict]) -> None:
    console = Console(width=WIDTH)
    for floor in floors:
        console.print(
            f"floor, {floor['dtype']}, {floor['threads']} threads: {floor['flops'] / 1e9:.0f} GFLOP/s, "
            f"{floor['bandwidth'] / 1e9:.1f} GB/s read"
        )
    names = [
        "coterie",
        PREPACKED,
        *PEERS,
        *(["st-moe-pytorch"] if "st-moe-pytorch" in rows[0]["seconds"] else []),
    ]
    table = Table(
        "experts",
        "dtype",
        "tokens",
        "pass",
        "threads",
        *[f"{n} ms" for n in names],
        "speed",
        "ratio",
        "share",
        "prepacked ratio",
        "share",
    )
    for row in rows:
        speed = (
            f"{row['gflops']:.0f} GFLOP/s"
            if row["bound"] == "arithmetic"
            else f"{row['gbytes_per_second']:.1f} GB/s"
        )
        times = [f"{row['seconds'][n] * 1e3:.2f}" if n in row["seconds"] else "–" for n in names]
        table.add_row(
            row["shape"],
            row["dtype"],
            str(row["tokens"]),
            row["pass"],
            str(row["threads"]),
            *times,
            speed,
            f"{row['ratio_to_best_peer']:.2f}",
            f"{row['share_of_floor']:.2f}",
            *("–" if row[key] is None else f"{row[key]:.2f}" for key in KEPT),
        )
    console.print(table)


def print_profile(rows: list[dict]) -> None:
    table = Table("experts", "dtype", "tokens", "pass", "threads", "share of floor", *rows[0]["profile"])
    for row in rows:
        shares = [f"{share:.0%}" for share in row["profile"].values()]
        place = [row["shape"], row["dtype"], str(row["tokens"]), row["pass"], str(row["threads"])]
        table.add_row(*place, f"{row['share_of_floor']:.2f}", *shares)
    Console(width=WIDTH).print(table)


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.22 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"{r['dtype']} {r['shape']} T={r['tokens']} {r['pass']} ×{r['threads']}" for r in rows]
    for ax, key, title in zip(
        axes,
        ("ratio_to_best_peer", "share_of_floor"),
        ("times the best transformers backend", "share of the machine's floor"),
        strict=True,
    ):
        ax.barh(
            labels,
            [r[key] for r in rows],
            color=["#3b6ea5" if r["dtype"] == "float32" else "#c46a2b" for r in rows],
        )
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xlabel(title)
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
