"""A checkpoint on disk that should forget a text: from checks to the new folder.

unlearn_checkpoint(folder, out, forget="topic.txt", retain="rest.txt", method="npo", stop_forget=0.2)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import (
    MoEBlock,
    calibration_ids,
    check_expressible,
    find_moe_blocks,
    load,
    outline,
    route,
    save,
)
from coterie.hf.calibration import read_tokenizer
from coterie.hf.progress import Show, showing
from coterie.hf.save import bytes_on_disk, check_output
from coterie.nn import Routing, expert_overlap
from coterie.tune.attribute import attribute_experts
from coterie.tune.batch import Batch
from coterie.tune.losses import METHODS
from coterie.tune.measure import predict
from coterie.tune.result import Known, TargetExpert, Unlearned
from coterie.tune.unlearn import FORGET, SCOPES, Step, unlearn

NOTE = "unlearned.json"
"""What `unlearn_checkpoint` writes beside the weights: what was done to them, as JSON."""

_EVALUATE_EVERY = 5  # steps between looks at the held-out text


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
            unknown or out of range; while it trains: a loss that is not finite.
        KeyboardInterrupt: Ctrl-C; nothing is written.
    """
    folder, out = Path(folder), None if out is None else Path(out)
    config = _check(folder, out, method, scope, experts, steps, stop_forget, batch_size, dry_run)
    tokenizer = read_tokenizer(folder)
    seq_len = min(seq_len, getattr(config, "max_position_embeddings", seq_len))
    read = {"tokens": max_tokens, "length": seq_len, "vocab_size": config.vocab_size}
    ids = [calibration_ids(path, tokenizer, **read) for path in (forget, retain)]
    if torch.equal(*ids):
        raise ValueError(f"{forget} and {retain} hold the same text; nothing could be kept")
    sides = [_split(path, text, batch_size, seed) for path, text in zip((forget, retain), ids, strict=True)]
    (seen, tested), (kept, tested_kept) = sides
    model = load(folder, dtype="auto")
    blocks = find_moe_blocks(model)
    disk = bytes_on_disk(folder)
    with showing(len(seen) + (0 if dry_run else steps), progress) as show:
        affinity = attribute_experts(
            model, seen, blocks, on_batch=lambda: show.step("looking for the experts that know it")
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
        before = _choices(model, blocks, tested)

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
            on_step=lambda step: _tell(show, step),
        )
        show.say("measuring the new one")
        done.trained, done.trained_share = trained.trained, trained.trained_share
        done.reached = trained.reached if stop_forget is not None else None
        done.history = trained.history
        done.overlap = _overlap(before, _choices(model, blocks, tested))
        done.after = Known(predict(model, tested), predict(model, tested_kept), disk)
        show.say(f"writing {out}")
        _write(done, model, tokenizer, out)
    return done


def _check(
    folder: Path,
    out: Path | None,
    method: str,
    scope: str,
    experts: int,
    steps: int,
    stop_forget: float | None,
    batch_size: int,
    dry_run: bool,
) -> Any:
    """The configuration of a checkpoint that can be unlearned from as asked for; no weight is read."""
    for name, value, known in (("method", method, METHODS), ("scope", scope, SCOPES)):
        if value not in known:
            raise ValueError(f"no {name} {value!r}; use one of {', '.join(known)}")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps} and batch_size={batch_size}; both should be at least 1")
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


@torch.no_grad()
def _choices(
    model: PreTrainedModel, blocks: Sequence[MoEBlock], batches: Sequence[Batch]
) -> list[list[Routing]]:
    """The routings of each batch, without scores and logits: they would be most of the memory."""
    found = []
    for batch in batches:
        _, routings = route(model, blocks, **batch.to(model.device).inputs())
        none = torch.empty(0)
        found.append([replace(routing.to("cpu"), scores=none, logits=none) for routing in routings])
    return found


def _overlap(before: list[list[Routing]], after: list[list[Routing]]) -> float:
    tokens = [routings[0].experts.shape[0] for routings in before]
    shares = [expert_overlap(old, new) for old, new in zip(before, after, strict=True)]
    return sum(n * share for n, share in zip(tokens, shares, strict=True)) / sum(tokens)


def _tell(show: Show, step: Step) -> None:
    known = "".join(f", {name} accuracy {value:.3f}" for name, value in step.measured.items())
    show.step(f"step {step.step}: loss {step.forget:.3f} to forget, {step.retain:.3f} to keep{known}")


def _write(done: Unlearned, model: PreTrainedModel, tokenizer: Any, out: Path) -> None:
    with written_whole(out) as draft:
        save(model, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        assert done.after is not None
        done.after = replace(done.after, disk=bytes_on_disk(draft))
        done.out = str(out)
        (draft / NOTE).write_text(json.dumps(done.to_dict(), ensure_ascii=False, indent=1) + "\n", "utf-8")
