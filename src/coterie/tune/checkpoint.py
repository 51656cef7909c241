"""A checkpoint on disk that should forget a text: from checks to the new folder.

unlearn_checkpoint(folder, out, forget="topic.txt", retain="rest.txt", method="npo", stop_forget=0.2)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import (
    calibration_ids,
    check_expressible,
    find_moe_blocks,
    interleaved_speed,
    load,
    outline,
    save,
)
from coterie.hf.calibration import read_tokenizer, within_positions
from coterie.hf.kept import identity, kept_folder, remove_kept
from coterie.hf.progress import Show, showing
from coterie.hf.save import bytes_on_disk, check_output, copy_side_files
from coterie.tune.attribute import attribute_experts
from coterie.tune.batch import Batch
from coterie.tune.history import FORGET, Step
from coterie.tune.kept import Kept
from coterie.tune.losses import METHODS
from coterie.tune.measure import choices, overlap, predict
from coterie.tune.result import Known, TargetExpert, Unlearned
from coterie.tune.trainable import SCOPES, Slice, replaced, scope_slices, snapshot
from coterie.tune.unlearn import check_lr, default_lr, unlearn

NOTE = "unlearned.json"
"""What `unlearn_checkpoint` writes beside the weights: what was done to them, as JSON."""

_EVALUATE_EVERY = 5  # steps between looks at the held-out text
_KEEP_EVERY = 5  # steps that are done again at most after a crash


def unlearn_checkpoint(
    folder: Path | str,
    out: Path | str | None,
    *,
    forget: Path | str,
    retain: Path | str,
    method: str = "ga",
    scope: str = "expert",
    experts: int = 1,
    steps: int = 60,
    lr: float | None = None,
    stop_forget: float | None = None,
    batch_size: int = 16,
    max_tokens: int = 131072,
    seq_len: int = 512,
    dry_run: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Unlearned:
    """Makes a checkpoint forget a text. What is written loads with plain transformers.

    The last tenth of each text is held out: it is what perplexity, accuracy and overlap are measured on, and
    what `stop_forget` is about.

    What is trained is kept in the folder `OUT.calibration`, with its moments and what was found before, until
    the new checkpoint is written, so that an interrupted run goes on where it stopped when it is started
    again. `steps` and `stop_forget` may then be others.

    Args:
        folder: a checkpoint of a mixture of experts, with its tokenizer.
        out: a new folder; None only in a dry run.
        forget: text to forget; see `coterie.hf.calibration_ids`.
        retain: text to keep. Methods without a loss on it are measured on it.
        method: one of METHODS.
        scope: what is trained, one of SCOPES.
        experts: how many are unlearned, in the scope "expert".
        steps: at most.
        lr: learning rate; None for 1e-4 in the scope "expert" and 5e-5 in the others.
        stop_forget: end when the next-token accuracy on held-out text to forget is at or below it, 0 to 1.
        batch_size: sequences.
        max_tokens: of each text at most.
        seq_len: tokens of a sequence.
        dry_run: find the target, and write nothing.
        seed: of the order of sequences, and rmu's direction.
        progress: True for a bar, False for silence, None for a bar on a terminal and plain lines elsewhere.

    Raises:
        ValueError: before the model runs: no mixture of experts, text that is missing, too short or of
            another tokenizer, twice the same text, an output folder that is taken, an argument that is
            unknown or out of range; while it trains: a loss that is not finite; what cannot be written.
        KeyboardInterrupt: Ctrl-C; nothing is written but what is kept to go on with.
    """
    folder, out = Path(folder), None if out is None else Path(out)
    wanted = {"steps": (steps, 1), "batch_size": (batch_size, 1)}
    wanted |= {"seq_len": (seq_len, 2), "max_tokens": (max_tokens, 1)}
    for name, (value, least) in wanted.items():
        if value < least:
            raise ValueError(f"{name}={value}; use at least {least}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; use 0 ≤ seed < 2**63")
    config = _check(folder, out, method, scope, experts, lr, stop_forget, dry_run)
    tokenizer = read_tokenizer(folder)
    seq_len = within_positions(config, seq_len)
    read = {"tokens": max_tokens, "length": seq_len, "vocab_size": config.vocab_size}
    ids = [calibration_ids(path, tokenizer, **read) for path in (forget, retain)]
    if torch.equal(*ids):
        raise ValueError(f"{forget} and {retain} hold the same text; nothing could be kept")
    sides = [_split(path, text, batch_size, seed) for path, text in zip((forget, retain), ids, strict=True)]
    (seen, tested), (kept, tested_kept) = sides
    model = load(folder, dtype="auto")
    blocks = find_moe_blocks(model)
    disk = bytes_on_disk(folder)
    lr = default_lr(scope) if lr is None else lr
    kept_at = None
    if out is not None and not dry_run:
        settings = (method, scope, experts, lr, seed, config.to_json_string())
        texts = [[batch.ids_BS for batch in batches] for batches in (seen, tested, kept, tested_kept)]
        kept_at = kept_folder(out, identity(folder, texts, settings))
    with showing(len(seen) + (0 if dry_run else steps), progress) as show:
        if kept_at is not None and kept_at.parent.exists() and not kept_at.exists():
            show.note(f"{kept_at.parent} is of another text, model or option: starting anew")
        keep = None if kept_at is None else Kept(kept_at, every=_KEEP_EVERY, say=show.note)
        affinity = attribute_experts(
            model,
            seen,
            blocks,
            keep=keep,
            on_batch=lambda: show.step("looking for the experts that know it"),
        )
        targets = affinity.top(experts)
        show.say("measuring the checkpoint on held-out text")
        done = Unlearned(
            source=str(folder),
            out=None,
            method=method,
            scope=scope,
            targets=[TargetExpert(affinity.names[t.layer], t.expert, affinity[t]) for t in targets],
            margin=affinity.margin(experts),
            texts=(str(forget), str(retain)),
            tokens=(_count(seen), _count(kept)),
            heldout_tokens=(_count(tested), _count(tested_kept)),
            before=Known(predict(model, tested), predict(model, tested_kept), disk),
            stop_forget=stop_forget,
        )
        if dry_run or out is None:
            return done
        before = choices(model, blocks, tested)
        slices = scope_slices(model, blocks, targets, scope)
        original = snapshot(slices)

        def evaluate(model: PreTrainedModel) -> Mapping[str, float]:
            return {FORGET: predict(model, tested).accuracy, "retain": predict(model, tested_kept).accuracy}

        trained = unlearn(
            model,
            seen,
            kept,
            method=method,
            scope=scope,
            targets=targets,
            steps=steps,
            lr=lr,
            evaluate=evaluate,
            evaluate_every=_EVALUATE_EVERY,
            stop_at=stop_forget,
            seed=seed,
            keep=keep,
            on_step=lambda step: _tell(show, len(seen), step),
        )
        show.say("measuring the new one")
        done.trained, done.trained_share = trained.trained, trained.trained_share
        done.reached = trained.reached if stop_forget is not None else None
        done.history = trained.history
        done.overlap = overlap(before, choices(model, blocks, tested))
        done.after = Known(predict(model, tested), predict(model, tested_kept), disk)
        _measure_speed(done, model, slices, original, [*tested, *tested_kept])
        show.say(f"writing {out}")
        done = _write(done, model, out)
        if kept_at is not None:
            remove_kept(kept_at)
    return done


def _check(
    folder: Path,
    out: Path | None,
    method: str,
    scope: str,
    experts: int,
    lr: float | None,
    stop_forget: float | None,
    dry_run: bool,
) -> Any:
    """The configuration of a checkpoint that can be unlearned from as asked for; no weight is read."""
    for name, value, known in (("method", method, METHODS), ("scope", scope, SCOPES)):
        if value not in known:
            raise ValueError(f"no {name} {value!r}; use one of {', '.join(known)}")
    check_lr(lr)
    if stop_forget is not None and not 0 <= stop_forget < 1:
        raise ValueError(f"stop_forget={stop_forget}; it is an accuracy, use 0 ≤ stop_forget < 1")
    if out is None and not dry_run:
        raise ValueError("no output folder was given; give one, or make it a dry run")
    if out is not None:
        check_output(out, str(folder))
    model = outline(folder)
    blocks = find_moe_blocks(model)
    check_expressible(blocks, [block.num_experts for block in blocks])
    total = sum(block.num_experts for block in blocks)
    if not 1 <= experts <= total:
        raise ValueError(f"experts={experts} of the model's {total}; use 1 ≤ experts ≤ {total}")
    return model.config.get_text_config()


def _split(path: Path | str, ids_NS: Tensor, batch_size: int, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Batches of a text, in random order, and of its last tenth."""
    count, length = ids_NS.shape
    held = max(1, round(count / 10))
    if count < 2:
        raise ValueError(
            f"{path} makes one sequence of {length} tokens, and its end is held out: "
            "give more text, or shorter sequences"
        )
    order = torch.randperm(count - held, generator=torch.Generator().manual_seed(seed))
    parts = (ids_NS[:-held][order], ids_NS[-held:])
    seen, heldout = ([Batch(ids_BS) for ids_BS in torch.split(part, batch_size)] for part in parts)
    return seen, heldout


def _count(batches: Sequence[Batch]) -> int:
    return sum(batch.ids_BS.numel() for batch in batches)


def _measure_speed(
    done: Unlearned, model: PreTrainedModel, slices: list[Slice], original: list[Tensor], batches: list[Batch]
) -> None:
    assert done.after is not None
    longest = max((batch.ids_BS for batch in batches), key=Tensor.numel)
    # the new model is there; the old one is the same with the slices as they were
    after, before = interleaved_speed(model, partial(replaced, slices, original), longest)
    done.before, done.after = replace(done.before, speed=before), replace(done.after, speed=after)


def _tell(show: Show, before: int, step: Step) -> None:
    show.done = before + step.step - 1  # a run that goes on does not begin with the first
    known = "".join(f", {name} accuracy {value:.3f}" for name, value in step.measured.items())
    show.step(f"step {step.step}: loss {step.forget:.3f} to forget, {step.retain:.3f} to keep{known}")


def _write(done: Unlearned, model: PreTrainedModel, out: Path) -> Unlearned:
    assert done.after is not None
    try:
        with written_whole(out) as draft:
            save(model, draft)
            copy_side_files(Path(done.source), draft)
            written = replace(done, out=str(out), after=replace(done.after, disk=bytes_on_disk(draft)))
            note = json.dumps(written.to_dict(), ensure_ascii=False, indent=1)
            (draft / NOTE).write_text(note + "\n", "utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot write {out}: {error}; nothing was left behind, and the same command goes on from here"
        ) from None
    return written
