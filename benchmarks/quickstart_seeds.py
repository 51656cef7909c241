"""The quickstart over several seeds: `python -m benchmarks.quickstart_seeds [--seeds 3] [--out DIR]`.

Prints the quickstart's table as mean ± standard deviation over seeds, and how far the MoE is ahead.
"""

import argparse
import json
import statistics
from pathlib import Path

from coterie.quickstart import quickstart
from coterie.report import format_bytes, format_count, format_number, format_rate, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="per model; the quickstart's own by default")
    parser.add_argument("--out", type=Path, default=Path("quickstart-seeds"))
    options = parser.parse_args()
    reports = [run(seed, options.steps, options.out / f"seed-{seed}") for seed in range(options.seeds)]
    rows = [
        [name, *(spread([getattr(r.arms[i], field) for r in reports], show) for i in (0, 1))]
        for name, field, show in MEASURES
    ]
    print_table(f"quickstart, mean ± sd over {options.seeds} seeds", ["", "dense", "MoE"], rows)
    ahead = [r.arms[0].held_out - r.arms[1].held_out for r in reports]
    each = ", ".join(f"{a:.4f}" for a in ahead)
    print(f"MoE ahead by, bits per byte: {each}; mean {statistics.mean(ahead):.4f}")
    print(f"wall time of each run: {', '.join(r.provenance['wall time'] for r in reports)}")
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


def run(seed, steps, out):
    if (out / "plan.json").exists() and not json.loads((out / "plan.json").read_text())["finished"]:
        report = quickstart(out=out, resume=True)
    else:
        report = quickstart(out=out, steps=steps, seed=seed)
    if report is None:
        raise SystemExit("interrupted; the same command goes on")
    return report


def spread(values, show):
    if None in values:
        return "–"
    mean = show(statistics.mean(values))
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return mean if deviation == 0 else f"{mean} ± {show(deviation)}"


if __name__ == "__main__":
    main()
