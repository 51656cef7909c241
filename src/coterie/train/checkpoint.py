"""The checkpoints of a run: each appears whole or not at all, and the newest continues the run exactly."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from coterie.train.history import History

if TYPE_CHECKING:
    from accelerate import Accelerator

_RECORD = "run.json"  # written last: a folder without it is no checkpoint
_KEEP = 2


@dataclass
class Checkpoints:
    """Saves to and loads from `out/checkpoints/step-000123/`, keeping the newest two.

    A checkpoint is Accelerate's state (model, optimizer, gradient scaler, every process's random numbers)
    and a JSON record of the history and of what must not change on resuming.

    Args:
        accelerator: with the model and the optimizer prepared before `save` or `load`.
        out: the run's folder, shared by all processes; None saves nothing.
        identity: settings that make it this run, by name; see `run_identity`.
    """

    accelerator: "Accelerator"
    out: Path | None
    identity: dict[str, Any]

    @property
    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        complete = self._complete()
        return complete[-1] if complete else None

    def check(self, resume: bool) -> None:
        """ValueError when resuming is impossible, or starting afresh would mix two runs in one folder."""
        if resume and self.out is None:
            raise ValueError("resume=True needs out, the folder of the run to go on with")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file; give a folder for the checkpoints")
        if self.newest is None:
            return
        if not resume:
            raise ValueError(
                f"{self.out} holds a run already ({self.newest.name}); pass resume=True to go on with it, "
                "or give another folder"
            )
        saved = json.loads((self.newest / _RECORD).read_text())["identity"]
        for name in [*saved, *self.identity]:
            before, now = saved.get(name, "nothing"), self.identity.get(name, "nothing")
            if before != now:
                raise ValueError(
                    f"{self.newest} was saved with {name} = {before} but this run has {now}; "
                    "resume with the same arguments, or give another folder"
                )

    def load(self) -> History | None:
        """Restores the newest checkpoint and returns its history; None when there is none."""
        newest = self.newest
        if newest is None:
            return None
        self.accelerator.load_state(str(newest))
        history = History.from_json(json.dumps(json.loads((newest / _RECORD).read_text())["history"]))
        history.interrupted = history.stopped_early = False
        return history

    def save(self, history: History) -> None:
        """Writes a checkpoint of all processes under a temporary name, then renames it."""
        if self.out is None:
            return
        folder = self.out / "checkpoints"
        final = folder / f"step-{history.steps:06d}"
        partial = folder / f".{final.name}.partial"
        main = self.accelerator.is_main_process
        if main:
            for stale in folder.glob(".step-*.partial"):  # of a process that was killed while saving
                shutil.rmtree(stale)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with _without_tied_weight_warning():
                self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if main:
                record = {"identity": self.identity, "history": json.loads(history.to_json())}
                (partial / _RECORD).write_text(json.dumps(record))
                partial.rename(final)
        finally:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
        if main:
            for old in self._complete()[:-_KEEP]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _complete(self) -> list[Path]:
        if self.out is None:
            return []
        found = [record.parent for record in (self.out / "checkpoints").glob(f"step-*/{_RECORD}")]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def run_identity(model: nn.Module, **settings: int) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it: the settings, and every tensor's shape.

    >>> run_identity(nn.Linear(3, 2, bias=False), seed=0)
    {'seed': 0, 'the shape of weight': [2, 3]}
    """
    shapes = {f"the shape of {name}": list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {**settings, **shapes}


@contextmanager
def _without_tied_weight_warning() -> Iterator[None]:
    """Accelerate warns at each save that tied weights are stored once; loading ties them again."""
    logger = logging.getLogger("accelerate.utils.other")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
