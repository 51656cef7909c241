"""Choices of experts as a JSON file: a list of 0 and 1 per MoE block, with the names of the blocks."""

import json
from collections.abc import Sequence
from pathlib import Path

from coterie.hf import MoEBlock


def save_mask(path: Path | str, blocks: Sequence[MoEBlock], kept: Sequence[Sequence[int]]) -> None:
    """Writes `{"layers": [name, …], "mask": [[1, 0, …], …]}`, a 1 for each expert that is kept.

    Args:
        path: of the file.
        blocks: before they are pruned. Dense layers are not among them, so names tell layers apart.
        kept: ids for each block.
    """
    mask = [
        [int(i in ids) for i in range(block.num_experts)]
        for block, ids in zip(blocks, map(set, kept), strict=True)
    ]
    rows = ",\n  ".join(map(json.dumps, mask))
    layers = json.dumps([block.name for block in blocks])
    Path(path).write_text(f'{{"layers": {layers},\n "mask": [\n  {rows}]}}\n', "utf-8")


def load_mask(path: Path | str, blocks: Sequence[MoEBlock]) -> list[list[int]]:
    """Reads the ids to keep of each block; a bare list of lists is taken in the order of the blocks.

    Raises ValueError if the file is missing or holds something else, names other blocks, has another number
    of them or of experts, or entries besides 0 and 1.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a mask that save_mask wrote")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    names = [block.name for block in blocks]
    if isinstance(content, dict):
        if content.get("layers") != names:
            raise ValueError(f"{path} is for the layers {content.get('layers')}; the model has {names}")
        content = content.get("mask")
    if not isinstance(content, list) or len(content) != len(blocks):
        found = f"{len(content)} rows" if isinstance(content, list) else type(content).__name__
        raise ValueError(f"{path} holds {found}; a row of 0 and 1 for each of {len(blocks)} blocks is needed")
    for block, row in zip(blocks, content, strict=True):
        if not isinstance(row, list) or len(row) != block.num_experts or not all(x in (0, 1) for x in row):
            raise ValueError(f"{path}: {block.name} needs {block.num_experts} entries, each 0 or 1")
    return [[i for i, entry in enumerate(row) if entry] for row in content]
