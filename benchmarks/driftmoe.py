"""DriftMoE beside what river has for streams: `python -m benchmarks.driftmoe [--quick] [--json FILE]`.

Every model predicts and learns the same rows, in turns of 250 rows each, so that all of them meet the same
load of the machine. Timed is predict_one and learn_one; making the rows is not. Memory is what river's own
`_raw_memory_usage` finds in the model after the last row.
"""

import argparse
import json
import platform
import sys
import time
from itertools import islice
from pathlib import Path

from river import ensemble, forest, tree

from coterie.data import led_drift, rbf_drift, read_stream, sea_drift
from coterie.report import print_table
from coterie.reproduce.run import environment
from coterie.stream import DriftMoEClassifier, PrequentialScore

TREE = {"grace_period": 50, "delta": 1e-7}
TURN = 250


def models(seed):
    return {
        "DriftMoE, batch 32": DriftMoEClassifier(**TREE, router_batch=32, seed=seed),
        "DriftMoE, batch 32, best mask": DriftMoEClassifier(**TREE, router_batch=32, mask="best", seed=seed),
        "DriftMoE, batch 256": DriftMoEClassifier(**TREE, router_batch=256, seed=seed),
        "DriftMoE, task": DriftMoEClassifier(**TREE, mode="task", seed=seed),
        "ARF(10)": forest.ARFClassifier(n_models=10, seed=seed),
        "leveraging bagging(10)": ensemble.LeveragingBaggingClassifier(
            tree.HoeffdingTreeClassifier(**TREE), n_models=10, seed=seed
        ),
        "Hoeffding tree": tree.HoeffdingTreeClassifier(**TREE),
        "Hoeffding adaptive tree": tree.HoeffdingAdaptiveTreeClassifier(**TREE, seed=seed),
    }


def streams(data, rows, seed):
    segment = rows // 4
    found = {
        "SEA abrupt": sea_drift(segment, seed=seed),
        "SEA gradual": sea_drift(segment, width=segment // 2, seed=seed),
        "LED abrupt": led_drift(segment, seed=seed),
        "LED gradual": led_drift(segment, width=segment // 2, seed=seed),
        "RBF": rbf_drift(rows, seed=seed),
    }
    if data is not None:
        found["Electricity"] = read_stream(data, "class")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="of each synthetic stream")
    parser.add_argument("--data", type=Path, default=None, help="elec.csv, all of its rows")
    parser.add_argument("--quick", action="store_true", help="1000 rows of each stream")
    parser.add_argument("--only", nargs="+", default=None, help="streams to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    options = parser.parse_args()
    rows = 1000 if options.quick else options.rows
    result = {"rows": rows, "seed": options.seed, "environment": environment(), "streams": {}}
    for name, stream in streams(options.data, rows, options.seed).items():
        if options.only is not None and name not in options.only:
            continue
        measured = measure(list(islice(stream, 1000) if options.quick else stream), options.seed)
        result["streams"][name] = measured
        arf = measured["ARF(10)"]
        columns = ["model", "accuracy", "kappa-M", "kappa-T", "instances/s", "times ARF(10)", "MiB"]
        lines = [
            [
                model,
                f"{m['accuracy']:.4f}",
                f"{m['kappa_m']:.3f}",
                f"{m['kappa_t']:.3f}",
                f"{m['per_second']:,.0f}",
                f"{m['per_second'] / arf['per_second']:.2f}",
                f"{m['bytes'] / 2**20:.1f}",
            ]
            for model, m in measured.items()
        ]
        print_table(f"{name}, {arf['instances']:,} rows", columns, lines)
        sys.stdout.flush()
    for variant in (name for name in models(0) if name.startswith("DriftMoE")):
        won = [
            name
            for name, s in result["streams"].items()
            if s[variant]["per_second"] >= s["ARF(10)"]["per_second"]
            and s[variant]["accuracy"] >= s["ARF(10)"]["accuracy"]
        ]
        of = len(result["streams"])
        print(f"{variant}: as fast and as accurate as ARF(10) on {len(won)} of {of}: {', '.join(won)}")
    print(f"{result['environment']['versions']}; {result['environment']['machine']}, {platform.processor()}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(rows, seed):
    arms = models(seed)
    scores = {name: PrequentialScore(1000) for name in arms}
    seconds = dict.fromkeys(arms, 0.0)
    for at in range(0, len(rows), TURN):
        for name, model in arms.items():
            predicted = []
            began = time.perf_counter()
            for x, y in rows[at : at + TURN]:
                predicted.append(model.predict_one(x))
                model.learn_one(x, y)
            seconds[name] += time.perf_counter() - began
            for (_, y), guess in zip(rows[at : at + TURN], predicted, strict=True):
                scores[name].update(y, guess)
    return {
        name: {
            "instances": len(rows),
            "accuracy": (values := scores[name].values())["acc"],
            "kappa_m": values["kappa_m"],
            "kappa_t": values["kappa_t"],
            "seconds": seconds[name],
            "per_second": len(rows) / seconds[name],
            "bytes": model._raw_memory_usage,
        }
        for name, model in arms.items()
    }


if __name__ == "__main__":
    main()
