"""What a run did so far, on disk, so that it goes on after an interruption."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.data import written_whole
from coterie.tune.batch import Batch


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Kept:
    """A folder with what was done of one run; whoever gave it removes it in the end.

    Each file in it appears whole or not at all, and says what its content depends on: it is never used for
    another text, method or model.

    Args:
        folder: of one run; it is made when there is something to keep.
        every: steps of training from one time to the next.
        say: gets a line when training goes on, or starts anew although something was kept.

    >>> import tempfile
    >>> keep = Kept(Path(tempfile.mkdtemp()))
    >>> keep.write("sums", {"seed": 0}, {"x": torch.ones(2)}, {"batches": 3})
    >>> keep.read("sums", {"seed": 0})
    ({'x': tensor([1., 1.])}, {'batches': 3})
    """

    folder: Path
    every: int = 5
    say: Callable[[str], None] = _to_stderr

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}; use at least 1 step")

    def read(self, name: str, run: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any] | None:
        """(tensors, record) as they were written; None if nothing was, or, after saying so, it is damaged.

        Args:
            name: of what was kept.
            run: by name, all that it depends on, as JSON holds it.

        Raises ValueError, naming what differs, if it was kept for another `run`, or the file cannot be read.
        """
        file = self._file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                facts = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except SafetensorError:
            facts, tensors = {}, {}
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error}") from None
        if facts.get("digest") != digest(tensors, facts.get("run", "") + facts.get("record", "")):
            self.say(f"{file} is damaged: what it held is done anew")
            return None
        before = json.loads(facts["run"])
        for what, now in json.loads(json.dumps(run)).items():
            if before.get(what) != now:
                raise ValueError(
                    f"{file} was kept with {what} = {before.get(what)}, and this run has {now}; "
                    "give the same, or another folder"
                )
        return tensors, json.loads(facts["record"])

    def write(self, name: str, run: Mapping[str, Any], tensors: Mapping[str, Tensor], record: Any) -> None:
        """Keeps tensors, no two of which share memory, and a record, as JSON holds it, instead of the last.

        Raises ValueError if they cannot be written; what was kept before is still there.
        """
        facts = {"run": json.dumps(run), "record": json.dumps(record)}
        facts["digest"] = digest(tensors, facts["run"] + facts["record"])
        try:
            with written_whole(self._file(name)) as draft:
                save_file({key: t.contiguous() for key, t in tensors.items()}, draft, metadata=facts)
        except OSError as error:
            raise ValueError(f"cannot keep what was done in {self.folder}: {error}") from None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """16 hexadecimal digits: the same for the same names, shapes, types, numbers and text.

    >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)}) != digest({"y": torch.zeros(2)})
    True
    """
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def digest_text(batches: Sequence[Batch]) -> str:
    """The `digest` of ids and masks."""
    return digest(
        {f"{i} {n}": t for i, batch in enumerate(batches) for n, t in vars(batch).items() if t is not None}
    )
