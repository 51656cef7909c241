"""Commands for owners of checkpoints: inspect, calib, prune, merge, quantize."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.app import LOST, RESUMES, app, echo_json, interruptible

if TYPE_CHECKING:
    from coterie.shrink.result import Shrunk

_Chat = Annotated[
    bool,
    typer.Option("--chat", help='Read "messages" of .jsonl lines through the tokenizer\'s chat template.'),
]


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint: config.json and safetensors.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file, folder, .jsonl, saved dataset, or ids as .pt or .safetensors; repeat to compare."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of each text, at most.")] = 4096,
    chat: _Chat = False,
    html: Annotated[Path | None, typer.Option(help="Write the routing explorer here, one page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Say what each expert of a checkpoint does with some text; one layer is in memory at a time."""
    from coterie.data import check_writable, progress_shown
    from coterie.inspect import inspect, print_inspection, write_page

    if html:
        check_writable(html)
        if html.is_dir():
            raise ValueError(
                f"{html} is a folder; name a file for the page, such as {html / 'explorer.html'}"
            )
    with interruptible(LOST), progress_shown():
        found = inspect(model, text or [], tokens=tokens, chat=chat)
    if html:
        write_page(html, found, command=_command())
    if json:
        typer.echo(found.to_json())
        return
    print_inspection(found)
    if html:
        typer.echo(f"\nexplorer    {html}")


_Calib = Annotated[
    list[Path],
    typer.Option(help="Text or .jsonl of a domain; repeat for more domains. Its last tenth is held out."),
]
_Out = Annotated[Path | None, typer.Option(help="A new folder; not needed with --dry-run.")]
_Format = Annotated[
    str, typer.Option(help="transformers: loads without coterie. coterie: layers may differ, too.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be kept; write nothing.")]
_Report = Annotated[
    bool, typer.Option("--report", help="Write OUT/report.html, too, unless it is a dry run.")
]
_Tokens = Annotated[int, typer.Option(help="Calibrate on this many tokens of each domain at most.")]
_SeqLen = Annotated[int, typer.Option(help="Tokens of a sequence at most.")]
_Stream = Annotated[
    bool,
    typer.Option("--stream", help="One layer in memory at a time; measures no perplexity and no speed."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")]


@app.command()
def calib(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer if it has one.")],
    out: Annotated[Path, typer.Option(help="A new .jsonl file, for --calib of the other commands.")],
    n: Annotated[int, typer.Option(help="Sentences to write.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a sentence.")] = 512,
    method: Annotated[
        str, typer.Option(help="ebss: a beam search that keeps experts balanced. self: plain sampling.")
    ] = "ebss",
    width: Annotated[int, typer.Option(help="Of ebss: branches of a sentence.")] = 4,
    tau: Annotated[float, typer.Option(help="Of ebss: the smaller, the more balance counts.")] = 1.2,
    expand: Annotated[
        str, typer.Option(help="Of ebss: topk looks at all continuations; sample draws two, more varied.")
    ] = "topk",
    first: Annotated[str, typer.Option(help="First token of a sentence: vocab, any; or bos.")] = "vocab",
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    json: _Json = False,
) -> None:
    """Let a checkpoint write its own calibration text; say how evenly that uses the experts."""
    from coterie.report.quantized import print_written
    from coterie.shrink.self_calibration import write_calibration

    with interruptible(LOST):
        written = write_calibration(
            model,
            out,
            n=n,
            length=length,
            method=method,
            width=width,
            tau=tau,
            expand=expand,
            first=first,
            seed=seed,
        )
    if json:
        echo_json(written.to_dict())
    else:
        print_written(written)


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer.")],
    calib: _Calib,
    keep: Annotated[int, typer.Option(help="Experts to keep in each layer.")],
    method: Annotated[
        str,
        typer.Option(
            help="easy-ep, reap, frequency, gating, gating-norm, gating-token, random; or output-error, "
            "which tries all choices where they are few."
        ),
    ] = "easy-ep",
    out: _Out = None,
    report: _Report = False,
    dry_run: _DryRun = False,
    format: _Format = "transformers",
    tokens: _Tokens = 65536,
    seq_len: _SeqLen = 512,
    seed: Annotated[int, typer.Option(help="Of the method random.")] = 0,
    stream: _Stream = False,
    chat: _Chat = False,
    json: _Json = False,
) -> None:
    """Keep the experts that some text needs and delete the others; compare before and after.

    Run it again after an interruption and it goes on with the calibration that was done.
    """
    from coterie.shrink.checkpoint import prune_checkpoint

    _shrink(
        lambda: prune_checkpoint(
            model,
            out,
            keep=keep,
            calib=calib,
            method=method,
            format=format,
            dry_run=dry_run,
            max_tokens=tokens,
            seq_len=seq_len,
            stream=stream,
            chat=chat,
            seed=seed,
        ),
        LOST if dry_run or stream else RESUMES,
        report and not dry_run,
        json,
    )


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer.")],
    calib: _Calib,
    groups: Annotated[int, typer.Option(help="Experts that are left in each layer.")],
    method: Annotated[
        str,
        typer.Option(help="m-smoe, whole experts; or dern, neuron by neuron into the experts that are left."),
    ] = "m-smoe",
    threshold: Annotated[
        float, typer.Option(help="Of dern: the cosine above which a neuron counts as similar, -1 to 1.")
    ] = 0.6,
    out: _Out = None,
    report: _Report = False,
    dry_run: _DryRun = False,
    format: _Format = "transformers",
    tokens: _Tokens = 65536,
    seq_len: _SeqLen = 512,
    stream: _Stream = False,
    chat: _Chat = False,
    json: _Json = False,
) -> None:
    """Merge experts that are alike, group by group; compare before and after."""
    from coterie.shrink.checkpoint import merge_checkpoint

    _shrink(
        lambda: merge_checkpoint(
            model,
            out,
            groups=groups,
            calib=calib,
            method=method,
            threshold=threshold,
            format=format,
            dry_run=dry_run,
            max_tokens=tokens,
            seq_len=seq_len,
            stream=stream,
            chat=chat,
        ),
        LOST if dry_run or stream else RESUMES,
        report and not dry_run,
        json,
    )


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its tokenizer.")],
    calib: _Calib,
    bits: Annotated[
        float, typer.Option(help="Per expert, on average for mc-sharp (2.05); else 1, 2, 3, 4 or 8.")
    ],
    test: Annotated[
        list[Path] | None,
        typer.Option(help="Measure perplexity on this text instead, as for text that the model wrote."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="mc-sharp: 1, 2 or 3 bits, as each expert needs. moequant, gptq, awq, rtn: all the same."
        ),
    ] = "mc-sharp",
    affinity: Annotated[
        bool,
        typer.Option(
            "--affinity", help="Count tokens by their expert's weight, as moequant does (gptq, awq)."
        ),
    ] = False,
    scope: Annotated[
        str,
        typer.Option(help="Of mc-sharp: layer, each has --bits on average; model, some layers get more."),
    ] = "layer",
    router_bits: Annotated[
        int | None,
        typer.Option(
            help="Of the routers, which keep their bytes: 2, 3, 4, 8; 16, unrounded. "
            "If not given, those of the experts for moequant, and 16 for the others.",
            show_default=False,
        ),
    ] = None,
    out: _Out = None,
    report: _Report = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which bits would be chosen; write nothing.")
    ] = False,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1 for whole rows.")] = 128,
    tokens: _Tokens = 65536,
    seq_len: _SeqLen = 512,
    stream: _Stream = False,
    chat: _Chat = False,
    json: _Json = False,
) -> None:
    """Store the experts in few bits; compare bytes, perplexity and speed before and after.

    The new folder is read by coterie.hf.load. Run it again after an interruption and it goes on
    after the last block that was done.
    """
    from coterie.report.quantized import print_quantized, write_quantized_page
    from coterie.shrink.quantize_checkpoint import quantize_checkpoint

    with interruptible(LOST if dry_run else RESUMES):
        quantized = quantize_checkpoint(
            model,
            out,
            bits=bits,
            calib=calib,
            test=test or [],
            method=method,
            affinity=affinity,
            scope=scope,
            router_bits=router_bits,
            group_size=group_size,
            dry_run=dry_run,
            max_tokens=tokens,
            seq_len=seq_len,
            stream=stream,
            chat=chat,
        )
    if report and quantized.out is not None:
        write_quantized_page(Path(quantized.out) / "report.html", quantized)
    if json:
        echo_json(quantized.to_dict())
    else:
        print_quantized(quantized)


def _shrink(run: Callable[[], "Shrunk"], advice: str, report: bool, json: bool) -> None:
    from coterie.report.shrunk import print_shrunk, write_shrunk_page

    with interruptible(advice):
        shrunk = run()
    if report:
        write_shrunk_page(Path(str(shrunk.out)) / "report.html", shrunk, command=_command())
    if json:
        echo_json(shrunk.to_dict())
    else:
        print_shrunk(shrunk)


def _command() -> str:
    return shlex.join(["coterie", *sys.argv[1:]])
