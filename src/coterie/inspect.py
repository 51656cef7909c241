"""Looking inside a checkpoint: what each expert does with some text. `coterie inspect`."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import coterie
from coterie.data import counted
from coterie.hf import (
    BlockRecord,
    Checkpoint,
    MoEBlock,
    calibration_ids,
    holds_ids,
    load_tokenizer,
    stream_records,
)
from coterie.hf.calibration import within_positions
from coterie.report import (
    Explorer,
    ExplorerLayer,
    Passage,
    attracted_tokens,
    format_count,
    format_number,
    print_table,
    write_explorer,
)
from coterie.shrink import importance, kept_experts, overlap

PASSAGE = 600  # tokens shown in the explorer, shared out among the texts
PARTNERS = 3  # shown of each expert
QUARTER = 4  # texts are compared by the most important E / 4 experts


@dataclass
class Inspection:
    """What was found.

    Args:
        model: the folder.
        texts: name of each calibration text.
        tokens: of each.
        blocks: names of the MoE blocks in the model, in order of depth.
        num_experts: of each block.
        top_k: of each block.
        layers: what each block did; see `ExplorerLayer`.
        overlap: `[texts][texts]`, share of the most important quarter of the experts that two texts have in
            common, over all blocks; by Σ weight · ‖output‖.
        passage: the beginning of each text, and where every block sent it.
    """

    model: str
    texts: list[str]
    tokens: list[int]
    blocks: list[str]
    num_experts: list[int]
    top_k: list[int]
    layers: list[ExplorerLayer]
    overlap: list[list[float]]
    passage: Passage

    def to_json(self) -> str:
        """All but the passage, as a JSON object."""
        content = asdict(self)
        del content["passage"]
        return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)


def inspect(
    model: Path | str,
    texts: Sequence[Path | str],
    *,
    tokens: int = 4096,
    length: int = 512,
    chat: bool = False,
) -> Inspection:
    """Runs a checkpoint on text, one decoder layer in memory at a time, and says what its experts did.

    Inside `coterie.data.progress_shown`, a bar counts the layers.

    Args:
        model: folder with config.json and safetensors.
        texts: see `coterie.hf.calibration_ids`; several are compared with each other.
        tokens: of each text, at most.
        length: of a sequence; the model's positions, if it has fewer.
        chat: see `coterie.hf.calibration_ids`.

    Raises ValueError if the model has no MoE blocks or cannot be streamed, or a text cannot be used.
    """
    if not texts:
        raise ValueError("there is no text to run the model on; give at least one")
    if tokens < 1 or length < 1:
        raise ValueError(f"tokens={tokens} and length={length}; both must be positive")
    checkpoint = Checkpoint(model, experts_implementation="coterie")
    config = checkpoint.model.config.get_text_config()
    length = within_positions(config, length)
    tokenizer = None if all(map(holds_ids, texts)) else load_tokenizer(model)
    ids_BS = [
        calibration_ids(
            text, tokenizer, tokens=tokens, length=length, vocab_size=config.vocab_size, chat=chat
        )
        for text in texts
    ]

    def name(token: int) -> str:
        return f"{token} " if tokenizer is None else str(tokenizer.decode([token])).replace("\ufffd", "·")

    sizes = [ids.numel() for ids in ids_BS]
    ids_T = torch.cat([ids.flatten() for ids in ids_BS])
    lengths = [min(size, PASSAGE // len(sizes)) for size in sizes]
    shown = torch.cat([at + torch.arange(n) for (at, _), n in zip(_starts(sizes), lengths, strict=True)])
    passage = Passage([name(int(token)) for token in ids_T[shown]], [], [])
    ends = [at for at, _ in _starts(lengths)][:0:-1]  # where all texts but the first begin, the last first
    for end in ends:
        passage.texts.insert(end, "\n\n")
    found = Inspection(str(model), _names(texts), sizes, [], [], [], [], [], passage)
    kept: list[list[list[int]]] = [[] for _ in texts]
    # one sequence at a time: attention's memory grows with the batch
    batches = [batch for ids in ids_BS for batch in ids.split(1)]  # type: ignore[no-untyped-call]
    records = stream_records(checkpoint, batches)
    for block, record in counted(records, "layers", len(checkpoint.blocks)):
        parts = [_part(record, at, size) for at, size in _starts(sizes)]
        found.layers.append(_layer(block, record, parts, ids_T, name))
        found.blocks.append(block.name)
        found.num_experts.append(block.num_experts)
        found.top_k.append(record.experts.shape[1])
        for chosen, part in zip(kept, parts, strict=True):
            [score_E] = importance([part], "gating-norm")
            chosen.append(kept_experts(score_E, max(1, block.num_experts // QUARTER)))
        experts, weights = _heaviest_first(_part(record, shown))
        for end in ends:  # what stands between two texts has no expert
            experts.insert(end, [])
            weights.insert(end, [])
        passage.experts.append(experts)
        passage.weights.append(weights)
    found.overlap = [[overlap(some, others) for others in kept] for some in kept]
    return found


def print_inspection(found: Inspection) -> None:
    """Prints the tables on the terminal."""
    columns, rows = overview(found)
    print_table(f"{found.model}, {format_count(sum(found.tokens))} tokens", columns, rows)
    if len(found.texts) > 1:
        print()
        columns, rows = overlap_table(found)
        print_table("Most important quarter of the experts, share in common (by chance 25%)", columns, rows)


def write_page(path: Path, found: Inspection, command: str = "") -> None:
    """Writes the routing explorer: in each layer, the experts of a token and the tokens of an expert.

    Raises ValueError if the file cannot be written.
    """
    columns, rows = overview(found)
    texts = ", ".join(f"{name} ({n:,} tokens)" for name, n in zip(found.texts, found.tokens, strict=True))
    page = Explorer(
        title=Path(found.model).name,
        headline=headline(found),
        texts=found.texts,
        columns=columns,
        rows=rows,
        layers=found.layers,
        passage=found.passage,
        overlap=overlap_table(found) if len(found.texts) > 1 else None,
        overlap_note="Share of the most important quarter of the experts, by Σ weight · ‖output‖, that two "
        "texts have in common, over all layers. By chance it would be 25%.",
        provenance={
            "model": found.model,
            "texts": texts,
            **({"command": command} if command else {}),
            "versions": f"coterie {coterie.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
        },
    )
    try:
        write_explorer(path, page)
    except OSError as error:
        raise ValueError(f"cannot write the page: {error}") from None


def headline(found: Inspection) -> str:
    """The most uneven layer and what is never used, in a sentence."""
    peaks = [max(_mean_load(found, layer)) for layer in found.layers]
    worst = max(range(len(peaks)), key=peaks.__getitem__)
    unused = sum(weight is None for layer in found.layers for weight in layer.weights)
    idle = (
        f"{unused} of {sum(found.num_experts)} experts were not used" if unused else "Every expert was used"
    )
    busiest = (
        f"the busiest, in layer {found.layers[worst].name}, took {peaks[worst]:.1f} times its fair share"
    )
    return f"{idle}; {busiest}."


def overview(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of layers."""
    columns = ["layer", "experts", "top-k", "busiest load", "least load", "unused", "busiest experts"]
    rows = []
    for layer, experts, k in zip(found.layers, found.num_experts, found.top_k, strict=True):
        load = _mean_load(found, layer)
        busiest = sorted(range(experts), key=lambda e: -load[e])[:4]
        unused = sum(weight is None for weight in layer.weights)
        numbers = [str(experts), str(k), format_number(max(load)), format_number(min(load)), str(unused)]
        rows.append([layer.name, *numbers, " ".join(map(str, busiest))])
    return columns, rows


def overlap_table(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of texts."""
    rows = zip(found.texts, found.overlap, strict=True)
    return ["", *found.texts], [[name, *(f"{share:.0%}" for share in row)] for name, row in rows]


def _layer(
    block: MoEBlock,
    record: BlockRecord,
    parts: Sequence[BlockRecord],
    ids_T: Tensor,
    name: Callable[[int], str],
) -> ExplorerLayer:
    used_E = record.sum_by_expert(torch.ones_like(record.weights))

    def mean(values_TK: Tensor) -> list[float | None]:
        sums_E = record.sum_by_expert(values_TK)
        return [float(s / n) if n else None for s, n in zip(sums_E, used_E, strict=True)]

    loads = [part.sum_by_expert(torch.ones_like(part.weights)) for part in parts]
    return ExplorerLayer(
        name=next((part for part in block.name.split(".") if part.isdigit()), block.name),
        load=[(load_E / load_E.mean().clamp(min=1e-9)).tolist() for load_E in loads],
        weights=mean(record.weights),
        norms=mean(record.norms),
        partners=_partners(record),
        tokens=attracted_tokens(ids_T, lambda token: _visible(name(token)), record, top=6),
    )


def _visible(text: str) -> str:
    """A token with its white space to be seen: beside others in a list it would not be."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def _partners(record: BlockRecord) -> list[list[tuple[int, float]]]:
    """The experts that took part in most of each expert's tokens."""
    used_TE = torch.zeros(len(record.experts), record.num_experts + 1)
    used_TE.scatter_(1, record.experts.where(record.experts >= 0, record.num_experts), 1)
    both_EE = (used_TE.T @ used_TE)[:-1, :-1]
    share_EE = both_EE / both_EE.diagonal().clamp(min=1).unsqueeze(1)
    best = share_EE.fill_diagonal_(0).topk(min(PARTNERS, record.num_experts - 1))
    pairs = [zip(*row, strict=True) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [[(other, share) for other, share in row if share > 0] for row in pairs]


def _heaviest_first(record: BlockRecord) -> tuple[list[list[int]], list[list[float]]]:
    """Experts and weights of every token, by falling weight, without unused slots."""
    order_TK = record.weights.masked_fill(record.experts < 0, -torch.inf).argsort(1, descending=True)
    experts_TK, weights_TK = record.experts.gather(1, order_TK), record.weights.gather(1, order_TK)
    counts = (record.experts >= 0).sum(1).tolist()
    rows = list(zip(experts_TK.tolist(), weights_TK.tolist(), counts, strict=True))
    return [experts[:n] for experts, _, n in rows], [weights[:n] for _, weights, n in rows]


def _part(record: BlockRecord, at: int | Tensor, size: int = 0) -> BlockRecord:
    """The record of some of its tokens: of `size` from `at`, or of those numbered in `at`."""
    rows = at if isinstance(at, Tensor) else torch.arange(at, at + size)
    parts = ("experts", "weights", "norms", "moved")
    return replace(record, **{what: getattr(record, what)[rows] for what in parts})


def _starts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first token, tokens) of each text."""
    at = 0
    for size in sizes:
        yield at, size
        at += size


def _mean_load(found: Inspection, layer: ExplorerLayer) -> list[float]:
    """Load over all texts, as a multiple of the fair share."""
    shares = [n / sum(found.tokens) for n in found.tokens]
    return [sum(s * n for s, n in zip(shares, each, strict=True)) for each in zip(*layer.load, strict=True)]


def _names(texts: Sequence[Path | str]) -> list[str]:
    """File or folder names without suffix, where those tell the texts apart."""
    short = [Path(text).stem for text in texts]
    return short if len(set(short)) == len(short) else [str(text) for text in texts]
