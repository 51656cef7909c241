"""A fitted estimator in a folder: JSON for what it was asked and has learnt, safetensors for its tensors."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.data import written_whole

_FILE, _VERSION = "estimator.json", 1


@contextmanager
def new_folder(folder: str | Path, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes it when the block ends well, and vanishes otherwise.

    Args:
        folder: must not exist, be empty, or hold an earlier result, which is then replaced.
        marker: the file that an earlier result is known by.

    Raises ValueError when the folder is a file or holds something else.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).exists():
        raise ValueError(f"{folder} holds something else (no {marker}); give an empty or a new folder")
    with written_whole(folder) as draft:
        draft.mkdir()
        yield draft
        if folder.exists():
            shutil.rmtree(folder)


def save_estimator(
    folder: str | Path,
    kind: str,
    *,
    parameters: Mapping[str, Any],
    learnt: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Writes `estimator.json` and `weights.safetensors`, both or neither. No pickle.

    Args:
        folder: new, empty, or holding an earlier estimator, which is replaced.
        kind: name of the class, which `load_estimator` compares.
        parameters: arguments of the constructor, as JSON can hold them; numpy's numbers become Python's.
        learnt: what fitting found beside tensors: column names, means, classes.
        tensors: weights; shared or strided memory is written apart.

    Raises ValueError when the folder holds something else, TypeError for what JSON cannot hold.
    """
    with new_folder(folder, _FILE) as draft:
        described = {
            "kind": kind,
            "version": _VERSION,
            "parameters": dict(parameters),
            "learnt": dict(learnt),
        }
        text = json.dumps(described, ensure_ascii=False, indent=1, default=_plain)
        (draft / _FILE).write_text(text + "\n", "utf-8")
        save_file(
            {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()},
            draft / "weights.safetensors",
        )
    return Path(folder)


def load_estimator(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """What `save_estimator` was given: (parameters, learnt, tensors).

    Raises ValueError: no such folder, another kind of estimator, or a newer format.

    >>> import tempfile, torch
    >>> folder = tempfile.mkdtemp()
    >>> weights = {"m": torch.ones(3)}
    >>> _ = save_estimator(folder, "Mean", parameters={"k": 2}, learnt={"mean": 1}, tensors=weights)
    >>> load_estimator(folder, "Mean")
    ({'k': 2}, {'mean': 1}, {'m': tensor([1., 1., 1.])})
    >>> load_estimator(folder, "Median")
    Traceback (most recent call last):
    ValueError: ... holds a Mean; Median cannot read it
    """
    described = _described(folder)
    if described["kind"] != kind:
        raise ValueError(f"{folder} holds a {described['kind']}; {kind} cannot read it")
    if described["version"] > _VERSION:
        raise ValueError(
            f"{Path(folder) / _FILE} has format {described['version']}, this coterie reads up to {_VERSION}; "
            "upgrade coterie"
        )
    weights = Path(folder) / "weights.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} lacks weights.safetensors; fit and save the estimator again")
    return described["parameters"], described["learnt"], load_file(weights)


def estimator_kind(folder: str | Path) -> str:
    """The class of the estimator in a folder, without its weights. ValueError where there is none."""
    return str(_described(folder)["kind"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON cannot hold")


def _described(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / _FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no estimator (no {_FILE}); give a folder that save wrote")
    try:
        described: dict[str, Any] = json.loads(file.read_text("utf-8"))
        described["kind"], described["version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged; fit and save the estimator again") from None
    return described
