"""Edits of an MoE block's experts, as functions of its tensors.

`stored` are the tensors of one block as they are stored, by role: those of `BlockLayout.experts` and
`BlockLayout.router`. Every function returns new tensors by role; nothing is written anywhere. Router rows
after the first E (a skip expert, shared experts) stay last.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coterie.hf.layout import BlockLayout

Stored = Mapping[str, Tensor]


def take(layout: BlockLayout, stored: Stored, ids: Sequence[int]) -> dict[str, Tensor]:
    """The experts `ids`, in that order.

    Raises ValueError if `check_sources` does, or a hash table sends tokens to an expert that is left out.
    """
    check_sources(layout, [[i] for i in ids])
    edited = {}
    for role, tensor in stored.items():
        if role == "hash_table":
            edited[role] = _renumber(layout, tensor, [[i] for i in ids])
        else:
            rows = [*ids, *range(layout.num_experts, tensor.shape[_axis(role)])]
            edited[role] = tensor.index_select(_axis(role), torch.tensor(rows, device=tensor.device))
    return edited


def merge(
    layout: BlockLayout, stored: Stored, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
) -> dict[str, Tensor]:
    """One expert for each group: the weighted mean of its members' tensors, router entries included.

    Args:
        layout: of the block.
        stored: its tensors by role.
        groups: ids of the members; an expert in no group is dropped, one in two counts in both.
        weights: one for each member, in any scale; each group's are divided by their sum.

    Means are taken in float32 and returned in the dtype of `stored`.
    """
    check_sources(layout, groups)
    if [len(g) for g in groups] != [len(w) for w in weights]:
        raise ValueError("merge needs one weight for each member of each group")
    for row, shares in enumerate(weights):
        if sum(shares) == 0:
            raise ValueError(f"the weights of group {row} add up to 0")
    edited = {}
    for role, tensor in stored.items():
        if role == "hash_table":
            edited[role] = _renumber(layout, tensor, groups)
            continue
        body, tail = _body_and_tail(layout, role, tensor)
        axis, means = _axis(role), []
        for members, shares in zip(groups, weights, strict=True):  # one by one: a bank in float32 is large
            parts = [body.select(axis, i).float() * w for i, w in zip(members, shares, strict=True)]
            means.append((torch.stack(parts).sum(0) / sum(shares)).to(tensor.dtype))
        edited[role] = torch.cat((torch.stack(means, axis), tail), axis)
    return edited


def append(layout: BlockLayout, stored: Stored, new: Stored) -> dict[str, Tensor]:
    """The experts of `stored`, then those of `new`, which has the same roles without a tail.

    Raises ValueError if the router chooses among groups of experts, which new ones would shift.
    """
    if layout.groups > 1:
        raise ValueError(
            f"{layout.name} routes among {layout.groups} groups of experts, which new ones would shift; "
            "lift the limit first: set_groups(1, 1)"
        )
    _check_count(new, new["down"].shape[0])
    edited = {}
    for role, tensor in stored.items():
        if role == "hash_table":  # nothing is sent to the new experts
            edited[role] = tensor
            continue
        body, tail = _body_and_tail(layout, role, tensor)
        edited[role] = torch.cat((body, _fit(role, new[role], tensor), tail), _axis(role))
    return edited


def replace(layout: BlockLayout, stored: Stored, ids: Sequence[int], new: Stored) -> dict[str, Tensor]:
    """The experts of `stored` with those of `new` in the places `ids`; roles that `new` lacks stay."""
    check_ids(layout, ids)
    _check_count(new, len(ids))
    edited = dict(stored)
    for role, tensor in new.items():
        axis = _axis(role)
        index = torch.tensor(list(ids), device=stored[role].device)
        edited[role] = stored[role].index_copy(axis, index, _fit(role, tensor, stored[role]))
    return edited


def empty(layout: BlockLayout, stored: Stored, num_experts: int) -> dict[str, Tensor]:
    """Tensors for another number of experts, without values; a hash table stays as it is."""
    edited = dict(stored)
    for role, tensor in stored.items():
        if role != "hash_table":
            shape = list(tensor.shape)
            shape[_axis(role)] += num_experts - layout.num_experts
            edited[role] = tensor.new_empty(shape)
    return edited


def check_sources(layout: BlockLayout, sources: Sequence[Sequence[int]]) -> None:
    """Whether a block can have one expert for each entry of `sources`, made of the old experts in it.

    Raises ValueError if there are fewer than top_k, an id does not exist, an old expert is taken twice by
    single entries, or the routing groups, which the router tells by number alone, would not survive.
    """
    kept = len(sources)
    for members in sources:
        check_ids(layout, members)
        if not members:
            raise ValueError("a new expert must be made of at least one old expert")
    if kept < layout.top_k:
        raise ValueError(
            f"{layout.name} sends each token to top_k={layout.top_k} experts, so {kept} are too few; "
            f"keep at least {layout.top_k} or lower top_k first"
        )
    singles = [members[0] for members in sources if len(members) == 1]
    if len(set(singles)) < len(singles):
        raise ValueError(f"{layout.name}: an expert is named twice; use append to copy one")
    check_groups(layout, kept)
    if layout.groups == 1:
        return
    size, old = kept // layout.groups, layout.num_experts // layout.groups
    for group in range(layout.groups):
        origins = {i // old for members in sources[group * size : (group + 1) * size] for i in members}
        if len(origins) > 1:
            raise ValueError(
                f"{layout.name} routes among {layout.groups} groups of {old} experts; this edit would mix "
                f"groups {sorted(origins)}. Take equally many from each, group by group, "
                "or lift the limit first: set_groups(1, 1)"
            )


def check_groups(layout: BlockLayout, num_experts: int) -> None:
    """Raises ValueError if `num_experts` experts cannot be divided into the block's routing groups."""
    groups, top_groups, k = layout.groups, layout.top_groups, layout.top_k
    if num_experts % groups:
        raise ValueError(
            f"{layout.name} routes among {groups} groups, into which {num_experts} experts cannot be divided "
            f"evenly; use a multiple of {groups} or lift the limit first: set_groups(1, 1)"
        )
    size = num_experts // groups
    if size < layout.group_min or top_groups * size < k:
        raise ValueError(
            f"{layout.name} takes top_k={k} experts from {top_groups} of {groups} groups, and scores a group "
            f"by its {layout.group_min} best; {size} experts in a group are too few"
        )


def check_ids(layout: BlockLayout, ids: Sequence[int]) -> None:
    """Raises ValueError if an id is not one of the block's experts."""
    wrong = [i for i in ids if not 0 <= i < layout.num_experts]
    if wrong:
        raise ValueError(f"{layout.name} has experts 0 … {layout.num_experts - 1}, not {wrong[0]}")


def _axis(role: str) -> int:
    return -1 if role == "selection_bias" else 0  # stored [1, E] by some


def _body_and_tail(layout: BlockLayout, role: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    axis, e = _axis(role), layout.num_experts
    return tensor.narrow(axis, 0, e), tensor.narrow(axis, e, tensor.shape[axis] - e)


def _check_count(new: Stored, wanted: int) -> None:
    for role, tensor in new.items():
        if tensor.shape[_axis(role)] != wanted:
            raise ValueError(f"{role}: expected entries of {wanted} experts, got {tensor.shape[_axis(role)]}")


def _fit(role: str, new: Tensor, stored: Tensor) -> Tensor:
    if role == "selection_bias":
        new = new.reshape(*stored.shape[:-1], -1)
    elif new.shape[1:] != stored.shape[1:]:
        raise ValueError(
            f"{role}: the block's experts have {list(stored.shape[1:])}, new ones {list(new.shape[1:])}"
        )
    return new.to(stored)


def _renumber(layout: BlockLayout, table_VK: Tensor, sources: Sequence[Sequence[int]]) -> Tensor:
    number = torch.full((layout.num_experts,), -1, dtype=table_VK.dtype)
    for new, members in enumerate(sources):
        number[list(members)] = new
    edited_VK = number.to(table_VK.device)[table_VK]
    lost = int((edited_VK < 0).any(1).sum())
    if lost:
        raise ValueError(
            f"{layout.name} chooses experts by a hash of the token: {lost} tokens of its vocabulary are sent "
            "to experts that would be dropped; merge those into kept ones instead"
        )
    return edited_VK
