"""Merging experts: groups around the busiest, their neurons aligned, then averaged.

Letters: E experts, F their hidden width, D the width they read, T tokens.
"""

from torch import Tensor
from torch.nn import functional as F

from coterie.hf import BlockRecord, MoEBlock
from coterie.shrink.importance import frequency, kept_experts
from coterie.shrink.prune import check_keep
from coterie.shrink.segments import align, reordered


def m_smoe(block: MoEBlock, record: BlockRecord, groups: int) -> list[list[int]]:
    """Merges a block's experts into `groups`, in place.

    Each group is an expert that is used often and those that tokens want in its place. Neurons are brought
    into the order of the group's first expert, then weights and router rows are averaged by how often the
    experts are used. Where the router chooses among groups of experts, only those of one group are merged.

    Args:
        block: with a linear router that reads what the experts read.
        record: what the block did, with its inputs.
        groups: how many experts are left, top_k ≤ groups ≤ E.

    Returns: the groups, as old ids, the dominant expert first.

    Raises ValueError if the record has no inputs, or the router reads something else.

    Source: Li et al. 2024 (M-SMoE, arXiv 2310.01334), section 3. There the router keeps a row for each old
    expert; here a group has one row, so that the checkpoint stays one of its family.
    """
    check_keep([block], groups)
    used_E = frequency(record).clamp(min=1)
    similarity_EE = router_similarity(block, record.inputs)
    members = around_dominant(similarity_EE, used_E, groups, routing_groups=block.layout.groups)
    experts = block.experts
    for first, *others in members:
        for other in others:
            order_F = align(experts, first, other)
            block.replace([other], reordered(experts[[other]], order_F))
    block.merge(members, [used_E[ids].tolist() for ids in members])
    return members


def router_similarity(block: MoEBlock, inputs_TD: Tensor) -> Tensor:
    """[E, E] float32 cosine of the router's logits of two experts over tokens.

    Raises ValueError if there are no inputs, or the router reads something else.
    """
    rows_ED = block.router.rows.float()
    if not len(inputs_TD):
        raise ValueError(f"{block.name}: no inputs were recorded; use recording(blocks, keep_inputs=1024)")
    if rows_ED.shape[1] != inputs_TD.shape[1]:
        raise ValueError(
            f"{block.name}: the router's last layer reads {rows_ED.shape[1]} numbers and the block "
            f"{inputs_TD.shape[1]}; similar experts can be found for linear routers only"
        )
    logits_TE = inputs_TD.float().to(rows_ED.device) @ rows_ED.T
    if block.router.bias is not None:
        logits_TE = logits_TE + block.router.bias.float()
    unit_TE = F.normalize(logits_TE, dim=0)
    return unit_TE.T @ unit_TE


def around_dominant(
    similarity_EE: Tensor, used_E: Tensor, groups: int, *, routing_groups: int = 1
) -> list[list[int]]:
    """The `groups` most used experts, each followed by the others that are most similar to it.

    With `routing_groups`, into which the experts are divided in order, each is treated as if it were alone.

    >>> import torch
    >>> similarity = torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.1], [0.9, 0.1, 1.0]])
    >>> around_dominant(similarity, torch.tensor([5, 3, 1]), 2)
    [[0, 2], [1]]
    """
    size = len(used_E) // routing_groups
    members: list[list[int]] = []
    dominant = kept_experts(used_E, groups, groups=routing_groups)
    for first in range(0, len(used_E), size):
        inside = range(first, first + size)
        own = {d: [d] for d in dominant if d in inside}
        for expert in inside:
            if expert not in own:
                nearest = int(similarity_EE[expert, list(own)].argmax())
                own[list(own)[nearest]].append(expert)
        members += own.values()
    return members
