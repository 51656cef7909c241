"""A checkpoint on disk, made smaller for the domains of some text: from checks to the new folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import BlockRecord, MoEBlock, check_expressible, find_moe_blocks, load, outline, save
from coterie.hf.blocks import Snapshot
from coterie.hf.calibration import read_tokenizer, within_positions
from coterie.hf.kept import identity, kept_folder, remove_kept
from coterie.hf.progress import Show, showing
from coterie.hf.save import MASK, Format, bytes_on_disk, check_output, copy_side_files
from coterie.hf.speed import interleaved_speed
from coterie.shrink.calibrate import (
    batches,
    calibrated,
    check_vocabulary,
    held_out,
    joined,
    read_text,
)
from coterie.shrink.dern import dern
from coterie.shrink.importance import Importance, gating, mixed
from coterie.shrink.mask import save_mask
from coterie.shrink.measure import perplexity, sizes
from coterie.shrink.merge import m_smoe
from coterie.shrink.prune import METHODS, OUTPUT_ERROR, check_keep, choose, restored
from coterie.shrink.result import Measured, Shrunk
from coterie.shrink.streamed import Edit, edit_streamed

MERGES = ("m-smoe", "dern")
"""What `merge_checkpoint` knows."""

Groups = Callable[[BlockRecord], list[list[int]]]

_KEPT_INPUTS = 2048  # tokens of each domain whose block inputs are kept, for methods that need them


def prune_checkpoint(
    folder: Path | str,
    out: Path | str | None,
    *,
    keep: int,
    calib: Sequence[Path | str],
    method: str | Importance = "easy-ep",
    format: str = "transformers",
    dry_run: bool = False,
    max_tokens: int = 65536,
    seq_len: int = 512,
    seed: int = 0,
    stream: bool = False,
    chat: bool = False,
    progress: bool | None = None,
) -> Shrunk:
    """Keeps the same number of experts in every layer and deletes the others.

    What calibration gave is kept in the folder `OUT.calibration` until the new checkpoint is written, so that
    an interrupted run goes on where it stopped when it is started again.

    Args:
        folder: a checkpoint of a mixture of experts, with its tokenizer.
        out: a new folder; None only in a dry run.
        keep: experts in each layer, at least as many as a token is sent to.
        calib: a text or .jsonl file for each domain; see `read_text`. The last tenth of each is held out.
        method: one of METHODS, or a function of a block's record that scores its experts, [E].
        format: "transformers", which plain transformers loads, or "coterie".
        dry_run: choose, and write nothing.
        max_tokens: to calibrate on, of each domain at most.
        seq_len: tokens of a sequence at most.
        seed: of the method "random".
        stream: one layer's weights in memory at a time, for a checkpoint larger than memory. Perplexity and
            speed are not measured, and an interrupted run starts anew.
        chat: see `read_text`.
        progress: True for a bar, False for silence, None for a bar on a terminal and plain lines elsewhere.

    Raises:
        ValueError: before the model runs: no mixture of experts, too few experts, calibration text that is
            missing, too short or of another tokenizer, an output folder that is taken, a format that cannot
            express the result, an unknown method.
        KeyboardInterrupt: Ctrl-C; nothing is written but the calibration.
    """
    if not callable(method) and method not in METHODS:
        raise ValueError(f"no method {method!r}; use one of {', '.join(METHODS)}")

    def edit(block: MoEBlock, records: Sequence[BlockRecord], number: int) -> list[list[int]]:
        ids = choose(block, records, method, keep, seed=seed + number)
        block.keep(ids)
        return [[i] for i in ids]

    inputs = _KEPT_INPUTS if method == OUTPUT_ERROR else 0
    job = _Job(
        Path(folder),
        out,
        keep,
        calib,
        _name(method),
        format,
        dry_run,
        max_tokens,
        seq_len,
        inputs,
        stream,
        chat,
    )
    return job.run(edit, progress)


def merge_checkpoint(
    folder: Path | str,
    out: Path | str | None,
    *,
    groups: int,
    calib: Sequence[Path | str],
    method: str | Groups = "m-smoe",
    threshold: float = 0.6,
    format: str = "transformers",
    dry_run: bool = False,
    max_tokens: int = 65536,
    seq_len: int = 512,
    stream: bool = False,
    chat: bool = False,
    progress: bool | None = None,
) -> Shrunk:
    """Merges the experts of every layer into the same number of groups.

    Args:
        folder: as in `prune_checkpoint`, like all that is not named here.
        out: see there.
        groups: experts that are left in each layer.
        calib: see there. For m-smoe, several domains are one.
        method: "m-smoe", or "dern", which keeps as many experts as there are groups and gives them similar
            neurons of the others, so that an expert's neurons may come into several groups. Or a function of
            a block's record that returns the groups, as ids; a group's experts are averaged.
        threshold: of dern: how similar, as a cosine, -1 to 1.
        format: see there.
        dry_run: see there.
        max_tokens: see there.
        seq_len: see there.
        stream: see there.
        chat: see there.
        progress: see there.

    Raises as `prune_checkpoint`.
    """
    if not callable(method) and method not in MERGES:
        raise ValueError(f"no method {method!r}; use one of {', '.join(MERGES)}")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}; it is a cosine, use -1 ≤ threshold ≤ 1")

    def edit(block: MoEBlock, records: Sequence[BlockRecord], number: int) -> list[list[int]]:
        if callable(method):
            members = method(joined(records))
            if len(members) != groups:
                raise ValueError(f"{block.name}: {len(members)} groups were made; there should be {groups}")
            block.merge(members)
            return members
        if method == "m-smoe":
            return m_smoe(block, joined(records), groups)
        [score_E] = mixed([[gating(record)] for record in records])
        return dern(block, score_E, groups, threshold=threshold).members

    job = _Job(
        Path(folder),
        out,
        groups,
        calib,
        _name(method),
        format,
        dry_run,
        max_tokens,
        seq_len,
        _KEPT_INPUTS,
        stream,
        chat,
    )
    return job.run(edit, progress)


def _name(method: Any) -> str:
    return method if isinstance(method, str) else str(getattr(method, "__name__", type(method).__name__))


@dataclass
class _Job:
    """What is the same for every method. `edit` makes one block smaller."""

    folder: Path
    out: Path | str | None
    keep: int
    calib: Sequence[Path | str]
    method: str
    format: str
    dry_run: bool
    max_tokens: int
    seq_len: int
    keep_inputs: int
    stream: bool
    chat: bool

    def run(self, edit: Edit, progress: bool | None) -> Shrunk:
        out = self._check_out()
        config = self._check_model()
        tokenizer = read_tokenizer(self.folder)
        domains, heldout = self._read(config, tokenizer)
        if self.stream:
            return self._run_streamed(out, edit, domains, progress)
        model = load(self.folder, dtype="auto")
        blocks = find_moe_blocks(model)
        before, disk = sizes(model, blocks), bytes_on_disk(self.folder)
        names = {block.name: block.num_experts for block in blocks}
        folder = None
        if out is not None and not self.dry_run:
            folder = kept_folder(out, identity(self.folder, domains, self.keep_inputs))
        with showing(sum(map(len, domains)) + len(blocks), progress) as show:
            whole = [block.snapshot() for block in blocks]
            pairs = self._calibrate(model, blocks, domains, folder, show)
            experts = {}
            for number, (block, records) in enumerate(pairs):
                experts[block.name] = edit(block, records, number)
                show.step(f"{block.name}: {block.num_experts} of {names[block.name]} experts")
            after = sizes(model, blocks)
            shrunk = Shrunk(
                source=str(self.folder),
                out=None,
                method=self.method,
                domains=[str(path) for path in self.calib],
                experts=experts,
                num_experts=names,
                before=Measured(before, disk),
                after=Measured(after, disk - (before.memory - after.memory)),
                calibration_tokens=[sum(ids.numel() for ids in domain) for domain in domains],
                heldout_tokens=sum(ids.numel() for ids in heldout),
            )
            if self.dry_run or out is None:
                return shrunk
            show.say("measuring both on held-out text")
            _measure(shrunk, model, blocks, whole, heldout)
            show.say(f"writing {out}")
            self._write(shrunk, model, blocks, whole, out)
            if folder is not None:
                remove_kept(folder)
        return shrunk

    def _run_streamed(
        self, out: Path | None, edit: Edit, domains: list[list[Tensor]], progress: bool | None
    ) -> Shrunk:
        model = outline(self.folder)
        blocks = find_moe_blocks(model)
        out = None if self.dry_run else out
        with showing(len(blocks), progress) as show:
            experts = edit_streamed(
                self.folder,
                out,
                edit,
                domains,
                keep_inputs=self.keep_inputs,
                format=cast(Format, self.format),
                on_block=lambda block: show.step(f"{block.name}: {block.num_experts} experts"),
            )
        before, after = sizes(model, blocks), sizes(model, blocks, self.keep)
        disk = bytes_on_disk(self.folder)
        shrunk = Shrunk(
            source=str(self.folder),
            out=None,
            method=self.method,
            domains=[str(path) for path in self.calib],
            experts=experts,
            num_experts={block.name: block.num_experts for block in blocks},
            before=Measured(before, disk),
            after=Measured(after, disk - (before.memory - after.memory)),
            calibration_tokens=[sum(ids.numel() for ids in domain) for domain in domains],
        )
        if out is not None:
            _write_mask(shrunk, blocks, out)
            shrunk.out, shrunk.after.disk = str(out), bytes_on_disk(out)
        return shrunk

    def _check_out(self) -> Path | None:
        if self.format not in get_args(Format):
            raise ValueError(f"no format {self.format!r}; use transformers or coterie")
        if self.out is None:
            if not self.dry_run:
                raise ValueError("no output folder was given; give one, or make it a dry run")
            return None
        check_output(Path(self.out), str(self.folder))
        return Path(self.out)

    def _check_model(self) -> Any:
        """The configuration of a checkpoint that can be made what was asked for; no weight is read."""
        if not self.calib:
            raise ValueError("no calibration text was given; the choice of experts needs some")
        missing = [path for path in self.calib if not Path(path).exists()]
        if missing:
            raise ValueError(f"{missing[0]} does not exist; name a text file, a .jsonl file or a folder")
        model = outline(self.folder)
        blocks = find_moe_blocks(model)
        check_keep(blocks, self.keep)
        if self.format == "transformers":
            check_expressible(blocks, [self.keep] * len(blocks))
        return model.config.get_text_config()

    def _read(self, config: Any, tokenizer: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
        domains, rest = [], []
        seq_len = within_positions(config, self.seq_len)
        for path in self.calib:
            sequences = read_text(
                path, tokenizer, max_tokens=self.max_tokens, seq_len=seq_len, chat=self.chat
            )
            check_vocabulary(path, sequences, config.vocab_size)
            seen, heldout = held_out(sequences)
            domains.append(batches(seen))
            rest += heldout
        return domains, batches(rest)

    def _calibrate(
        self,
        model: PreTrainedModel,
        blocks: list[MoEBlock],
        domains: list[list[Tensor]],
        folder: Path | None,
        show: Show,
    ) -> Iterator[tuple[MoEBlock, list[BlockRecord]]]:
        """Each block with its records, one per domain."""
        sources = [
            calibrated(
                model,
                blocks,
                domain,
                keep_inputs=self.keep_inputs,
                folder=None if folder is None else folder / f"domain-{i}",
                on_batch=partial(show.step, f"calibrating on {self.calib[i]}"),
            )
            for i, domain in enumerate(domains)
        ]
        for pairs in zip(*sources, strict=True):
            yield pairs[0][0], [record for _, record in pairs]

    def _write(
        self,
        shrunk: Shrunk,
        model: PreTrainedModel,
        blocks: list[MoEBlock],
        whole: list[Snapshot],
        out: Path,
    ) -> None:
        with written_whole(out) as draft:
            save(model, draft, cast(Format, self.format))
            copy_side_files(self.folder, draft)
            with restored(blocks, whole):
                _write_mask(shrunk, blocks, draft)
            shrunk.after.disk = bytes_on_disk(draft)
        shrunk.out = str(out)


def _write_mask(shrunk: Shrunk, blocks: Sequence[MoEBlock], folder: Path) -> None:
    """Which experts were kept, where they were kept as they are."""
    if all(len(ids) == 1 for groups in shrunk.experts.values() for ids in groups):
        save_mask(folder / MASK, blocks, [[i for [i] in ids] for ids in shrunk.experts.values()])


def _measure(
    shrunk: Shrunk,
    model: PreTrainedModel,
    blocks: list[MoEBlock],
    whole: list[Snapshot],
    heldout: list[Tensor],
) -> None:
    shrunk.after.perplexity = perplexity(model, heldout)
    smaller = [block.snapshot() for block in blocks]
    with restored(blocks, whole):
        shrunk.before.perplexity = perplexity(model, heldout)
        largest = max(heldout, key=Tensor.numel)
        speeds = interleaved_speed(model, partial(restored, blocks, smaller), largest)
        shrunk.before.speed, shrunk.after.speed = speeds
