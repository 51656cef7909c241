"""The command for owners of checkpoints whose tokens need fewer experts than they get."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.app import LOST, RESUMES, app, echo_json, interruptible


@app.command()
def top_any(
    model: Annotated[
        Path, typer.Argument(help="Folder of a checkpoint, quantized or not, with its tokenizer.")
    ],
    calib: Annotated[
        list[Path],
        typer.Option(help="Text or .jsonl to train on; repeat for more. Its last tenth is held out."),
    ],
    sparsity: Annotated[
        float, typer.Option(help="The price of an expert: the larger, the fewer are kept.")
    ] = 0.05,
    steps: Annotated[int, typer.Option(help="Of training.")] = 150,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of the masks; nothing else is trained.")] = 5e-3,
    out: Annotated[Path | None, typer.Option(help="A new folder; not needed with --dry-run.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write OUT/report.html, too, unless it is a dry run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train and measure; write nothing, time nothing.")
    ] = False,
    format: Annotated[
        str, typer.Option(help="coterie: plain transformers would read the folder, and apply no mask.")
    ] = "coterie",
    tokens: Annotated[int, typer.Option(help="Train on this many tokens of each text at most.")] = 65536,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the order of sequences and of the noise in training.")] = 0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help='Read "messages" of .jsonl lines through the tokenizer\'s chat template.'
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Train masks that let each token use fewer experts; compare before and after.

    The weights stay as they are. coterie.hf.load reads the new folder. Run it again after an interruption and
    training goes on.
    """
    from coterie.report.top_any import print_masked, write_masked_page
    from coterie.shrink.top_any_checkpoint import top_any_checkpoint

    with interruptible(LOST if dry_run else RESUMES):
        masked = top_any_checkpoint(
            model,
            out,
            calib=calib,
            sparsity=sparsity,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            format=format,
            dry_run=dry_run,
            max_tokens=tokens,
            seq_len=seq_len,
            chat=chat,
            seed=seed,
        )
    if report and masked.out is not None:
        write_masked_page(Path(masked.out) / "report.html", masked)
    if json:
        echo_json(masked.to_dict())
    else:
        print_masked(masked)
