"""Runs a paper: every arm on every seed, each kept as soon as it is finished."""

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed

import coterie
from coterie.report.html import write_whole
from coterie.reproduce.claims import BUDGETS, Budget, Outcome
from coterie.reproduce.experiment import Arm, Experiment, Values, check_name, load
from coterie.reproduce.page import write_page
from coterie.reproduce.progress import arm_progress
from coterie.reproduce.results import Result


def reproduce(
    paper: str | Experiment,
    *,
    budget: str = "standard",
    seeds: int | None = None,
    first_seed: int = 0,
    data: str | Path | None = None,
    arms: Sequence[str] = (),
    out: str | Path = "coterie-reproduce",
    progress: bool | None = None,
) -> Result:
    """Runs a paper and writes `OUT/SLUG.json` and the page `OUT/SLUG.html`.

    What an arm measured on a seed is kept in `OUT/SLUG/` until the whole is finished, so that an interrupted
    run goes on where it stopped when it is started again; unless the code, torch or the data has changed,
    when it starts afresh. Before each arm, Python's, NumPy's and torch's generators are seeded.

    Args:
        paper: a slug, see `coterie papers`; or `experiment_of(module)` of a file of one's own.
        budget: "smoke" takes seconds and proves that everything runs, "standard" tests the claims, "full" is
            larger than that.
        seeds: how many; None for 1 in a smoke run, the experiment's number (mostly 3) in a standard one, and
            at least 5 in a full one.
        first_seed: the seeds are first_seed, first_seed + 1, ….
        data: the user's file or folder, for papers that read one.
        arms: only these; none for all. Claims about the others are not tested.
        out: a folder.
        progress: show a progress bar; None shows it on a terminal, plain lines elsewhere.

    Raises:
        ValueError: an unknown paper, budget or arm, seeds below 1, data missing or in another format.
        KeyboardInterrupt: Ctrl-C; what was finished is kept.
    """
    experiment = load(paper) if isinstance(paper, str) else paper
    slug, budget = experiment.card.slug, _budget(budget)
    chosen = _choose(experiment, arms)
    numbers = _seeds(experiment, budget, seeds, first_seed)
    content = _read(experiment, data)
    folder = Path(out) / slug / budget
    key = identity([budget], [Path(data)] if data is not None else [])

    def on_budget(run: Arm) -> Callable[[int], Values]:
        return lambda seed: run(seed, budget, content)

    runs = {arm: on_budget(experiment.arms[arm]) for arm in chosen}
    values, seconds = measure_arms(slug, runs, numbers, folder, key, progress)
    provenance = _provenance(experiment, budget, numbers, data, arms)
    result = Result(slug, budget, numbers, values, seconds, [], provenance)
    result.claims = judge(experiment, result)
    write_whole(Path(out) / f"{slug}.json", result.to_json())
    write_page(Path(out) / f"{slug}.html", experiment, result)
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
    return result


def measure_arms(
    title: str,
    arms: Mapping[str, Callable[[int], Values]],
    seeds: Sequence[int],
    folder: Path,
    key: str,
    progress: bool | None,
) -> tuple[dict[str, list[Values]], dict[str, list[float]]]:
    """Runs every arm on every seed and keeps each in the folder, for an interrupted run to go on with.

    Args:
        title: of the progress bar.
        arms: name → (seed → what was measured).
        seeds: what the arms are called with.
        folder: for what is finished; the caller removes it.
        key: of `identity`; what was kept under another key is measured again.
        progress: show a progress bar; None shows it on a terminal, plain lines elsewhere.

    Returns: (values, seconds), arm → seed by seed.
    """
    values: dict[str, list[Values]] = {arm: [] for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    work = [(arm, seed) for seed in seeds for arm in arms]
    with arm_progress(title, [arm for arm, _ in work], show=progress) as shown:
        for arm, seed in work:
            shown.begin(arm, seed)
            kept = folder / arm / f"seed-{seed}.json"
            found = _finished(kept, key)
            measured = found or _measure(arms[arm], arm, seed)
            if found is None:
                write_whole(kept, json.dumps({"identity": key, **measured}))
            values[arm].append(measured["values"])
            seconds[arm].append(measured["seconds"])
            shown.end(measured["seconds"], loaded=found is not None)
    return values, seconds


def identity(parts: Sequence[str], paths: Sequence[Path]) -> str:
    """A digest of this package's code, torch's version, the parts, and the size and time of the files."""
    digest = hashlib.sha256()
    for source in sorted(Path(coterie.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    files = [f for path in paths for f in sorted([path, *path.rglob("*")]) if f.is_file()]
    said = [*parts, str(torch.__version__)]
    said += [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    digest.update("\n".join(said).encode())
    return digest.hexdigest()


def judge(experiment: Experiment, result: Result) -> list[Outcome]:
    """What becomes of the experiment's claims."""
    left_out = [arm for arm in experiment.arms if arm not in result.arms]
    numbers = result.numbers()
    return [claim.judge(numbers, result.budget, left_out) for claim in experiment.claims]


def _budget(budget: str) -> Budget:
    check_name("budget", budget, BUDGETS)
    return cast(Budget, budget)


def _choose(experiment: Experiment, arms: Sequence[str]) -> list[str]:
    for arm in arms:
        check_name(f"arm of {experiment.card.slug}", arm, list(experiment.arms))
    return [arm for arm in experiment.arms if arm in arms or not arms]


def _seeds(experiment: Experiment, budget: Budget, seeds: int | None, first: int) -> list[int]:
    usual = {"smoke": 1, "standard": experiment.seeds, "full": max(5, experiment.seeds)}[budget]
    count = usual if seeds is None else seeds
    if count < 1 or first < 0:
        raise ValueError(f"seeds={count} from {first}; use at least one seed, and none below 0")
    return list(range(first, first + count))


def _read(experiment: Experiment, data: str | Path | None) -> Any:
    if data is None:
        return None
    if experiment.read_data is None:
        raise ValueError(f"{experiment.card.slug} makes its own data and reads none; leave --data out")
    if not Path(data).exists():
        raise ValueError(f"{data} does not exist; --data takes a file or a folder")
    return experiment.read_data(Path(data))


def _measure(run: Callable[[int], Values], arm: str, seed: int) -> dict[str, Any]:
    set_seed(seed)
    began = time.perf_counter()
    values = run(seed)
    seconds = time.perf_counter() - began
    return {"values": {name: _plain(arm, name, value) for name, value in values.items()}, "seconds": seconds}


def _plain(arm: str, name: str, value: Any) -> float | list[list[float]]:
    """A number, or a curve with the six digits that a drawing can show.

    JSON knows no NaN, and a claim could not be compared with one.
    """
    plain: float | list[list[float]]
    if isinstance(value, Sequence):
        plain = [[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in value]
    else:
        plain = float(value)
    numbers = [plain] if isinstance(plain, float) else [number for point in plain for number in point]
    if not all(map(math.isfinite, numbers)):
        raise RuntimeError(f"arm {arm!r} measured {name} = NaN or infinity; measure what can be compared")
    return plain


def _finished(kept: Path, key: str) -> dict[str, Any] | None:
    """What an interrupted run of the same code on the same data left behind."""
    if not kept.exists():
        return None
    content = json.loads(kept.read_text("utf-8"))
    return content if content.pop("identity") == key else None


def _provenance(
    experiment: Experiment, budget: Budget, seeds: list[int], data: str | Path | None, arms: Sequence[str]
) -> dict[str, str]:
    options = ["--budget", budget, "--seeds", str(len(seeds)), "--first-seed", str(seeds[0])]
    options += ["--data", str(data)] if data is not None else []
    options += ["--arms", ",".join(arms)] if arms else []
    return {
        "command": shlex.join(["coterie", "reproduce", experiment.card.slug, *options]),
        "data": "built in" if data is None else str(data),
        "seeds": ", ".join(map(str, seeds)),
        **environment(),
    }


def environment() -> dict[str, str]:
    """What any run's numbers depend on beside its own settings: versions and machine."""
    return {
        "versions": f"coterie {coterie.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}",
    }
