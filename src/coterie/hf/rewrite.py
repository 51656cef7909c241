"""Writing a checkpoint larger than memory again, with edited MoE blocks, one decoder layer at a time.

checkpoint = Checkpoint(folder)
with rewriting(checkpoint, output) as writer:
    for block, record in stream_records(checkpoint, batches):
        block.keep(frequent(record))
        writer.write(block)
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from coterie.hf import edit, modules
from coterie.hf.blocks import MoEBlock
from coterie.hf.checkpoint import Checkpoint
from coterie.hf.layout import FIELDS
from coterie.hf.load import INDEX
from coterie.hf.save import (
    MANIFEST,
    Format,
    check_expressible,
    check_format,
    check_output,
    copy_side_files,
    manifest,
)

SHARD_BYTES = 1 << 29  # of tensors that are copied as they are; what is edited makes one shard per layer


def save_pruned(
    source: Path | str, kept: Sequence[Sequence[int]], folder: Path | str, *, format: Format = "transformers"
) -> None:
    """Copies a checkpoint without the experts that are not kept; one decoder layer is in memory at a time.

    Args:
        source: folder with config.json and safetensors.
        kept: ids of each MoE block's experts, in order of depth.
        folder: must not exist yet, or be empty. It appears whole or not at all.
        format: as in `save`.

    Raises ValueError, before anything is written, if the folder is taken or the edit is not possible; later,
    if a file cannot be read or written.
    """
    checkpoint = Checkpoint(source)
    if len(kept) != len(checkpoint.blocks):
        raise ValueError(f"{source} has {len(checkpoint.blocks)} MoE blocks, but kept has {len(kept)} lists")
    for block, ids in zip(checkpoint.blocks, kept, strict=True):
        edit.check_sources(block.layout, [[i] for i in sorted(ids)])
    if format == "transformers":
        check_expressible(checkpoint.blocks, [len(ids) for ids in kept])
    with rewriting(checkpoint, folder, format=format) as writer:
        for block, ids in zip(checkpoint.blocks, kept, strict=True):
            with checkpoint.loaded(checkpoint.layer_of(block)):
                block.keep(ids)
                writer.write(block)


@contextmanager
def rewriting(
    checkpoint: Checkpoint, folder: Path | str, *, format: Format = "transformers"
) -> Iterator["Writer"]:
    """A folder to write edited layers to; at the end, all that was not written is copied from the source.

    Args:
        checkpoint: the source.
        folder: must not exist yet, or be empty. It appears when the context ends without an error.
        format: as in `save`; "transformers" is only possible if all blocks come to have the same numbers.

    Raises ValueError if the folder is taken, a file cannot be written, or the format cannot express the
    model.
    """
    folder = Path(folder)
    check_format(format)
    check_output(folder, str(checkpoint.folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        writer = Writer(checkpoint, whole)
        yield writer
        if format == "transformers":
            check_expressible(checkpoint.blocks, [block.num_experts for block in checkpoint.blocks])
        try:
            writer.finish()
            if format == "coterie":
                (whole / MANIFEST).write_text(manifest(checkpoint.blocks))
            whole.replace(folder)
        except OSError as error:
            raise ValueError(f"cannot write {folder}: {error}; nothing was left behind") from None


class Writer:
    """Shards of a checkpoint that is written layer by layer; `rewriting` makes it."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._layouts = [block.layout for block in checkpoint.blocks]
        self._written: set[str] = set()
        self._shards: list[list[str]] = []
        self._bytes = 0

    def write(self, block: MoEBlock) -> None:
        """Writes the layer of a block, which must be loaded, as it is now.

        Raises ValueError if that fails, or the layer was written before.
        """
        layer = self._checkpoint.layer_of(block)
        if layer in self._written:
            raise ValueError(f"{layer} was written already; edit all its blocks, then write one of them")
        self._save(self._checkpoint.as_stored(layer))
        self._written.add(layer)

    def add_file(self, name: str, text: str) -> None:
        """Writes a small file beside the weights."""
        (self._folder / name).write_text(text)

    def finish(self) -> None:
        """Copies the parts that were not written; writes the index, the configuration and all small files."""
        for part in self._checkpoint.parts:
            if part not in self._written:
                self._copy(part)
        self._write_index()
        for block, layout in zip(self._checkpoint.blocks, self._layouts, strict=True):
            numbers = {what: getattr(block.layout, what) for what in FIELDS}
            changed = {what: n for what, n in numbers.items() if n != getattr(layout, what)}
            modules.write_fields(block.config, changed)
        self._checkpoint.model.config.save_pretrained(self._folder)
        copy_side_files(self._checkpoint.folder, self._folder)

    def _copy(self, part: str) -> None:
        shard: dict[str, Tensor] = {}
        with self._checkpoint.stored(part) as tensors:
            for name, stored in tensors.items():
                shard[name] = stored[...]
                if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
                    self._save(shard)
                    shard = {}
        if shard:
            self._save(shard)

    def _save(self, shard: dict[str, Tensor]) -> None:
        shard = {name: tensor.contiguous() for name, tensor in shard.items()}
        path = self._folder / f"{len(self._shards)}.safetensors"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot write {self._folder.name}: {error}; nothing was left behind") from None
        self._shards.append(list(shard))
        self._bytes += sum(t.nbytes for t in shard.values())

    def _write_index(self) -> None:
        """Gives the shards the names that tell how many there are, and lists them."""
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            name = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            (self._folder / f"{number}.safetensors").rename(self._folder / name)
            places |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(places.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
