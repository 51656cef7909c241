"""Experts that come and go: rows of banks and scorers are appended, kept, and held still while others learn.

A bank or a scorer is grown as one: any module with `num_experts` E whose own parameters have E rows, such as
`LinearScore`, `LinearExperts`, `MLPExperts`, `SwiGLUExperts`. An optimiser that is given follows: it goes on
with the moments of the rows that stay, and new rows start with none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def append_experts(module: nn.Module, rows: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
    """Adds experts at the end of a bank or a scorer.

    Args:
        module: with `num_experts` E.
        rows: name of each parameter with E rows → [n, ...], its rows for the n new experts.
        optimizer: the one that trains them, if any.

    Raises ValueError where rows are missing, unknown, or of another shape.

    >>> from coterie.nn import LinearScore
    >>> score = LinearScore(4, 2, bias=True)
    >>> append_experts(score, {"weight": torch.zeros(1, 4), "bias": torch.tensor([-2.0])})
    >>> score.num_experts, score(torch.zeros(1, 4)).tolist()
    (3, [[0.0, 0.0, -2.0]])
    """
    parameters = _expert_parameters(module)
    if set(rows) != set(parameters):
        raise ValueError(f"rows are for {sorted(rows)}; should be for {sorted(parameters)}")
    for name, parameter in parameters.items():
        if rows[name].shape[1:] != parameter.shape[1:]:
            found, wanted = tuple(rows[name].shape), ", ".join(["n", *map(str, parameter.shape[1:])])
            raise ValueError(f"rows of {name} have shape {found}; should be [{wanted}]")
    counts = {len(new) for new in rows.values()}
    if len(counts) != 1:
        raise ValueError(f"rows are for {sorted(counts)} experts; should be as many for every parameter")
    for name, parameter in parameters.items():
        new = rows[name].to(parameter)
        _replace(module, name, partial(_append, new), partial(_append, torch.zeros_like(new)), optimizer)
    module.num_experts += counts.pop()  # type: ignore[operator, assignment]


def keep_experts(module: nn.Module, kept: Sequence[int], optimizer: Optimizer | None = None) -> None:
    """Removes all other experts of a bank or a scorer, and puts these in the order given.

    Args:
        module: with `num_experts` E.
        kept: distinct experts, at least one.
        optimizer: the one that trains them, if any.

    Raises ValueError for none, a repeated or an unknown expert.

    >>> from coterie.nn import LinearScore
    >>> score = LinearScore(4, 3)
    >>> last = score.weight[2].tolist()
    >>> keep_experts(score, [2, 0])
    >>> score.num_experts, score.weight[0].tolist() == last
    (2, True)
    """
    check_experts(module, kept)
    for name in _expert_parameters(module):
        select = partial(_select, [*kept])
        _replace(module, name, select, select, optimizer)
    module.num_experts = len(kept)  # type: ignore[assignment]


@contextmanager
def hold_experts(module: nn.Module, held: Sequence[int], optimizer: Optimizer) -> Iterator[None]:
    """Within the block, steps of the optimiser leave these experts bit for bit as they are.

    Also where momentum or weight decay would move a row that has no gradient.

    Args:
        module: with `num_experts` E.
        held: experts; none for nothing held.
        optimizer: the one whose steps are undone for them.

    Raises ValueError for a repeated or an unknown expert.
    """
    if not held:
        yield
        return
    check_experts(module, held)
    before = [(p, p.detach()[[*held]].clone()) for p in _expert_parameters(module).values()]

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for parameter, rows in before:
                parameter[[*held]] = rows

    handle = optimizer.register_step_post_hook(restore)
    try:
        yield
    finally:
        handle.remove()


def bias_for_share(others_TE: Tensor, logits_T: Tensor, share: float) -> float:
    """The bias with which one more expert gets a given mean share of a softmax gate.

    Args:
        others_TE: logits of the experts that are there.
        logits_T: logits of the new one without its bias.
        share: 0 < share < 1.

    Raises ValueError for a share outside that.

    >>> round(bias_for_share(torch.zeros(5, 3), torch.zeros(5), 0.25), 4)
    0.0
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}; should lie in 0 < share < 1")
    rest_T = others_TE.double().logsumexp(1) - logits_T.double()
    low, high = float(rest_T.min()) - 50, float(rest_T.max()) + 50
    for _ in range(100):  # the mean share rises with the bias
        middle = (low + high) / 2
        too_much = float(torch.sigmoid(middle - rest_T).mean()) > share
        low, high = (low, middle) if too_much else (middle, high)
    return (low + high) / 2


def check_experts(module: nn.Module, experts: Sequence[int]) -> None:
    """ValueError unless they are distinct experts of the module, and at least one."""
    last = int(module.num_experts) - 1  # type: ignore[arg-type]
    if not experts or len(set(experts)) != len(experts) or min(experts) < 0 or max(experts) > last:
        raise ValueError(f"experts {[*experts]}; should be distinct ones of 0 … {last}, at least one")


def _expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    found = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() and len(parameter) == module.num_experts
    }
    if not found:
        raise ValueError(f"{type(module).__name__} has no parameter with a row per expert")
    return found


def _replace(
    module: nn.Module,
    name: str,
    change: Callable[[Tensor], Tensor],
    change_moments: Callable[[Tensor], Tensor],
    optimizer: Optimizer | None,
) -> None:
    old = getattr(module, name)
    new = nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: change_moments(value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


def _append(new: Tensor, old: Tensor) -> Tensor:
    return torch.cat([old, new.to(old)])


def _select(kept: list[int], old: Tensor) -> Tensor:
    return old[kept]
