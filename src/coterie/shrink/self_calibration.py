"""A calibration file that a checkpoint writes itself: `coterie calib`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from coterie.data import check_writable, written_whole
from coterie.hf import find_moe_blocks, load, outline
from coterie.hf.calibration import read_tokenizer
from coterie.hf.progress import showing
from coterie.shrink.calibrate import batches
from coterie.shrink.self_text import ebss, first_tokens, self_sample
from coterie.shrink.usage import balance_sigma, expert_usage

METHODS = ("ebss", "self")
BATCH = 8  # sentences at a time


@dataclass
class Written:
    """What a checkpoint wrote.

    Args:
        source: its folder.
        out: the new file.
        method: one of METHODS.
        sentences: lines of the file.
        tokens: of all of them.
        nll: mean negative log-likelihood, nats per token. Far below that of real text means repetition.
        sigma: `balance_sigma` of the text.
        experts: of all blocks.
        unused: of them, those that no token reached.
    """

    source: str
    out: str
    method: str
    sentences: int
    tokens: int
    nll: float
    sigma: float
    experts: int
    unused: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, as JSON holds them."""
        return asdict(self)


def write_calibration(
    folder: Path | str,
    out: Path | str,
    *,
    n: int = 128,
    length: int = 512,
    method: str = "ebss",
    width: int = 4,
    tau: float = 1.2,
    expand: str = "topk",
    first: str = "vocab",
    seed: int = 0,
    progress: bool | None = None,
) -> Written:
    """Lets a checkpoint write text, as a .jsonl file of "input_ids" and, with a tokenizer, "text".

    Args:
        folder: a checkpoint of a mixture of experts.
        out: a new file, which appears whole or not at all.
        n: sentences.
        length: tokens of a sentence, the model's positions at most.
        method: "ebss", or "self" for plain sampling; see `coterie.shrink.self_text`.
        width: of ebss.
        tau: of ebss.
        expand: of ebss.
        first: "vocab" or "bos". Given a tokenizer, "vocab" is its tokens without the special ones: the
            model's vocabulary may be padded with tokens that no text has.
        seed: of what is drawn.
        progress: True for a bar, False for silence, None for a bar on a terminal and plain lines elsewhere.

    Raises ValueError for a file that exists, an unknown method, and where `ebss` does.
    """
    folder, out = Path(folder), Path(out)
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; use one of {', '.join(METHODS)}")
    if out.suffix != ".jsonl" or out.exists():
        raise ValueError(f"{out} {'exists already' if out.exists() else 'is no .jsonl file'}; name a new one")
    check_writable(out)
    sketch = outline(folder)
    find_moe_blocks(sketch)
    tokenizer = read_tokenizer(folder)
    start: Any = first
    if first == "vocab" and tokenizer is not None:
        start = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    first_tokens(sketch, n, length, start, BATCH, torch.Generator())  # which refuses what cannot be, early
    model = load(folder, dtype="auto")
    with showing(-(-n // BATCH), progress) as show:

        def step() -> None:
            show.step(f"{min(show.done * BATCH + BATCH, n)} of {n} sentences")

        options: Any = {"first_token": start, "batch_size": BATCH, "seed": seed, "on_batch": step}
        if method == "ebss":
            text = ebss(model, n, length, width=width, tau=tau, expand=expand, **options)  # type: ignore[arg-type]
        else:
            text = self_sample(model, n, length, **options)
        rows = text.ids_NS.tolist()
        usage = expert_usage(model, batches(rows, BATCH))
    lines = [{"input_ids": ids} | ({"text": tokenizer.decode(ids)} if tokenizer else {}) for ids in rows]
    with written_whole(out) as draft:
        draft.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return Written(
        source=str(folder),
        out=str(out),
        method=method,
        sentences=n,
        tokens=text.ids_NS.numel(),
        nll=text.nll_N.mean().item(),
        sigma=balance_sigma(usage).item(),
        experts=sum(len(shares) for shares in usage),
        unused=sum(int((shares == 0).sum()) for shares in usage),
    )
