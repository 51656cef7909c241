"""Dropping experts and giving their neurons to those that stay, without training.

1. The experts that the router weighs least are dropped.
2. Each of their neurons moves to the kept expert that has the most similar one, if it is similar enough.
3. Each kept expert groups its own neurons and those it was given into as many as it had.

Letters: E experts before, R after, F their hidden width, D the width they read, W the width of a segment.

Source: DERN (Findings of EMNLP 2025, arXiv 2509.10377).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.hf import ExpertTensors, MoEBlock
from coterie.shrink.importance import kept_experts
from coterie.shrink.kmeans import spherical_kmeans
from coterie.shrink.prune import check_keep
from coterie.shrink.segments import Part, from_segments, to_segments

Init = Literal["own", "gate", "random"]

_CHUNK = 4096  # neurons that are compared with one expert's at a time


@dataclass(frozen=True)
class Recombined:
    """What `dern` did to a block.

    Args:
        kept: ids of the experts that stay, rising.
        transfer: M [R, E]: the share of expert e's neurons that expert kept[r] was given, 1 for itself.
            What a column lacks to 1 was thrown away.
        cosine: of a dropped expert's neuron with the most similar kept one, their mean; 1 if none was
            dropped.
    """

    kept: list[int]
    transfer: Tensor
    cosine: float

    @property
    def members(self) -> list[list[int]]:
        """For each expert that is left, the old ids of those whose neurons it is made of, itself first."""
        return [
            [k, *(e for e in row.nonzero().flatten().tolist() if e != k)]
            for k, row in zip(self.kept, self.transfer, strict=True)
        ]

    @property
    def moved(self) -> float:
        """Share of the dropped experts' neurons that found another expert; 0 if none was dropped."""
        dropped = [e for e in range(self.transfer.shape[1]) if e not in self.kept]
        return self.transfer[:, dropped].sum(0).mean().item() if dropped else 0.0


def dern(
    block: MoEBlock,
    importance_E: Tensor,
    keep: int,
    *,
    threshold: float = 0.6,
    parts: Sequence[Part] = ("up", "down"),
    init: Init = "own",
    weighted: bool = True,
    iterations: int = 20,
    seed: int = 0,
) -> Recombined:
    """Keeps the `keep` most important experts of a block, in place, with the neurons of the others in them.

    Router entries of dropped experts are deleted. To send their tokens after their neurons instead, in
    memory, see `coterie.shrink.transfer`.

    Args:
        block: whose experts are dropped and recombined.
        importance_E: ≥ 0; in the paper the mean weight that an expert is given, `gating`.
        keep: R, top_k ≤ R ≤ E.
        threshold: a neuron moves if its cosine with the most similar kept one is above this, -1 to 1.
        parts: of the neurons, which are compared. The paper found leaving out the gate to be better.
        init: the first centres of the clusters. "own" takes the kept expert's own neurons; "gate",
            literally the paper's, those with the largest gate weights, which may take one neuron twice and
            lose another; "random" is an ablation.
        weighted: neurons count by the importance of the expert they came from, not all alike.
        iterations: of k-means, at most.
        seed: of "random".

    Returns: what moved where. An expert that was given nothing is bit for bit what it was.

    Raises ValueError for numbers out of range, before anything changes. Warns if a kept expert has importance
    0: there was too little text to say which are needed.

    >>> from coterie.hf import find_moe_blocks
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    >>> for block in find_moe_blocks(model):
    ...     done = dern(block, torch.tensor([0.4, 0.1, 0.3, 0.2]), 2, threshold=-1)
    >>> done.kept, done.moved, block.num_experts
    ([0, 2], 1.0, 2)
    """
    _check(block, importance_E, keep, threshold, init)
    experts, weight_E = block.experts, importance_E.float() if weighted else torch.ones(block.num_experts)
    kept = kept_experts(importance_E, keep, groups=block.layout.groups)
    dropped = [e for e in range(block.num_experts) if e not in kept]
    homes = {e: nearest_neurons(experts, e, kept, parts) for e in dropped}
    given = {k: {e: _taken(home, r, threshold) for e, home in homes.items()} for r, k in enumerate(kept)}

    changed, made = [], []
    for r, k in enumerate(kept):
        sources = {e: taken for e, taken in given[k].items() if len(taken)}
        if sources:
            changed.append(r)
            made.append(_recombined(experts, k, sources, weight_E, init, iterations, seed + k))
    block.keep(kept)
    if made:
        block.replace(changed, _joined(made))

    transfer_RE = torch.zeros(keep, len(importance_E))
    for r, k in enumerate(kept):
        transfer_RE[r, k] = 1
        for e, taken in given[k].items():
            transfer_RE[r, e] = len(taken) / experts.up.shape[1]
    cosines = [cosine_F for _, cosine_F in homes.values()]
    return Recombined(kept, transfer_RE, torch.cat(cosines).mean().item() if cosines else 1.0)


def nearest_neurons(
    experts: ExpertTensors, expert: int, others: Sequence[int], parts: Sequence[Part] = ("up", "down")
) -> tuple[Tensor, Tensor]:
    """For each neuron of one expert, where the most similar one among other experts is.

    Args:
        experts: a bank.
        expert: whose neurons look around.
        others: ids of the experts they look at.
        parts: which weights are compared.

    Returns: the place in `others` of the expert that has it, [F] int64, and the cosine with it, [F].
    """
    unit_FW = F.normalize(to_segments(experts[[expert]], parts)[0], dim=1)
    cosines = []
    for other in others:  # one pair of experts in memory at a time
        theirs_WF = F.normalize(to_segments(experts[[other]], parts)[0], dim=1).T
        chunks = torch.split(unit_FW, _CHUNK)
        cosines.append(torch.cat([(chunk @ theirs_WF).amax(dim=1) for chunk in chunks]))
    best = torch.stack(cosines).max(dim=0)
    return best.indices, best.values


def _check(block: MoEBlock, importance_E: Tensor, keep: int, threshold: float, init: str) -> None:
    check_keep([block], keep)
    if importance_E.shape != (block.num_experts,) or not bool((importance_E >= 0).all()):
        raise ValueError(
            f"{block.name}: importance should be {block.num_experts} numbers ≥ 0, one per expert; "
            f"found {importance_E.tolist()}"
        )
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}; it is a cosine, use -1 ≤ threshold ≤ 1")
    if init not in ("own", "gate", "random"):
        raise ValueError(f"no init {init!r}; use own, gate or random")
    unused = int((importance_E == 0).sum())
    if unused > block.num_experts - keep:
        warnings.warn(
            f"{block.name}: {unused} of {block.num_experts} experts have importance 0, more than are "
            "dropped; calibrate on more text",
            stacklevel=3,
        )


def _taken(home: tuple[Tensor, Tensor], place: int, threshold: float) -> Tensor:
    """Which neurons of a dropped expert the kept expert at `place` takes, as numbers."""
    owner_F, cosine_F = home
    return ((owner_F == place) & (cosine_F > threshold)).nonzero().flatten()


def _recombined(
    experts: ExpertTensors,
    kept: int,
    sources: dict[int, Tensor],
    weight_E: Tensor,
    init: Init,
    iterations: int,
    seed: int,
) -> ExpertTensors:
    """One kept expert with the neurons of `sources`, as wide as it was."""
    own = experts[[kept]]
    hidden = own.up.shape[1]
    pieces = [to_segments(own)[0]]
    pieces += [to_segments(experts[[e]])[0, taken] for e, taken in sources.items()]
    pool_NW = torch.cat(pieces)
    members = [kept, *sources]
    counts = torch.tensor([len(piece) for piece in pieces])
    weight_N = weight_E[members].repeat_interleave(counts).to(pool_NW.device)
    first_C = _first_centres(pool_NW, own, init, seed)
    made_CW, _ = spherical_kmeans(pool_NW, weight_N, first_C, iterations=iterations)
    new = from_segments(made_CW.view(1, hidden, -1), own)
    if experts.down_bias is None:
        return new
    # what an expert adds whatever its neurons do: by how much of it each source brought
    share_M = weight_E[members] * counts
    if float(share_M.sum()) > 0:
        bias_D = (share_M / share_M.sum()).to(pool_NW.device) @ experts.down_bias[members].float()
        new = replace(new, down_bias=bias_D.unsqueeze(0).to(own.down.dtype))
    return new


def _first_centres(pool_NW: Tensor, own: ExpertTensors, init: Init, seed: int) -> Tensor:
    hidden, width = own.up.shape[1:]
    if init == "own":  # which come first in the pool
        return torch.arange(hidden, device=pool_NW.device)
    if init == "gate":  # the first part of a segment, or up where there is no gate
        return pool_NW[:, :width].abs().amax(dim=1).topk(hidden).indices
    order_N = torch.randperm(len(pool_NW), generator=torch.Generator().manual_seed(seed))
    return order_N[:hidden].to(pool_NW.device)


def _joined(experts: Sequence[ExpertTensors]) -> ExpertTensors:
    names = [name for name, tensor in vars(experts[0]).items() if tensor is not None]
    return ExpertTensors(**{name: torch.cat([getattr(e, name) for e in experts]) for name in names})
