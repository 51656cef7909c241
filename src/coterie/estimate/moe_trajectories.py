"""`coterie fit moe-trajectories`: latent classes of growth from a wide or a long table.

Wide (Y1, Y2, …, T1, T2, …): `--set y=Y --set t=T`. Long: `--group id --time time --target y`. Covariates,
curve and number of classes through `--set gate="gx1 + gx2" --set experts="ex1 + ex2" --set n_classes=2`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data import import_pandas, read_table
from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted
from coterie.longitudinal import TrajectoryMoE

if TYPE_CHECKING:
    import pandas as pd

NEEDS = ()
TAKES = ("target", "time", "group")
OPTIONS = TrajectoryMoE
_HELD_OUT = 0.2


def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted:
    """Measures the log-likelihood on a fifth of the persons, then estimates the model on all of them."""
    frame = read_table(data)
    options = {**options, **_long(columns, options)}
    held_out = _some_persons(frame, options.get("person"), options.get("random_state", 0))
    trial = TrajectoryMoE(**options).fit(frame[~held_out])
    estimator = TrajectoryMoE(**options).fit(frame)
    report: dict[str, float | int | str] = {
        "held-out persons": len(trial.predict(frame[held_out])),
        "held-out nats per person": trial.score(frame[held_out]),
        "log-likelihood": f"{estimator.log_likelihood_:.2f}",
        "BIC": f"{estimator.bic_:.2f}",
        "entropy": estimator.entropy_,
        "parameter": "   estimate    std err  [0.025, 0.975]",
    }
    for (where, name), row in estimator.summary_.iterrows():
        interval = f"[{row['low']:.4g}, {row['high']:.4g}]"
        report[f"{where}: {name}"] = f"{row['estimate']:>11.4g}{row['se']:>11.4g}  {interval}"
    return Fitted(estimator, report, {"classes": estimator.expert_usage_.tolist()})


def predict(folder: Path, data: Path, columns: Columns) -> "Iterator[pd.DataFrame]":
    """One row per person: its name (row of a wide table), most probable class, probability of each."""
    estimator = TrajectoryMoE.load(folder)
    classes = estimator.classes(read_table(data))
    yield classes.rename_axis(estimator.person or "row").reset_index()


def _long(columns: Columns, options: dict[str, Any]) -> dict[str, str]:
    """The estimator's arguments of a long table, from the roles of its columns."""
    given = columns.given()
    if not given:
        return {}
    missing = [f"--{role}" for role in ("group", "time", "target") if role not in given]
    if missing or len(columns.target) > 1:
        found = f"{', '.join(missing)} missing" if missing else f"{len(columns.target)} targets given"
        raise ValueError(
            f"moe-trajectories: a long table needs --group, --time and one --target; {found} "
            "(a wide table needs none of them: --set y=PREFIX --set t=PREFIX)"
        )
    twice = sorted({"y", "t", "person"} & {*options})
    if twice:
        raise ValueError(f"moe-trajectories: {', '.join(twice)} set twice, by --set and by a column's role")
    return {"person": str(columns.group), "t": str(columns.time), "y": columns.target[0]}


def _some_persons(
    frame: "pd.DataFrame", person: str | None, seed: int
) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """[rows] True for a fifth of the persons."""
    if person is None or person not in frame.columns:  # the estimator says what a table without it lacks
        codes = np.arange(len(frame))
    else:
        codes, _ = import_pandas().factorize(frame[person])
    drawn = np.random.default_rng(seed).random(codes.max() + 1) < _HELD_OUT
    return drawn[codes]  # type: ignore[no-any-return]
