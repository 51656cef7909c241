"""Expert forward of MoE++ beside a vanilla MoE: `python -m benchmarks.moe_plus_plus [--json FILE]`.

Both have the same feed-forward experts and send every token to two experts; MoE++ adds two constant, one copy
and one zero expert. Timed is what the paper times: slots sorted by expert, experts run, results combined, for
one layer without gradients. An untrained router knows no τ, so its logits are offset until the feed-forward
experts get the share of slots that training to balance aims at, τ F / (τ F + Z). Rounds are interleaved.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from coterie.kernels import default_backend
from coterie.language.moe_plus_plus import moe_plus_plus
from coterie.nn import LinearScore, MoE, Router, SwiGLUExperts, TopK
from coterie.report import print_table

PAPER = "1.1 to 2.1 times (abstract); 8 + 4 experts of 0.6B: 1.25 at τ = 0.75, 2.64 at τ = 0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=768, help="the paper's 0.6B model by default")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8, help="feed-forward experts")
    parser.add_argument("--taus", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="torch's own number by default")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = measure(options)
    rows = [
        [
            name,
            f"{arm['ffn_per_token']:.2f}",
            f"{1e3 * arm['seconds']:.1f}",
            f"{options.tokens / arm['seconds']:,.0f}",
            f"{arm['ratio']:.2f} ({arm['ratio_low']:.2f}–{arm['ratio_high']:.2f})",
            f"{arm['ratio_of_ffn']:.2f}",
        ]
        for name, arm in result["arms"].items()
    ]
    columns = [
        "layer",
        "FFN experts per token",
        "median ms",
        "tokens/s",
        "times vanilla (quartiles)",
        "at most, by FFN experts",
    ]
    print_table(result["setting"], columns, rows)
    print(f"paper: {PAPER}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.dim, dtype=getattr(torch, options.dtype))
    bank = SwiGLUExperts(options.experts, options.dim, options.hidden)
    layers = {"vanilla top-2": MoE(Router(LinearScore(options.dim, options.experts), TopK(2)), bank)}
    for tau in options.taus:
        layers[f"MoE++, τ = {tau:g}"] = moe_plus_plus(
            bank, options.dim, tau=tau, capacity_factor=None, gating_residual=False
        )
    routings = {}
    for (name, layer), tau in zip(layers.items(), [None, *options.taus], strict=True):
        layer.to(x.dtype).eval()
        routings[name] = route(layer, x, options.experts, tau)
    seconds = {name: [] for name in layers}
    for round_ in range(options.rounds + 2):
        for name, layer in layers.items():
            routing = replace(routings[name])  # forgets the sorted slots, so that sorting is timed
            began = time.perf_counter()
            layer.experts(x, routing)
            if round_ >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - began)
    vanilla = seconds["vanilla top-2"]
    arms = {}
    for name, times in seconds.items():
        ratios = sorted(v / t for v, t in zip(vanilla, times, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        used = routings[name].load[: options.experts].sum().item() / options.tokens
        arms[name] = {
            "ffn_per_token": used,
            "seconds": statistics.median(times),
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
            "ratio_of_ffn": 2 / used,
        }
    setting = (
        f"{options.tokens} tokens, {options.dim} → {options.hidden}, {options.experts} experts, "
        f"{options.dtype}, {default_backend()} kernel, {torch.get_num_threads()} threads, "
        f"{platform.machine()}"
    )
    return {"setting": setting, "paper": PAPER, "rounds": options.rounds, "arms": arms}


def route(layer, x, num_ffn, tau):
    """The layer's routing of x, zero-cost logits offset until slots are shared out as at balance."""
    router = layer.router
    logits = router.score(x)
    if tau is None:
        return router.select(logits)
    zero_cost = logits.shape[1] - num_ffn
    target = 2 * tau * num_ffn / (tau * num_ffn + zero_cost)
    low, high = -20.0, 20.0
    for _ in range(40):
        offset = (low + high) / 2
        shifted = logits.clone()
        shifted[:, num_ffn:] += offset
        routing = router.select(shifted)
        used = routing.load[:num_ffn].sum().item() / len(x)
        low, high = (offset, high) if used > target else (low, offset)
    return routing


if __name__ == "__main__":
    main()
