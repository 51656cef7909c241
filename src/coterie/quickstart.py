"""`coterie quickstart`: a dense and an MoE decoder of equal active parameters, trained on the same tokens.

One file tells the whole job: plan, train both, measure on held-out files, write report and checkpoints.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from coterie.data import VOCAB_SIZE, ByteWindows, byte_tokenizer
from coterie.models import Decoder, DecoderConfig, save_pretrained
from coterie.recipe.measure import corpora, look_inside, measure_arm, sample
from coterie.recipe.recipe import SIZES
from coterie.report import Arm, Report, compare, format_duration, write_report
from coterie.report.html import write_whole
from coterie.reproduce.run import environment
from coterie.train import History, PeakMemory, fit, language_model_loss

MOE = DecoderConfig(VOCAB_SIZE, **SIZES)
DENSE = replace(MOE, num_experts=0, expert_hidden=0)
SEQ_LEN, BATCH_SIZE, LEARNING_RATE, BALANCE = 128, 8, 4e-3, 0.02
STEPS = 2000


@dataclass
class Plan:
    """What a run does; written before it starts, so that `--resume` goes on with the same."""

    text: list[str]
    seed: int
    steps: int
    finished: bool = False


def quickstart(
    text: Sequence[str | Path] = (),
    out: str | Path = "coterie-quickstart",
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool | None = None,
) -> Report | None:
    """Trains both models and writes `report.html`, `results.json` and the checkpoints `moe/`, `dense/`.

    Args:
        text: files and folders to read; none takes the Python standard library's own sources.
        out: a folder that is new, empty, or holds an earlier quickstart.
        minutes: about how long both trainings may take together; a short timing of both models sets the
            number of steps, the same for both. None takes the default number of steps.
        steps: number of optimizer steps of each model, instead of `minutes`.
        seed: of weights, data split and data order.
        resume: go on with the unfinished run in `out`; text, steps and seed are that run's.
        progress: show progress bars; None shows them on a terminal.

    Returns the report, or None when interrupted (what was trained is kept; call again with resume=True).

    Raises ValueError for text that is missing, empty or too small, and for an `out` that holds something
    else or an unfinished run.
    """
    began = time.perf_counter()
    out = Path(out)
    plan = _plan(out, [str(p) for p in text], seed, steps, minutes, resume)
    train, heldout = _corpora(plan)
    out.mkdir(parents=True, exist_ok=True)
    if plan.steps == 0:
        plan.steps = _steps_within(float(minutes or 0), train, plan.seed)
    _save_plan(out, plan)

    arms, models = [], {}
    for label, config in (("dense", DENSE), ("MoE", MOE)):
        torch.manual_seed(plan.seed)
        model = Decoder(config)
        history, peak = _train(model, train, heldout, plan, out / "training" / label, resume, label, progress)
        if history.interrupted:
            return None
        arms.append(measure_arm(label, model, history, peak, heldout, BATCH_SIZE))
        models[label] = model
        save_pretrained(model, out / label.lower(), byte_tokenizer(config.max_len))

    report = _report(arms, models["MoE"], train, heldout, plan)
    report.provenance["wall time"] = format_duration(time.perf_counter() - began)
    write_whole(out / "results.json", report.to_json())
    write_report(out / "report.html", report)
    _save_plan(out, replace(plan, finished=True))
    shutil.rmtree(out / "training")
    return report


def _plan(
    out: Path, text: list[str], seed: int, steps: int | None, minutes: float | None, resume: bool
) -> Plan:
    if steps is not None and minutes is not None:
        raise ValueError("give steps or minutes, not both")
    for name, value in (("steps", steps), ("minutes", minutes)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}; should be more than 0")
    saved = out / "plan.json"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not saved.exists()):
        raise ValueError(f"{out} holds something that is no quickstart; give --out a new or an empty folder")
    earlier = Plan(**json.loads(saved.read_text())) if saved.exists() else None
    if resume:
        if earlier is None or earlier.finished:
            raise ValueError(f"{out} holds no unfinished run to resume; leave --resume out to start one")
        return earlier
    if earlier and not earlier.finished:
        raise ValueError(f"{out} holds an unfinished run; go on with --resume, or give another --out")
    return Plan(text, seed, steps or (0 if minutes else STEPS))


def _corpora(plan: Plan) -> tuple[ByteWindows, ByteWindows]:
    return corpora(plan.text, SEQ_LEN, BATCH_SIZE, heldout=0.1, seed=plan.seed)


def _steps_within(minutes: float, train: ByteWindows, seed: int) -> int:
    """Steps of each model that fit into `minutes` for both, by timing a few of each."""
    seconds_per_step = 0.0
    for config in (DENSE, MOE):
        history = fit(
            Decoder(config),
            train,
            loss=language_model_loss(balance=BALANCE),
            steps=12,
            batch_size=BATCH_SIZE,
            seed=seed,
            progress=False,
        )
        if history.interrupted:
            raise KeyboardInterrupt
        seconds_per_step += float(np.median(history.seconds))
    return max(20, int(minutes * 60 / seconds_per_step))


def _train(
    model: Decoder,
    train: ByteWindows,
    heldout: ByteWindows,
    plan: Plan,
    folder: Path,
    resume: bool,
    label: str,
    progress: bool | None,
) -> tuple[History, int]:
    with PeakMemory() as peak:
        history = fit(
            model,
            train,
            loss=language_model_loss(balance=BALANCE),
            steps=plan.steps,
            batch_size=BATCH_SIZE,
            lr=LEARNING_RATE,
            eval_data=sample(heldout, 128),
            eval_every=max(1, plan.steps // 10),
            save_every=max(1, plan.steps // 10),
            out=folder,
            resume=resume,
            seed=plan.seed,
            progress=progress,
            label=label,
        )
    return history, peak.bytes


def _report(arms: list[Arm], moe: Decoder, train: ByteWindows, heldout: ByteWindows, plan: Plan) -> Report:
    columns, rows = compare(arms)
    corpus = heldout.corpus
    return Report(
        title="Coterie quickstart",
        arms=arms,
        columns=columns,
        rows=rows,
        **look_inside(moe, heldout, plan.seed),
        provenance={
            "command": _command(plan),
            "text": ", ".join(plan.text) or "the Python standard library's own sources",
            "files": f"{len(train.corpus.files)} for training, {len(corpus.files)} held out",
            "bytes": f"{train.corpus.num_bytes:,} for training, {corpus.num_bytes:,} held out",
            "seed": str(plan.seed),
            "steps": f"{plan.steps} of {BATCH_SIZE} × {SEQ_LEN} bytes, the same for both models",
            **environment(),
        },
    )


def _command(plan: Plan) -> str:
    options = ["--steps", str(plan.steps), "--seed", str(plan.seed)]
    return shlex.join(["coterie", "quickstart", *(o for p in plan.text for o in ("--text", p)), *options])


def _save_plan(out: Path, plan: Plan) -> None:
    write_whole(out / "plan.json", json.dumps(asdict(plan), indent=1))


def print_report(report: Report, out: Path) -> None:
    """The table, the headline, a sample and where everything lies, on standard output."""
    from coterie.report import print_table

    print_table(report.title, report.columns, report.rows)
    print(f"\n{report.headline}\n\nThe MoE goes on from a held-out text:\n")
    print(f"{report.prompt}▸{report.sample}\n")
    print(f"report      {out / 'report.html'}\ncheckpoints {out / 'moe'}, {out / 'dense'}")
    print(f"wall time   {report.provenance['wall time']}")
    sys.stdout.flush()
