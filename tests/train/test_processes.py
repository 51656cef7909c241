"""One process and two see the same batches and take the same steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, signal, sys
import torch
from accelerate import PartialState
from tiny import TinyMoE, tiny_data
from coterie.train import LossFreeBias, fit

torch.set_num_threads(1)
out, resume = sys.argv[1], len(sys.argv) > 2
torch.manual_seed(0)
model = TinyMoE(dropout=0.0)

class CtrlCOnTheLastRank:
    def on_step(self, run):
        state = PartialState()
        if run.step == 8 and out != "-" and not resume and state.is_last_process:
            os.kill(os.getpid(), signal.SIGINT)

history = fit(model, tiny_data(), steps=14, batch_size=4, accumulate=2, lr=1e-2, progress=False,
              eval_data=tiny_data(7, seed=1), eval_every=5, resume=resume,
              callbacks=[LossFreeBias(0.01), CtrlCOnTheLastRank()], out=None if out == "-" else out)
if PartialState().is_main_process:
    weights = [p.double().sum().item() for p in model.state_dict().values()]
    print(json.dumps({"history": json.loads(history.to_json()), "weights": weights}))
"""


def train(script: Path, launch: list[str], *arguments: str) -> tuple[dict[str, object], list[float]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return result["history"], result["weights"]


def test_two_processes_give_the_curve_of_one_and_agree_on_ctrl_c_and_resume(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    one, one_weights = train(script, [], "-")
    broken, _ = train(script, launch, str(tmp_path / "out"))
    assert broken["interrupted"]
    assert broken["step"] == list(range(1, 10))  # both ranks stopped after the same step
    two, two_weights = train(script, launch, str(tmp_path / "out"), "resume")
    assert two["step"] == one["step"] == list(range(1, 15))
    for name in ("loss", "cross_entropy", "tokens", "imbalance"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    for ours, theirs in zip(two["evals"], one["evals"], strict=True):  # type: ignore[arg-type]
        assert ours["tokens"] == theirs["tokens"] == 7 * 8
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-4)
    assert two_weights == pytest.approx(one_weights, rel=1e-3, abs=1e-4)
