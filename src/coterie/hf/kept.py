"""Where what was done for a new checkpoint is kept until that is written, and what it is known by."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def identity(model_folder: Path, domains: Sequence[Sequence[Tensor]], settings: object) -> str:
    """A name for what is done: the same weights, tokens and settings have the same, others another.

    Args:
        model_folder: of the checkpoint; its files are known by place, size and time.
        domains: token ids of each text.
        settings: all else that the result depends on; its `str` counts.
    """
    digest = hashlib.sha256(str(settings).encode())
    for file in sorted(model_folder.glob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for domain in domains:
        for ids_BS in domain:
            digest.update(str(tuple(ids_BS.shape)).encode() + ids_BS.numpy().tobytes())
    return digest.hexdigest()[:16]


def kept_folder(out: Path, name: str) -> Path:
    """Where what was done for a new checkpoint is kept until that is written; `name` is an `identity`.

    >>> kept_folder(Path("models/small"), "0123456789abcdef").as_posix()
    'models/small.calibration/0123456789abcdef'
    """
    return out.with_name(f"{out.name}.calibration") / name


def remove_kept(folder: Path) -> None:
    """Removes a `kept_folder`, and what holds it when nothing else is in there."""
    if folder.exists():
        shutil.rmtree(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
