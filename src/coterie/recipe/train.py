"""`coterie train lm`: one recipe, trained, measured, kept."""

import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from coterie.data import ByteWindows, byte_tokenizer
from coterie.models import Decoder, load_weights, save_pretrained, save_weights
from coterie.recipe.build import build, loss_of
from coterie.recipe.measure import corpora, look_inside, measure_arm, sample
from coterie.recipe.recipe import Recipe
from coterie.recipe.systems import Method
from coterie.report import Report, compare, format_duration, print_table, write_report
from coterie.report.html import write_whole
from coterie.reproduce.run import environment
from coterie.train import History, PeakMemory, fit


def train_lm(
    recipe: Recipe | None,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool | None = None,
) -> Report | None:
    """Trains a recipe and writes `recipe.yaml`, `model.safetensors`, `report.html` and `results.json`.

    A model that transformers knows, which is one with the default router and experts, or dense, is also
    written as a Hugging Face checkpoint, `checkpoint/`.

    Args:
        recipe: what to train; None, with resume, for the one in `out`.
        out: a folder that is new, empty, or holds an earlier run.
        resume: go on with the unfinished run in `out`.
        progress: show a progress bar; None shows it on a terminal.

    Returns the report, or None when interrupted (what was trained is kept; call again with resume=True).

    Raises ValueError for text that is missing or too small, parts that do not fit, and an `out` that holds
    something else, an unfinished run, or another recipe's.
    """
    began = time.perf_counter()
    out = Path(out)
    recipe = _plan(recipe, out, resume)
    train, heldout = corpora_of(recipe)
    torch.manual_seed(recipe.train.seed)
    method = build(recipe)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    write_whole(out / "recipe.yaml", recipe.to_yaml())
    with PeakMemory() as peak:
        history = train_method(
            recipe, method, train, heldout, out=out / "training", resume=resume, progress=progress
        )
    if history.interrupted:
        return None
    arm = measure_arm(recipe.name, method.model, history, peak.bytes, heldout, recipe.train.batch_size)
    columns, rows = compare([arm])
    report = Report(
        title=recipe.name,
        arms=[arm],
        columns=columns,
        rows=rows,
        **look_inside(method.model, heldout, recipe.train.seed),
        provenance={
            "command": f"coterie train lm {out / 'recipe.yaml'}",
            "text": ", ".join(recipe.text) or "the Python standard library's own sources",
            "bytes": f"{train.corpus.num_bytes:,} for training, {heldout.corpus.num_bytes:,} held out",
            **environment(),
            "wall time": format_duration(time.perf_counter() - began),
        },
    )
    _save(method.model, out, recipe)
    write_report(out / "report.html", report)
    write_whole(out / "results.json", report.to_json())
    shutil.rmtree(out / "training")
    return report


def train_method(
    recipe: Recipe,
    method: Method,
    train: ByteWindows,
    heldout: ByteWindows,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> History:
    """The training of a recipe, by `fit`."""
    options = asdict(recipe.train)
    for name in ("seq_len", "heldout"):
        del options[name]
    every = max(1, recipe.train.steps // 10)
    return fit(
        method.model,
        train,
        loss=loss_of(recipe, method),
        callbacks=method.callbacks,
        eval_data=sample(heldout, 128),
        eval_every=every,
        save_every=every if out else None,
        out=out,
        resume=resume,
        progress=progress,
        label=recipe.name,
        **options,
    )


def load_trained(folder: str | Path) -> Decoder:
    """The decoder that `coterie train lm` left in a folder, in evaluation mode.

    Raises:
        ValueError: the folder holds no finished run.
    """
    folder = Path(folder)
    for name in ("recipe.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no trained model (no {name}); give the --out of a finished run")
    model = build(Recipe.read(folder / "recipe.yaml")).model
    load_weights(model, folder / "model.safetensors")
    return model.eval()


def corpora_of(recipe: Recipe) -> tuple[ByteWindows, ByteWindows]:
    """Training and held-out windows of a recipe."""
    how = recipe.train
    return corpora(recipe.text, how.seq_len, how.batch_size, heldout=how.heldout, seed=how.seed)


def print_trained(report: Report, out: Path) -> None:
    """The table, a sample and where everything lies, on standard output."""
    print_table(report.title, report.columns, report.rows)
    print(f"\n{report.headline}\n\n{report.prompt}▸{report.sample}\n")
    print(f"report      {out / 'report.html'}\nmodel       {out / 'model.safetensors'}")
    if (out / "checkpoint").exists():
        print(f"checkpoint  {out / 'checkpoint'} (loads with transformers)")
    print(f"wall time   {report.provenance['wall time']}")
    sys.stdout.flush()


def _plan(recipe: Recipe | None, out: Path, resume: bool) -> Recipe:
    saved = out / "recipe.yaml"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not saved.exists()):
        raise ValueError(
            f"{out} holds something that is no training run; give --out a new or an empty folder"
        )
    earlier = Recipe.read(saved) if saved.exists() else None
    unfinished = earlier is not None and not (out / "results.json").exists()
    if not resume:
        if unfinished:
            raise ValueError(f"{out} holds an unfinished run; go on with --resume, or give another --out")
        assert recipe is not None, "a recipe is needed to start a run"
        return recipe
    if earlier is None or not unfinished:
        raise ValueError(f"{out} holds no unfinished run to resume; leave --resume out to start one")
    if recipe is not None and recipe != earlier:
        raise ValueError(f"{saved} differs from the recipe given; leave the recipe out to resume that run")
    return earlier


def _save(model: Decoder, out: Path, recipe: Recipe) -> None:
    save_weights(model, out / "model.safetensors")
    if _known_to_transformers(recipe):
        save_pretrained(model, out / "checkpoint", byte_tokenizer(model.config.max_len))
    elif (out / "checkpoint").exists():
        shutil.rmtree(out / "checkpoint")  # an earlier run's


def _known_to_transformers(recipe: Recipe) -> bool:
    return not (recipe.system or recipe.router or recipe.score or recipe.experts)
