"""Commands for tables: fit, predict."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.app import LOST, app, echo_json, interruptible


@app.command()
def fit(
    system: Annotated[str, typer.Argument(help="comet-trees, …; an unknown name lists them.")],
    data: Annotated[Path, typer.Option(help="CSV, TSV or Parquet.")],
    out: Annotated[Path, typer.Option(help="A new folder for what was learnt.")],
    target: Annotated[list[str] | None, typer.Option(help="Column to predict; repeat for several.")] = None,
    time: Annotated[str | None, typer.Option(help="Column by which rows are in order.")] = None,
    group: Annotated[str | None, typer.Option(help="Column of users, persons or instruments.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of items shown to users.")] = None,
    sensitive: Annotated[str | None, typer.Option(help="Column of a protected attribute.")] = None,
    feature: Annotated[
        list[str] | None, typer.Option(help="Column to predict from; repeat. Default: all others.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="name=value, an argument of the estimator; repeat for more.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Fit one of the estimators to a table, and measure it on rows that were held out."""
    with interruptible(LOST):  # the imports, too, which take seconds
        from coterie.estimate import Columns
        from coterie.estimate import fit as run

        columns = Columns(tuple(target or ()), time, group, item, sensitive, tuple(feature or ()))
        described = run(system, data, out, columns, set or [])
    if json:
        echo_json(described)
        return
    for name, value in described["report"].items():
        typer.echo(f"{name:<32}{value:.4g}" if isinstance(value, float) else f"{name:<32}{value}")
    typer.echo(f"\nwritten to {out}; predict with: coterie predict {out} --data FILE")


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="What `coterie fit --out` wrote.")],
    data: Annotated[Path, typer.Option(help="A table with the columns it was fitted on.")],
    out: Annotated[Path | None, typer.Option(help=".csv or .parquet. Default: CSV to the terminal.")] = None,
) -> None:
    """Predict the rows of a table with a fitted estimator."""
    with interruptible(LOST):
        from coterie.estimate import predict as run

        rows = run(folder, data, out)
    if out:
        typer.echo(f"{rows} rows written to {out}")
