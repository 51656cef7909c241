"""`fit` and `predict`: find the system, check what was given, fit, and write everything or nothing."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from coterie import __version__
from coterie.data import import_pandas, progress_shown, written_whole
from coterie.estimate.columns import Columns
from coterie.models import new_folder
from coterie.recipe.options import options_of, read_options, suggest
from coterie.report.usage import draw_usage

if TYPE_CHECKING:
    import pandas as pd

_ROOM = Path(__file__).parent
_NOT_SYSTEMS = ("__init__", "columns", "run")


class Saveable(Protocol):
    def save(self, folder: str | Path) -> Any: ...


@dataclass
class Fitted:
    """What a system's `fit` returns.

    Args:
        estimator: with `save(folder)`.
        report: measured on held-out rows: name → number or text, in the order it is printed.
        usage: share of held-out rows per expert, summing to 1; several named banks for several gates.
    """

    estimator: Saveable
    report: dict[str, float | int | str]
    usage: Mapping[str, Sequence[float]] = field(default_factory=dict)


def find_estimators() -> list[str]:
    """The slugs that `coterie fit` knows.

    >>> "comet-trees" in find_estimators()
    True
    """
    files = sorted(file.stem for file in _ROOM.glob("*.py"))
    return [name.replace("_", "-") for name in files if name not in _NOT_SYSTEMS]


def fit(
    slug: str, data: str | Path, out: str | Path, columns: Columns, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Fits a system to a table and writes a folder that `predict` reads.

    Args:
        slug: the system, one of `find_estimators()`.
        data: CSV, TSV, Parquet or whatever else the system says it reads.
        out: a new folder, or an earlier result, which is replaced. It gets the estimator, `fit.json` with
            what was asked and measured, and `experts.png`, which shows how much each expert is used.
        columns: roles of the columns.
        settings: "name=value", values as YAML.

    Returns: what `fit.json` holds.

    Raises ValueError for anything wrong with the input; then nothing is written.
    """
    module = _module(slug)
    columns.check_roles(slug, module.NEEDS, module.TAKES)
    options = _options(slug, module.OPTIONS, settings)
    if not Path(data).exists():
        raise ValueError(f"{data} does not exist; give a table")
    begun = time.perf_counter()
    with new_folder(out, "fit.json") as draft:
        with progress_shown():
            fitted = module.fit(Path(data), columns, options)
        seconds = time.perf_counter() - begun
        fitted.estimator.save(draft / "estimator")
        described = {
            "system": slug,
            "coterie": __version__,
            "data": str(data),
            "columns": columns.given(),
            "settings": options,
            "report": {**fitted.report, "seconds": round(seconds, 2)},
            "usage": {bank: [float(share) for share in usage] for bank, usage in fitted.usage.items()},
        }
        (draft / "fit.json").write_text(json.dumps(described, ensure_ascii=False, indent=1) + "\n", "utf-8")
        if fitted.usage:
            draw_usage(fitted.usage, draft / "experts.png", title=f"{slug}: how much each expert is used")
    return described


def predict(folder: str | Path, data: str | Path, out: str | Path | None = None) -> int:
    """Predicts the rows of a table with what `fit` wrote, chunk by chunk where the system can.

    Args:
        folder: of `fit`.
        data: a table with the feature columns it was fitted on.
        out: CSV or Parquet file for the predictions; None prints them as CSV.

    Returns: rows written. Raises ValueError for bad input; then no file is left behind.
    """
    file = Path(folder) / "fit.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no fitted system (no fit.json); give the --out of coterie fit")
    described = json.loads(file.read_text("utf-8"))
    roles: dict[str, Any] = {
        role: tuple(names) if isinstance(names, list) else names
        for role, names in described["columns"].items()
    }
    if not Path(data).exists():
        raise ValueError(f"{data} does not exist; give a table")
    frames = _module(described["system"]).predict(Path(folder) / "estimator", Path(data), Columns(**roles))
    return _write(frames, None if out is None else Path(out))


def _write(frames: "Iterator[pd.DataFrame]", out: Path | None) -> int:
    rows = 0
    if out is None:
        for frame in frames:
            frame.to_csv(sys.stdout, index=False, header=rows == 0)
            rows += len(frame)
        return rows
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{out} ends in {out.suffix!r}; give a .csv or .parquet file for the predictions")
    with written_whole(out) as draft:
        if out.suffix == ".parquet":
            table = import_pandas().concat(list(frames), ignore_index=True)
            table.to_parquet(draft, index=False)
            rows = len(table)
        else:
            with draft.open("w", encoding="utf-8", newline="") as file:
                for frame in frames:
                    frame.to_csv(file, index=False, header=rows == 0)
                    rows += len(frame)
    return rows


def _module(slug: str) -> Any:
    known = find_estimators()
    if slug not in known:
        raise ValueError(f"no estimator {slug!r}; {suggest(slug, known)}")
    return import_module(f"coterie.estimate.{slug.replace('-', '_')}")


def _options(slug: str, part: Any, settings: Sequence[str]) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: should be name=value")
        try:
            written[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {setting}: {value!r} is no YAML value") from None
    return read_options(slug, options_of(part), written, lambda name: "--set ")
