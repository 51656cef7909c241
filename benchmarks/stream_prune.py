"""Memory and time to inspect a checkpoint and to save it with half of its experts, on the CPU.

    python -m benchmarks.make_checkpoint /tmp/big
    python -m benchmarks.stream_prune /tmp/big [--tokens 4096] [--json FILE]

Every phase is a process of its own. Its peak resident memory is what the system counted; beside it, sampled
every 20 ms, is the process's own part: without pages of mapped files, which the system can take back.

inspect     every expert's gating · norm importance over random tokens, one layer in memory at a time
prune       half of the experts of every layer kept by it, saved
offload     through transformers and accelerate, most weights offloaded to disk: how often each router chose
            each expert, on the same tokens. Less than inspect does: weights that are offloaded can neither be
            recorded expert by expert at that price nor edited.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PHASES = ("inspect", "prune", "offload")
SEQUENCE = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cpu-memory", default="2GiB", help="that accelerate may fill with weights")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        run_phase(options)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as work:
        for phase in options.phases.split(","):
            command = [sys.executable, "-m", "benchmarks.stream_prune", *sys.argv[1:], "--phase", phase]
            done = subprocess.run([*command, "--work", work], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            peaks = f"peak {row['peak_bytes'] / 1e9:6.2f} GB, its own {row['peak_own_bytes'] / 1e9:6.2f} GB"
            print(f"{phase:8} {peaks}  {row['seconds']:7.1f} s", flush=True)
    size = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    print(f"checkpoint {size / 1e9:.2f} GB, largest layer {largest_layer(options.folder) / 1e9:.2f} GB")
    if options.json:
        options.json.write_text(json.dumps({"bytes": size, "tokens": options.tokens, "rows": rows}, indent=1))


def run_phase(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    own = {"peak": 0}
    threading.Thread(target=sample, args=(own,), daemon=True).start()
    {"inspect": inspect, "prune": prune, "offload": offload}[options.phase](options)
    row = {
        "phase": options.phase,
        "seconds": time.perf_counter() - started,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_own_bytes": own["peak"],
    }
    print(json.dumps(row))


def sample(own: dict[str, int]) -> None:
    while True:
        with open("/proc/self/status") as lines:
            kib = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        own["peak"] = max(own["peak"], 1024 * kib)
        time.sleep(0.02)


def inspect(options: argparse.Namespace) -> None:
    from coterie.hf import Checkpoint, stream_records
    from coterie.shrink import importance, kept_experts

    kept = []
    checkpoint = Checkpoint(options.folder, experts_implementation="coterie")
    for block, record in stream_records(checkpoint, random_batches(options)):
        [score_E] = importance([record], "gating-norm")
        kept.append(kept_experts(score_E, block.num_experts // 2))
    (options.work / "kept.json").write_text(json.dumps(kept))


def prune(options: argparse.Namespace) -> None:
    from coterie.hf import save_pruned

    kept = json.loads((options.work / "kept.json").read_text())
    save_pruned(options.folder, kept, options.work / "pruned")


def offload(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        options.folder,
        device_map="auto",
        max_memory={"cpu": options.cpu_memory},
        offload_folder=options.work / "offload",
    )
    counts = [torch.zeros(model.config.num_experts) for _ in model.model.layers]

    def count(number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            counts[number] += output[-1].flatten().bincount(minlength=model.config.num_experts)

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(count(number))
    with torch.no_grad():  # as one batch: every batch reads all offloaded weights again
        model.model(torch.cat(random_batches(options)), use_cache=False)


def random_batches(options: argparse.Namespace) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = json.loads((options.folder / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (options.tokens // SEQUENCE, SEQUENCE), generator=generator)
    return list(ids.split(1))


def largest_layer(folder: Path) -> int:
    from coterie.hf import Checkpoint

    checkpoint = Checkpoint(folder)
    names = checkpoint.layers
    state = checkpoint.model.state_dict()
    return max(sum(t.nbytes for n, t in state.items() if n.startswith(f"{layer}.")) for layer in names)


if __name__ == "__main__":
    main()
