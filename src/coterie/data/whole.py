"""Files and folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(target: str | Path) -> Iterator[Path]:
    """Where to write a file, or make a folder, that becomes `target` when the block ends well.

    Until then it lies in a hidden folder beside the target, which goes away in any case. Folders above are
    created. The suffix is that of the target.

    Args:
        target: a file, which is replaced if it exists; or a folder, which must not exist or be empty.

    >>> folder = Path(tempfile.mkdtemp())
    >>> with written_whole(folder / "notes.txt") as draft:
    ...     _ = draft.write_text("all of it")
    >>> [path.name for path in folder.iterdir()]
    ['notes.txt']
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as hidden:
        draft = Path(hidden) / target.name
        yield draft
        os.replace(draft, target)
