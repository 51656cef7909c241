"""A checkpoint on disk whose tokens use as many experts as they need: from checks to the new folder.

top_any_checkpoint(folder, out, calib=["text.txt"], sparsity=0.05)

Letters: T tokens, K slots per token.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import MoEBlock, find_moe_blocks, load, outline
from coterie.hf.calibration import read_tokenizer, within_positions
from coterie.hf.kept import identity, kept_folder, remove_kept
from coterie.hf.load import INDEX, shards
from coterie.hf.progress import Show, showing
from coterie.hf.save import (
    MANIFEST,
    PACKED,
    bytes_on_disk,
    check_format,
    check_output,
    copy_side_files,
    manifest,
)
from coterie.hf.speed import interleaved_speed
from coterie.hf.top_any import PrefixMask, place_masks, unmasked, write_masks
from coterie.shrink.calibrate import batches, check_vocabulary, held_out, read_text
from coterie.shrink.measure import Sizes, perplexity, sizes
from coterie.shrink.packed_blocks import bank_name
from coterie.shrink.result import Measured
from coterie.shrink.top_any import SAVE_EVERY, top_any, train_top_any
from coterie.shrink.top_any_result import Masked
from coterie.shrink.top_any_rule import is_normalized, measure_rule, router_weights

_WATCHED = 8  # batches of calibration text whose router weights set the rule's thresholds


def top_any_checkpoint(
    folder: Path | str,
    out: Path | str | None,
    *,
    calib: Sequence[Path | str],
    sparsity: float = 0.05,
    steps: int = 150,
    batch_size: int = 4,
    lr: float = 5e-3,
    format: str = "coterie",
    dry_run: bool = False,
    max_tokens: int = 65536,
    seq_len: int = 512,
    chat: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Masked:
    """Trains masks that let each token use fewer experts than its router proposes, and writes them.

    The model is its own teacher. Its weights do not change: the new folder holds a copy of its files, and the
    masks in a file beside them.

    What training came to is kept in the folder `OUT.calibration` until the new checkpoint is written, so that
    an interrupted run goes on where it stopped when it is started again, and comes to the same masks.

    Args:
        folder: a checkpoint of a mixture of experts, or what `coterie quantize` made of one, with its
            tokenizer.
        out: a new folder, for `coterie.hf.load`; None only in a dry run.
        calib: text or .jsonl files; see `read_text`. The last tenth of each is held out, to test on.
        sparsity: λ, the price of an expert; larger keeps fewer.
        steps: of training.
        batch_size: sequences of a step.
        lr: learning rate.
        format: "coterie". What transformers reads cannot hold masks.
        dry_run: train and measure, and write nothing; speed is not measured.
        max_tokens: to train on, of each file at most; more steps see them again.
        seq_len: tokens of a sequence at most.
        chat: see `read_text`.
        seed: of the order of sequences, of the masks' first weights and of the Gumbel noise.
        progress: True for a bar, False for silence, None for a bar on a terminal and plain lines elsewhere.

    Raises:
        ValueError: before the model runs: no mixture of experts, one that sends a token to one expert, masks
            that are there already, a model without logits, the format "transformers", an output folder that
            is taken, calibration text that is missing, too short or of another tokenizer, a number out of
            range.
        KeyboardInterrupt: Ctrl-C; nothing is written but what is kept to go on with.
    """
    folder, out = Path(folder), None if out is None else Path(out)
    _check_numbers(sparsity, steps, batch_size, lr)
    _check_out(folder, out, format, dry_run)
    model = outline(folder, packed=True)
    _check_blocks(find_moe_blocks(model))
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise ValueError(f"{folder} holds a {type(model).__name__}, which gives no logits to learn from")
    if not calib:
        raise ValueError("no calibration text was given; give a text or .jsonl file")
    tokenizer, config = read_tokenizer(folder), model.config.get_text_config()
    seen: list[list[int]] = []
    rest: list[list[int]] = []
    for path in calib:
        length = within_positions(config, seq_len)
        text = read_text(path, tokenizer, max_tokens=max_tokens, seq_len=length, chat=chat)
        check_vocabulary(path, text, config.vocab_size)
        some, others = held_out(text)
        seen, rest = seen + some, rest + others
    kept = None
    if out is not None and not dry_run:
        settings = ("top-any", sparsity, steps, batch_size, lr, seed)
        kept = kept_folder(out, identity(folder, [batches(seen)], settings))
    job = _Job(
        folder,
        None if dry_run else out,
        sparsity,
        lr,
        _batches(seen, batch_size, steps, seed),
        batches(rest),
        seed,
        None if kept is None else kept / "training.pt",
    )
    with showing(steps, progress) as show:
        done = job.run(model, show)
    done.calibration_tokens = sum(map(len, seen))
    if kept is not None:
        remove_kept(kept)
    return done


@dataclass
class _Job:
    """What is known before weights are read."""

    folder: Path
    out: Path | None
    sparsity: float
    lr: float
    batches: list[Tensor]
    heldout: list[Tensor]
    seed: int
    state: Path | None

    def run(self, empty: PreTrainedModel, show: Show) -> Masked:
        """`empty` is the checkpoint's model without weights, and without packed experts."""
        packed = (self.folder / PACKED).exists()
        model = load(self.folder, dtype="auto")
        blocks = [place for block in find_moe_blocks(empty) for place in (block, *block.also)]
        show.say("watching the router on calibration text")
        banks = [model.get_submodule(bank_name(block)) for block in blocks]
        weights = router_weights(model, banks, self.batches[:_WATCHED])
        unused = [block.name for block, w_TK in zip(blocks, weights, strict=True) if not len(w_TK)]
        if unused:
            show.say(f"{', '.join(unused)}: no token came, so none is masked")
            blocks = [block for block in blocks if block.name not in unused]
            banks = [model.get_submodule(bank_name(block)) for block in blocks]
            weights = [w_TK for w_TK in weights if len(w_TK)]
        renormalize = all(map(is_normalized, weights))
        masks = self._train(model, blocks, banks, renormalize, show)
        show.say("measuring both on held-out text")
        with top_any(banks, masks, renormalize=renormalize) as kept:
            after = perplexity(model, self.heldout)
        done = self._compare(empty, model, blocks, masks, [one.ratio for one in kept], after)
        done.renormalize, done.packed = renormalize, packed
        placed = dict(zip(map(bank_name, blocks), masks, strict=True))
        place_masks(model, placed, renormalize=renormalize)
        if self.out is not None:
            longest = max(self.heldout, key=Tensor.numel)
            done.after.speed, done.before.speed = interleaved_speed(model, partial(unmasked, model), longest)
        show.say("measuring the rule that it is compared with")
        layers = [model.get_submodule(block.name.rpartition(".")[0]) for block in blocks]
        with unmasked(model):
            done.rule = measure_rule(
                model, layers, banks, weights, done.share(), self.heldout, renormalize=renormalize
            )
        if self.out is not None:
            show.say(f"writing {self.out}")
            _write(self.folder, self.out, find_moe_blocks(empty), model)
            done.out, done.after.disk = str(self.out), bytes_on_disk(self.out)
        return done

    def _train(
        self,
        model: PreTrainedModel,
        blocks: Sequence[MoEBlock],
        banks: Sequence[nn.Module],
        renormalize: bool,
        show: Show,
    ) -> list[PrefixMask]:
        def on_step(steps: int, divergence: float, ratio: float) -> None:
            show.done = steps
            if steps % SAVE_EVERY == 0 or show.total == steps:
                show.say(f"training: {divergence:.4f} nats from the model, {ratio:.0%} of its experts")

        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            masks = [PrefixMask(block.experts.up.shape[-1], block.top_k).to(model.device) for block in blocks]
            train_top_any(
                model,
                banks,
                masks,
                model,
                self.batches,
                renormalize=renormalize,
                sparsity=self.sparsity,
                lr=self.lr,
                on_step=on_step,
                state=self.state,
            )
        return masks

    def _compare(
        self,
        empty: PreTrainedModel,
        model: PreTrainedModel,
        blocks: Sequence[MoEBlock],
        masks: Sequence[PrefixMask],
        kept: Sequence[float],
        perplexity_after: float,
    ) -> Masked:
        """Sizes and perplexity; `kept` is the share of each block's slots that run."""
        whole = replace(sizes(empty, find_moe_blocks(empty)), memory=sizes(model, ()).memory)
        disk = bytes_on_disk(self.folder)
        extra, nbytes, left_out = 0, 0, 0.0
        for block, mask, share in zip(blocks, masks, kept, strict=True):
            extra += sum(p.numel() for p in mask.parameters())
            nbytes += sum(p.nbytes for p in mask.parameters())
            expert = sum(t[0].numel() for t in vars(block.experts).values() if t is not None)
            left_out += (1 - share) * block.top_k * expert
        masked = Sizes(whole.total + extra, round(whole.active - left_out) + extra, whole.memory + nbytes)
        return Masked(
            source=str(self.folder),
            sparsity=self.sparsity,
            top_k={block.name: block.top_k for block in blocks},
            kept={block.name: share for block, share in zip(blocks, kept, strict=True)},
            before=Measured(whole, disk, perplexity(model, self.heldout)),
            after=Measured(masked, disk + nbytes, perplexity_after),
            heldout_tokens=sum(ids.numel() for ids in self.heldout),
        )


def _check_numbers(sparsity: float, steps: int, batch_size: int, lr: float) -> None:
    if not sparsity >= 0:
        raise ValueError(f"sparsity={sparsity:g}; it is the price of an expert, use 0 or more")
    if steps < 1 or batch_size < 1 or not lr > 0:
        raise ValueError(f"steps={steps}, batch_size={batch_size}, lr={lr:g}; all must be positive")


def _check_out(folder: Path, out: Path | None, format: str, dry_run: bool) -> None:
    check_format(format)
    if format == "transformers":
        raise ValueError(
            'format="transformers" cannot hold masks: plain transformers computes all experts that the '
            'router proposes; use "coterie"'
        )
    if out is None and not dry_run:
        raise ValueError("no output folder was given; give one, or make it a dry run")
    if out is not None:
        check_output(out, str(folder))


def _check_blocks(blocks: Sequence[MoEBlock]) -> None:
    for block in blocks:
        if block.top_k < 2:
            raise ValueError(f"{block.name} sends a token to {block.top_k} expert; none can be left out")


def _batches(sequences: Sequence[list[int]], batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """One batch for each step: all of them, in another order each time round."""
    every, draw = batches(sequences, batch_size), torch.Generator().manual_seed(seed)
    rounds = -(-steps // len(every))
    return [every[i] for _ in range(rounds) for i in torch.randperm(len(every), generator=draw)][:steps]


def _write(source: Path, out: Path, blocks: Sequence[MoEBlock], model: PreTrainedModel) -> None:
    """Copies a checkpoint, but for weights in other formats, and adds the masks of a model."""
    files = [*shards(source), *(source / name for name in ("config.json", INDEX, PACKED))]
    try:
        with written_whole(out) as draft:
            draft.mkdir()
            copy_side_files(source, draft)
            for path in files:
                if path.exists():
                    shutil.copy2(path, draft)
            (draft / MANIFEST).write_text(manifest(blocks))
            write_masks(model, draft)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error}; nothing was left behind") from None
