"""Files and folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def written_whole(target: str | Path) -> Iterator[Path]:
    """Where to write a file, or make a folder, that becomes `target` when the block ends well.

    Until then it lies in a hidden folder beside the target, which goes away in any case. Folders above are
    created. The suffix is that of the target.

    Args:
        target: a file, which is replaced if it exists; or a folder, which must not exist or be empty.

    Raises OSError if it cannot be written, also where safetensors calls that something else.

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
        try:
            yield draft
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"cannot write {target.name}: {error}") from None
        os.replace(draft, target)


def check_writable(target: str | Path) -> None:
    """Raises ValueError if there is no place or no permission to make `target`; ask before the work.

    >>> check_writable(Path(tempfile.mkdtemp()) / "not" / "yet" / "there")
    """
    above = next(path for path in Path(target).absolute().parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"{target} cannot be written: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{target} cannot be written: {above} is read-only")
