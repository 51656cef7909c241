"""Estimators from the command line: one file per system says how `coterie fit` and `predict` use it.

A system's file, `estimate/<slug_with_underscores>.py`, has

    NEEDS = ("target",)                  # the roles of columns it must be given; see `Columns`
    TAKES = ("sensitive",)               # and those it may be given
    OPTIONS = SomeEstimator              # what `--set name=value` sets: its plainly typed arguments

    def fit(data: Path, columns: Columns, options: dict[str, Any]) -> Fitted: ...
    def predict(folder: Path, data: Path, columns: Columns) -> Iterator[DataFrame]: ...

`fit` reads the file, holds some of it out, fits, and measures on what it held out; `predict` loads what
`Fitted.estimator.save(folder)` wrote. Both raise ValueError for bad input; neither prints.
"""

from coterie.estimate.columns import Columns
from coterie.estimate.run import Fitted, find_estimators, fit, predict

__all__ = ["Columns", "Fitted", "find_estimators", "fit", "predict"]
