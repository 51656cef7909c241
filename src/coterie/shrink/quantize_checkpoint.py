"""A checkpoint on disk with its experts in few bits: from checks to the new folder.

quantize_checkpoint(folder, out, method="mc-sharp", bits=2.0, calib=["text.txt"])
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import Checkpoint, MoEBlock, find_moe_blocks, load, outline, rewriting, stream_layers
from coterie.hf.calibration import read_tokenizer, within_positions
from coterie.hf.kept import identity, kept_folder, remove_kept
from coterie.hf.progress import Show, showing
from coterie.hf.save import PACKED, bytes_on_disk, check_output, copy_side_files
from coterie.hf.speed import interleaved_speed
from coterie.shrink.calibrate import (
    batches,
    check_vocabulary,
    held_out,
    read_text,
)
from coterie.shrink.measure import perplexity
from coterie.shrink.packed_blocks import bank_name, place_bank, placed
from coterie.shrink.packed_checkpoint import bank_layout, layouts_text, save_packed
from coterie.shrink.rounding import LAYER, MC_SHARP, BlockRounding
from coterie.shrink.routed import block_inputs, caught_inputs


@dataclass
class Quantized:
    """What became of a checkpoint.

    Args:
        source: its folder.
        out: the new folder; None in a dry run, in which sizes after are computed, not measured.
        method: one of ROUNDINGS.
        scope: what the average of mc-sharp's bits is over, "layer" or "model".
        router_bits: of the routers' rows, whose bytes stay what they were; 16 where they are not rounded.
        bits: block name → bits of each expert.
        weights: numbers in all parameters.
        expert_weights: numbers in the matrices of all routed experts.
        expert_bytes: bytes of routed experts (before, after), scales and padding included.
        memory: bytes of all parameters and buffers (before, after).
        disk: bytes of the safetensors files (before, after).
        perplexity: on the held-out end of the calibration text, or on `test` (before, after); None in a dry
            run and when streamed.
        speed: tokens per second of forward passes (before, after), the two models by turns; None as above.
        calibration_tokens: read.
        heldout_tokens: tested on.
    """

    source: str
    out: str | None
    method: str
    scope: str
    router_bits: int
    bits: dict[str, list[int]]
    weights: int
    expert_weights: int
    expert_bytes: tuple[int, int]
    memory: tuple[int, int]
    disk: tuple[int, int]
    perplexity: tuple[float, float] | None
    speed: tuple[float, float] | None
    calibration_tokens: int
    heldout_tokens: int

    def average_bits(self) -> float:
        """Bits per expert, as they were budgeted: no scales, no padding."""
        every = [b for widths in self.bits.values() for b in widths]
        return sum(every) / len(every)

    def layer_bits(self) -> dict[str, float]:
        """Block name → bits per expert of that block, as they were budgeted."""
        return {name: sum(widths) / len(widths) for name, widths in self.bits.items()}

    def stored_bits(self) -> float:
        """Bits per expert weight, as they are stored."""
        return 8 * self.expert_bytes[1] / self.expert_weights

    def overall_bits(self) -> float:
        """Bits per weight of the whole model, as they are stored."""
        return 8 * self.memory[1] / self.weights

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, as JSON holds them."""
        averages = {
            "average_bits": self.average_bits(),
            "layer_bits": self.layer_bits(),
            "stored_bits": self.stored_bits(),
            "overall_bits": self.overall_bits(),
        }
        return asdict(self) | averages


def quantize_checkpoint(
    folder: Path | str,
    out: Path | str | None,
    *,
    bits: float,
    calib: Sequence[Path | str],
    test: Sequence[Path | str] = (),
    method: str = MC_SHARP,
    affinity: bool = False,
    scope: str = LAYER,
    router_bits: int | None = None,
    group_size: int = 128,
    dry_run: bool = False,
    max_tokens: int = 65536,
    seq_len: int = 512,
    stream: bool = False,
    chat: bool = False,
    progress: bool | None = None,
) -> Quantized:
    """Stores the routed experts in few bits; all else stays as it is, but for the routers of moequant.

    mc-sharp takes statistics of all blocks first, from the model as it was, and chooses bits; then blocks
    are rounded in order of depth, each on what the rounded ones before it give. Within a block the router, if
    it is rounded, comes first: an expert is then rounded on the tokens, with the weights, that this gives.

    What is done of a block is kept in the folder `OUT.calibration` until the new checkpoint is written, so
    that an interrupted run goes on where it stopped when it is started again.

    Args:
        folder: a checkpoint of a mixture of experts, with its tokenizer.
        out: a new folder, for `coterie.hf.load`; None only in a dry run.
        bits: per expert, on average over `scope` for mc-sharp, at most; for the others 1 (not awq and
            moequant), 2, 3, 4 or 8.
        calib: text or .jsonl files; see `read_text`. The last tenth of each is held out, to test on.
        test: other files to test on instead: text like that of the calibration shows little of the damage.
        method: mc-sharp, which gives each expert 1, 2 or 3 bits and rounds with GPTQ; or moequant, gptq, awq
            or rtn, which give all the same.
        affinity: count each token by its combine weight, as moequant does, with gptq, awq or mc-sharp.
        scope: of mc-sharp's budget: "layer" for one program per block, "model" for one over all experts of
            all blocks, which may then have different averages.
        router_bits: 2, 3, 4 or 8 to round the routers' rows, in groups and by the method that experts are;
            16 to leave them. None is what `bits` says for moequant, and 16 for the others. The rows are
            stored as they were, in the model's type: their bytes do not change.
        group_size: columns that share a scale, a multiple of 32; or -1.
        dry_run: choose the bits, and write nothing.
        max_tokens: to calibrate on, of each file at most.
        seq_len: tokens of a sequence at most.
        stream: one layer's weights in memory at a time, for a checkpoint larger than memory. Perplexity and
            speed are not measured.
        chat: see `read_text`.
        progress: True for a bar, False for silence, None for a bar on a terminal and plain lines elsewhere.

    Raises:
        ValueError: before the model runs: no mixture of experts, experts that cannot be packed, a bit budget
            that cannot be met, an output folder that is taken, calibration text that is missing, too short
            or of another tokenizer, an unknown method.
        KeyboardInterrupt: Ctrl-C; nothing is written but what is kept to go on with.
    """
    folder, out = Path(folder), None if out is None else Path(out)
    rounding = BlockRounding(method, bits, group_size, affinity, scope, router_bits)
    model = _check(folder, out, rounding, dry_run)
    tokenizer = read_tokenizer(folder)
    if not calib:
        raise ValueError("no calibration text was given; give a text or .jsonl file")
    settings = (tokenizer, model.config.get_text_config(), max_tokens, seq_len, chat)
    texts, tested = _read(calib, *settings), _read(test, *settings)
    if not test:
        parts = [held_out(text) for text in texts]
        texts, tested = [seen for seen, _ in parts], [rest for _, rest in parts]
    seen, heldout = ([ids for text in each for ids in batches(text)] for each in (texts, tested))
    if out is not None and not dry_run:
        rounding.folder = kept_folder(out, identity(folder, [seen], rounding))
    job = _Job(folder, None if dry_run else out, rounding, seen, heldout)
    with showing(len(find_moe_blocks(model)) * (rounding.chooses + (not dry_run)), progress) as show:
        quantized = job.stream(show) if stream else job.run(show)
    if rounding.folder is not None:
        remove_kept(rounding.folder)
    return quantized


@dataclass
class _Job:
    """What is known before weights are read."""

    folder: Path
    out: Path | None
    rounding: BlockRounding
    seen: list[Tensor]
    heldout: list[Tensor]

    def run(self, show: Show) -> Quantized:
        """With the whole model in memory."""
        model = load(self.folder, dtype="auto")
        blocks = find_moe_blocks(model)
        plan = self._plan(show, blocks, ((b, partial(block_inputs, model, b, self.seen)) for b in blocks))
        result = self._foretell(model, blocks, plan)
        if self.out is None:
            return result
        show.say("measuring the checkpoint on held-out text")
        before = perplexity(model, self.heldout)
        whole = {bank_name(place): place.bank for block in blocks for place in (block, *block.also)}
        for number, block in enumerate(blocks):
            inputs = partial(block_inputs, model, block, self.seen)
            place_bank(model, block, self.rounding.bank(number, block, plan[number], inputs))
            show.step(f"{block.name}: rounded")
        show.say("measuring both")
        result.perplexity = (before, perplexity(model, self.heldout))
        packed = {name: model.get_submodule(name) for name in whole}
        with placed(model, whole):
            longest = max(self.heldout, key=Tensor.numel)
            result.speed = interleaved_speed(model, partial(placed, model, packed), longest)
        result.memory = (result.memory[0], _nbytes(model))
        show.say(f"writing {self.out}")
        _write(model, blocks, self.folder, self.out)
        return self._written(result)

    def stream(self, show: Show) -> Quantized:
        """With one layer's weights in memory at a time, in one pass over the checkpoint, or two."""
        checkpoint = Checkpoint(self.folder)
        blocks = checkpoint.blocks
        layers = stream_layers(checkpoint, self.seen)
        plan = self._plan(show, blocks, ((b, partial(caught_inputs, b, passes)) for b, passes in layers))
        result = self._foretell(checkpoint.model, blocks, plan)
        if self.out is None:
            return result
        layouts = {}
        with rewriting(checkpoint, self.out, format="coterie") as writer:
            for number, (block, passes) in enumerate(stream_layers(checkpoint, self.seen)):
                inputs = partial(caught_inputs, block, passes)
                bank = self.rounding.bank(number, block, plan[number], inputs)
                layouts[bank_name(block)] = bank_layout(place_bank(checkpoint.model, block, bank).packed)
                writer.write(block)
                show.step(f"{block.name}: rounded")
            writer.add_file(PACKED, layouts_text(layouts))
        return self._written(result)

    def _plan(
        self, show: Show, blocks: list[MoEBlock], reading: Iterable[tuple[MoEBlock, Callable[[], Tensor]]]
    ) -> list[list[int]]:
        """Bits of each block's experts; statistics of all blocks come first, where bits are chosen.

        Args:
            show: the progress.
            blocks: in order of depth.
            reading: each of them, ready to be run, and what gives its inputs [T, D].
        """
        if not self.rounding.chooses:
            return self.rounding.plan(blocks, [])
        found = self.rounding.kept_statistics(len(blocks))
        if len(found) < len(blocks):
            found = []
            for number, (block, inputs) in enumerate(reading):
                found.append(self.rounding.statistics(number, block, inputs))
                show.step(f"{block.name}: measured")
        else:
            show.done += len(blocks)
        plan = self.rounding.plan(blocks, found)
        for block, widths in zip(blocks, plan, strict=True):
            counts = ", ".join(f"{widths.count(b)} in {b}" for b in sorted(set(widths)))
            show.say(f"{block.name}: experts by bits: {counts}")
        return plan

    def _foretell(self, model: PreTrainedModel, blocks: list[MoEBlock], plan: list[list[int]]) -> Quantized:
        whole, disk = _nbytes(model), bytes_on_disk(self.folder)
        was = sum(t.nbytes for block in blocks for t in vars(block.experts).values() if t is not None)
        will = sum(self.rounding.nbytes(b, widths) for b, widths in zip(blocks, plan, strict=True))
        return Quantized(
            source=str(self.folder),
            out=None,
            method=self.rounding.method,
            scope=self.rounding.scope,
            router_bits=self.rounding.router_width,
            bits={block.name: widths for block, widths in zip(blocks, plan, strict=True)},
            weights=sum({id(p): p.numel() for p in model.parameters()}.values()),
            expert_weights=sum(_weights(block) for block in blocks),
            expert_bytes=(was, will),
            memory=(whole, whole - was + will),
            disk=(disk, disk - was + will),
            perplexity=None,
            speed=None,
            calibration_tokens=sum(ids.numel() for ids in self.seen),
            heldout_tokens=sum(ids.numel() for ids in self.heldout),
        )

    def _written(self, result: Quantized) -> Quantized:
        assert self.out is not None
        result.out, result.disk = str(self.out), (result.disk[0], bytes_on_disk(self.out))
        return result


def _check(folder: Path, out: Path | None, rounding: BlockRounding, dry_run: bool) -> PreTrainedModel:
    """The outline of a checkpoint that can be quantised as asked for; no weight is read."""
    if out is None and not dry_run:
        raise ValueError("no output folder was given; give one, or make it a dry run")
    if out is not None:
        check_output(out, str(folder))
    model = outline(folder)
    rounding.check(find_moe_blocks(model))
    return model


def _read(
    paths: Sequence[Path | str], tokenizer: Any, config: Any, max_tokens: int, seq_len: int, chat: bool
) -> list[list[list[int]]]:
    """The sequences of each file."""
    texts, seq_len = [], within_positions(config, seq_len)
    for path in paths:
        texts.append(read_text(path, tokenizer, max_tokens=max_tokens, seq_len=seq_len, chat=chat))
        check_vocabulary(path, texts[-1], config.vocab_size)
    return texts


def _write(model: PreTrainedModel, blocks: list[MoEBlock], source: Path, out: Path) -> None:
    with written_whole(out) as draft:
        save_packed(model, blocks, draft)
        copy_side_files(source, draft)


def _nbytes(model: PreTrainedModel) -> int:
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def _weights(block: MoEBlock) -> int:
    matrices = (block.experts.gate, block.experts.up, block.experts.down)
    return sum(m.numel() for m in matrices if m is not None)
