"""The command for owners of checkpoints that know too much."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.app import LOST, RESUMES, app, echo_json, interruptible


@app.command()
def unlearn(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer.")],
    forget: Annotated[
        Path, typer.Option(help="Text, folder, .jsonl or ids to forget. Its last tenth is held out.")
    ],
    retain: Annotated[Path, typer.Option(help="The same of what should stay.")],
    method: Annotated[
        str,
        typer.Option(
            help="ga: ascent. gdiff, kl: ascent, with a loss or a divergence on what should stay. npo: "
            "ascent that levels off. rmu: representations are led astray."
        ),
    ] = "ga",
    scope: Annotated[
        str,
        typer.Option(
            help="expert: the one that knows it most, and its router. experts, router, all: to compare."
        ),
    ] = "expert",
    experts: Annotated[int, typer.Option(help="How many experts, in the scope expert.")] = 1,
    stop_forget: Annotated[
        float | None,
        typer.Option(help="Stop at this next-token accuracy on held-out text to forget, 0 to 1."),
    ] = None,
    steps: Annotated[int, typer.Option(help="At most.")] = 60,
    lr: Annotated[
        float | None, typer.Option(help="Default: 1e-4 in the scope expert, 5e-5 in the others.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    out: Annotated[Path | None, typer.Option(help="A new folder; not needed with --dry-run.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write OUT/report.html, too, unless it is a dry run.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Find the expert; write nothing.")] = False,
    tokens: Annotated[int, typer.Option(help="Read this many tokens of each text at most.")] = 131072,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the order of sequences, and of rmu's direction.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Take a text out of the one expert that knows it, and keep the rest; compare before and after.

    What is written loads with plain transformers. Run it again after an interruption and it goes on after
    the last step that was done.
    """
    from coterie.report.unlearned import print_unlearned, write_unlearned_page
    from coterie.tune.checkpoint import unlearn_checkpoint

    with interruptible(LOST if dry_run else RESUMES):
        done = unlearn_checkpoint(
            model,
            out,
            forget=forget,
            retain=retain,
            method=method,
            scope=scope,
            experts=experts,
            steps=steps,
            lr=lr,
            stop_forget=stop_forget,
            batch_size=batch_size,
            max_tokens=tokens,
            seq_len=seq_len,
            dry_run=dry_run,
            seed=seed,
        )
    if report and done.out is not None:
        write_unlearned_page(Path(done.out) / "report.html", done)
    if json:
        echo_json(done.to_dict())
    else:
        print_unlearned(done)
