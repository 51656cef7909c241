"""Text to calibrate on, and what a model's MoE blocks do with it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf import BlockRecord, MoEBlock, recording
from coterie.hf.calibration import chat_tokenizer, documents

MIN_TOKENS = 256
"""Fewer tokens than this say too little about experts."""

_TENSORS = tuple(f.name for f in fields(BlockRecord) if f.name not in ("name", "num_experts"))


def calibrated(
    model: PreTrainedModel,
    blocks: Sequence[MoEBlock],
    batches_BS: Sequence[Tensor],
    *,
    keep_inputs: int = 0,
    folder: Path | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[MoEBlock, BlockRecord]]:
    """Runs the model on text and yields each block with its record, in order of depth.

    Whoever chooses experts reads these pairs and nothing else, so that another source of them, such as one
    that has one layer in memory at a time, can take this function's place.

    Args:
        model: in memory, in evaluation mode.
        blocks: of the model.
        batches_BS: token ids [B, S] each, without padding.
        keep_inputs: keep the blocks' inputs for this many tokens.
        folder: keeps what each batch gave, so that an interrupted run goes on after it; None keeps nothing.
        on_batch: called after each batch.
    """
    parts: list[list[BlockRecord]] = []
    for number, ids_BS in enumerate(batches_BS):
        file = None if folder is None else folder / f"batch-{number:05}.safetensors"
        if file is not None and file.exists():
            parts.append(_read(file, blocks))
        else:
            missing = max(keep_inputs - sum(len(part[0].inputs) for part in parts), 0)
            with recording(blocks, keep_inputs=missing) as records, torch.no_grad():
                model(ids_BS.to(model.device))
            parts.append(records)
            if file is not None:
                _write(file, records)
        on_batch()
    for i, block in enumerate(blocks):
        yield block, joined([part[i] for part in parts])


def joined(records: Sequence[BlockRecord]) -> BlockRecord:
    """Records of one block over several texts as one.

    >>> record = BlockRecord("mlp", 3, experts=torch.tensor([[0, 2]]), weights=torch.ones(1, 2))
    >>> joined([record, record]).experts.tolist()
    [[0, 2], [0, 2]]
    """
    tensors = {}
    for name in _TENSORS:
        given = [getattr(record, name) for record in records if getattr(record, name).numel()]
        if given:
            tensors[name] = torch.cat(given)
    return BlockRecord(records[0].name, records[0].num_experts, **tensors)


def read_text(
    path: Path | str, tokenizer: Any, *, max_tokens: int, seq_len: int, chat: bool = False
) -> list[list[int]]:
    """Token ids of one domain's text, cut into sequences of at most `seq_len`.

    Args:
        path: a text file, which is one document; a .jsonl file with a document a line, see
            `coterie.hf.calibration.documents`; a folder of these; or token ids as .pt or .safetensors, a
            document a row.
        tokenizer: the checkpoint's; None will do where all are ids.
        max_tokens: read no more than about this many.
        seq_len: tokens.
        chat: read "messages", too, through the tokenizer's chat template.

    Raises ValueError if the file is missing, empty, too short or damaged, or there is no chat template.
    """
    if max_tokens < 1 or seq_len < 2:
        raise ValueError(f"tokens={max_tokens}, seq_len={seq_len}; use tokens ≥ {MIN_TOKENS} and seq_len ≥ 2")
    path = Path(path)
    sequences: list[list[int]] = []
    for document in documents(
        path, characters=16 * max_tokens, chat=chat_tokenizer(tokenizer) if chat else None
    ):
        ids = document if isinstance(document, list) else _tokens(path, tokenizer, document)
        sequences += [ids[at : at + seq_len] for at in range(0, len(ids), seq_len)]
        if sum(map(len, sequences)) >= max_tokens:
            break
    sequences = [ids for ids in sequences if len(ids) > 1]
    sequences = sequences[: max(1, _count_within(sequences, max_tokens))]
    found = sum(map(len, sequences))
    if found < MIN_TOKENS or len(sequences) < 2:
        raise ValueError(
            f"{path} holds {found} tokens in {len(sequences)} sequences of at most {seq_len}; "
            f"at least {MIN_TOKENS} tokens in 2 sequences are needed to calibrate"
        )
    return sequences


def check_vocabulary(path: Path | str, sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ValueError if a token id is not one of the model's."""
    largest = max(map(max, sequences))
    if largest >= vocab_size or min(map(min, sequences)) < 0:
        raise ValueError(
            f"{path} has the token id {largest}, the model {vocab_size} tokens: it is of another tokenizer"
        )


def held_out(sequences: Sequence[list[int]], share: float = 0.1) -> tuple[list[list[int]], list[list[int]]]:
    """Sets the last sequences aside, at least one: (to calibrate on, held out).

    >>> held_out([[1], [2], [3]])
    ([[1], [2]], [[3]])
    """
    cut = len(sequences) - max(1, round(share * len(sequences)))
    return list(sequences[:cut]), list(sequences[cut:])


def batches(sequences: Sequence[Sequence[int]], batch_size: int = 4) -> list[Tensor]:
    """Token ids [B, S], each of sequences of one length, so that none needs padding; the longest first."""
    by_length = itertools.groupby(sorted(sequences, key=len, reverse=True), key=len)
    return [
        torch.tensor(same[at : at + batch_size])
        for same in (list(group) for _, group in by_length)
        for at in range(0, len(same), batch_size)
    ]


def _tokens(path: Path, tokenizer: Any, text: str) -> list[int]:
    if tokenizer is None:
        raise ValueError(f"the checkpoint has no tokenizer to read {path} with; give .jsonl with input_ids")
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _count_within(sequences: Sequence[Sequence[int]], max_tokens: int) -> int:
    totals = itertools.accumulate(map(len, sequences))
    return sum(total <= max_tokens for total in totals)


def _write(file: Path, records: Sequence[BlockRecord]) -> None:
    tensors = {f"{i}.{name}": getattr(r, name) for i, r in enumerate(records) for name in _TENSORS}
    with written_whole(file) as draft:
        save_file({k: t.contiguous() for k, t in tensors.items()}, draft)


def _read(file: Path, blocks: Sequence[MoEBlock]) -> list[BlockRecord]:
    tensors = load_file(file)
    return [
        BlockRecord(block.name, block.num_experts, **{n: tensors[f"{i}.{n}"] for n in _TENSORS})
        for i, block in enumerate(blocks)
    ]
