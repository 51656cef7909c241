"""The quickstart over several seeds: `python -m benchmarks.quickstart_seeds [--seeds 3] [--out DIR]`.

Prints the quickstart's table as mean ± standard deviation over seeds, and how far the MoE is ahead.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.quickstart import quickstart
from coterie.report import format_bytes, format_count, format_number, format_rate, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="per model; the quickstart's own by default")
    parser.add_argument("--out", type=Path, default=Path("quickstart-seeds"))
    options = parser.parse_args()
    results = [run(seed, options.steps, options.out / f"seed-{seed}") for seed in range(options.seeds)]
    rows = [
        [name, *(spread([r["arms"][i][field] for r in results], show) for i in (0, 1))]
        for name, field, show in MEASURES
    ]
    print_table(f"quickstart, mean ± sd over {options.seeds} seeds", ["", "dense", "MoE"], rows)
    ahead = [r["arms"][0]["held_out"] - r["arms"][1]["held_out"] for r in results]
    each = ", ".join(f"{a:.4f}" for a in ahead)
    print(f"MoE ahead by, bits per byte: {each}; mean {statistics.mean(ahead):.4f}")
    print(f"wall time of each run: {', '.join(r['provenance']['wall time'] for r in results)}")
    (options.out / "table.json").write_text(json.dumps({"rows": rows, "ahead": ahead}, indent=1))


def three(value: float) -> str:
    return format_number(value, 3)


MEASURES = [
    ("total parameters", "total_parameters", format_count),
    ("active parameters per token", "active_parameters", format_count),
    ("training tokens", "tokens", format_count),
    ("held-out bits per byte", "held_out", three),
    ("training tokens per second", "tokens_per_second", format_rate),
    ("peak memory", "peak_memory", format_bytes),
    ("worst expert load, max / mean", "imbalance", format_number),
    ("routing entropy, nats", "entropy", format_number),
]


def run(seed: int, steps: int | None, out: Path) -> dict[str, Any]:
    """The results of one seed: those in `out` when it is finished, else of running or resuming it."""
    plan = json.loads((out / "plan.json").read_text()) if (out / "plan.json").exists() else None
    if plan is None or not plan["finished"]:
        report = quickstart(out=out, steps=None if plan else steps, seed=seed, resume=plan is not None)
        if report is None:
            raise SystemExit("interrupted; the same command goes on")
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def spread(values: list[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = statistics.stdev(known) if len(known) > 1 else 0
    mean = show(statistics.mean(known))
    return mean if deviation == 0 else f"{mean} ± {show(deviation)}"


if __name__ == "__main__":
    main()
