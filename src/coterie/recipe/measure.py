"""What a trained byte-level decoder measures on held-out text, and what its experts do there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from coterie.data import (
    END_OF_TEXT,
    ByteCorpus,
    ByteWindows,
    find_text,
    split_by_file,
    stdlib_sources,
)
from coterie.models import Decoder, active_parameters, generate
from coterie.nn import Routing
from coterie.report import Arm, attracted_bytes, attracted_words, load_by_layer, passage
from coterie.train import History, evaluate, language_model_loss

HELDOUT_WINDOWS = 1024


def corpora(
    text: Sequence[str], seq_len: int, batch_size: int, *, heldout: float, seed: int
) -> tuple[ByteWindows, ByteWindows]:
    """Training and held-out windows of files and folders; none for the standard library's own sources.

    Raises:
        ValueError: text that is missing, empty, or too small for one batch.
    """
    files = find_text(list(text)) if text else stdlib_sources()
    train, held = (
        ByteWindows(ByteCorpus(part), seq_len) for part in split_by_file(files, heldout=heldout, seed=seed)
    )
    train.check_batch(batch_size)
    held.check_batch(batch_size)
    return train, held


def sample(heldout: ByteWindows, windows: int) -> Subset[Tensor]:
    """At most this many windows from all over the held-out text, the same ones in every run."""
    order = np.random.default_rng(0).permutation(len(heldout))
    return Subset(heldout, order[:windows].tolist())


@torch.inference_mode()
def route(model: Decoder, ids_BS: Tensor) -> list[Routing]:
    """The routings of these tokens, in evaluation mode."""
    model.eval()
    routings: list[Routing] = model(ids_BS)[1]
    return routings


def routed_sample(model: Decoder, heldout: ByteWindows, windows: int) -> tuple[Tensor, list[Routing]]:
    """(ids [B, S], routings) of some held-out windows."""
    some = sample(heldout, windows)
    ids_BS = torch.stack([some[i][:-1] for i in range(len(some))])
    return ids_BS, route(model, ids_BS)


def measure_arm(
    label: str,
    model: Decoder,
    history: History,
    peak_memory: int | None,
    heldout: ByteWindows,
    batch_size: int,
) -> Arm:
    """What a trained decoder's column in the table says."""
    scores = evaluate(model, sample(heldout, HELDOUT_WINDOWS), language_model_loss(), batch_size)
    _, routings = routed_sample(model, heldout, HELDOUT_WINDOWS // 8)
    return Arm(
        label=label,
        total_parameters=model.num_parameters(),
        active_parameters=round(active_parameters(model, routings)),
        tokens=sum(history.tokens),
        held_out=scores["cross_entropy"] / np.log(2),
        tokens_per_second=history.tokens_per_second,
        peak_memory=peak_memory,
        imbalance=scores.get("imbalance"),
        entropy=scores.get("entropy"),
        steps=list(history.step),
        train=history.bits_per_token,
        eval_steps=[int(e["step"]) for e in history.evals],
        eval=[e["cross_entropy"] / np.log(2) for e in history.evals],
    )


def look_inside(model: Decoder, heldout: ByteWindows, seed: int) -> dict[str, Any]:
    """The parts of a `Report` that show a model at work: its experts' load and taste, a passage, a sample."""
    ids_BS, routings = routed_sample(model, heldout, HELDOUT_WINDOWS // 2)
    corpus = heldout.corpus
    shown = torch.from_numpy(corpus.read(0, min(model.config.max_len, len(corpus))))
    prompt = shown[: min(64, len(shown))]
    continuation = generate(
        model,
        prompt.unsqueeze(0),
        400,
        temperature=0.7,
        top_p=0.95,
        generator=torch.Generator().manual_seed(seed),
    )
    inside: dict[str, Any] = {
        "prompt": _decode(prompt.tolist()),
        "sample": _decode([int(token) for token in continuation]),
    }
    if routings:
        inside |= {
            "load": load_by_layer(routings),
            "words": [attracted_words(ids_BS.numpy(), routing) for routing in routings],
            "bytes": [attracted_bytes(ids_BS.numpy(), routing) for routing in routings],
            "passage": passage(shown.numpy(), route(model, shown.unsqueeze(0)), 0, len(shown)),
        }
    return inside


def _decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < END_OF_TEXT).decode("utf-8", "replace")
