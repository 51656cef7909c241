"""A small report with every part, shared by the tests of the page."""

import numpy as np
import torch

from coterie.nn import Routing
from coterie.report import (
    Arm,
    Report,
    attracted_bytes,
    attracted_words,
    compare,
    load_by_layer,
    passage,
)


def random_routing(tokens, num_experts=8, k=2, seed=0, used=1.0):
    """Top-k of random scores; each slot is used with probability `used`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator)
    weights, experts = scores.topk(k)
    keep = torch.rand(tokens, k, generator=generator) < used
    return Routing(experts, weights, scores, scores, num_experts).keep(keep)


def arms(dense=1.9, moe=1.8):
    steps = list(range(1, 61))
    curves = {"steps": steps, "eval_steps": [30, 60]}
    return [
        Arm("dense", 1_430_000, 1_430_000, 9_800_000, dense, 41_230.0, 312 * 2**20,
            train=(dense + 5 / np.array(steps)).tolist(), eval=[dense + 0.2, dense], **curves),
        Arm("MoE", 5_020_000, 1_432_000, 9_800_000, moe, 28_430.0, None, 1.31, 1.42,
            train=(moe + 5 / np.array(steps)).tolist(), eval=[moe + 0.2, moe], **curves),
    ]  # fmt: skip


def report_of(text, num_layers=2, num_experts=8, used=1.0, **changes):
    """A report about `text` (bytes), routed at random."""
    ids_BS = torch.tensor(list(text)).view(1, -1)
    routings = [random_routing(len(text), num_experts, seed=l, used=used) for l in range(num_layers)]
    columns, rows = compare(arms())
    parts = {
        "title": "A run",
        "arms": arms(),
        "columns": columns,
        "rows": rows,
        "load": load_by_layer(routings),
        "words": [attracted_words(ids_BS, r, min_count=1) for r in routings],
        "bytes": [attracted_bytes(ids_BS, r, min_count=1) for r in routings],
        "passage": passage(ids_BS, routings, 0, len(text)),
        "prompt": "def ",
        "sample": "main():\n",
        "provenance": {"command": "coterie quickstart"},
    }
    return Report(**(parts | changes))
