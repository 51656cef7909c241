"""Fewer experts per token than the router proposes: masks of its top-k, learned, by rule or by chance.

with top_any(banks, masks, renormalize=True) as kept:
    model(ids)

Letters: T tokens, K slots per token, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.data import written_whole
from coterie.hf.top_any import Mask as Mask
from coterie.hf.top_any import PrefixMask as PrefixMask
from coterie.hf.top_any import mask_slots, skip_masked_slots

SAVE_EVERY = 10  # steps of training


def weight_ratio(threshold: float) -> Mask:
    """The rule of MC: a slot stays if its weight is at least `threshold` times the token's largest.

    Source: Huang et al. 2024 (MC), section 3.3, there for the second of two experts; `protected` adds its
    protection of tokens that get much attention.

    >>> weight_ratio(0.5)(torch.empty(1, 8), torch.tensor([[0.5, 0.3, 0.2]])).tolist()
    [[1.0, 1.0, 0.0]]
    """
    return lambda x_TD, weights_TK: (weights_TK >= threshold * weights_TK[:, :1]).to(weights_TK)


def ratio_threshold(weights_TK: Tensor, keep: float | None = None) -> float:
    """The threshold of `weight_ratio` from what a router gave on calibration text.

    Args:
        weights_TK: combine weights, K ≥ 2, in any order.
        keep: share of all slots that should stay, 1/K to 1; None takes the median ratio, as MC does for
            K = 2, which drops half of the slots but the first.

    >>> ratio_threshold(torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.6, 0.3]]))
    0.5
    """
    falling_TK = weights_TK.sort(1, descending=True).values.double()
    slots = falling_TK.shape[1]
    ratios = falling_TK[:, 1:] / falling_TK[:, :1]
    share = 0.5 if keep is None else (keep * slots - 1) / (slots - 1)
    if not 0 <= share <= 1:
        raise ValueError(f"keep={keep} of {slots} slots; a token keeps at least one: {1 / slots:g} … 1")
    return float(ratios.flatten().quantile(1 - share, interpolation="lower"))


def random_mask(keep: float, generator: torch.Generator, *, keep_first: bool) -> Mask:
    """Each slot stays by chance, so that the share `keep` of all does; the first always if `keep_first`."""

    def mask(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        slots = weights_TK.shape[1]
        chance = (keep * slots - 1) / (slots - 1) if keep_first else keep
        kept_TK = torch.rand(weights_TK.shape, generator=generator) < chance
        if keep_first:
            kept_TK[:, 0] = True
        return kept_TK.to(weights_TK)

    return mask


@dataclass
class Kept:
    """Slots that one bank was asked for, and those among them that ran."""

    slots: int = 0
    kept: int = 0

    @property
    def ratio(self) -> float:
        """kept / slots, NaN before any pass."""
        return self.kept / self.slots if self.slots else math.nan


@contextmanager
def top_any(banks: Sequence[nn.Module], masks: Sequence[Mask], *, renormalize: bool) -> Iterator[list[Kept]]:
    """Masks the slots of each bank while the context is open.

    A slot that is masked gets weight 0 and, where no gradient is asked for, no expert; but with
    experts_implementation="eager" its expert runs in vain. `coterie.hf.place_masks` is for good.

    Args:
        banks: modules behind transformers' experts interface: `block.bank`, or what `pack_block` returned.
        masks: one for each.
        renormalize: give the weights that stay the sum that all had. As the host's router does
            (`norm_topk_prob`): where it does not, that would change the scale of the output.

    Yields: one count per bank, which grows with each pass.
    """
    counts = [Kept() for _ in banks]
    with ExitStack() as hooks:
        for bank, mask, count in zip(banks, masks, counts, strict=True):
            hook = bank.register_forward_pre_hook(_masking(mask, count, renormalize), with_kwargs=True)
            hooks.callback(hook.remove)
            hooks.callback(skip_masked_slots, bank, skip_masked_slots(bank, True))
        yield counts


def train_top_any(
    model: PreTrainedModel,
    banks: Sequence[nn.Module],
    masks: Sequence[PrefixMask],
    teacher: PreTrainedModel,
    batches_BS: Sequence[Tensor],
    *,
    renormalize: bool,
    sparsity: float = 0.05,
    lr: float = 5e-3,
    temperatures: tuple[float, float] = (4.0, 0.1),
    on_step: Callable[[int, float, float], None] = lambda steps, divergence, ratio: None,
    state: Path | None = None,
) -> None:
    """Trains masks, and nothing else: KL(teacher ‖ model) + sparsity · mean share of slots that stay.

    The noise of the Gumbel-softmax is drawn from torch's global generators.

    Args:
        model: with the banks in it; its parameters are frozen, and left so.
        banks: see `top_any`.
        masks: one for each bank; changed in place, and left without temperature.
        teacher: the model as it was, unpruned and in 16 or 32 bits; may be `model`.
        batches_BS: token ids [B, S] each, one step of AdamW per batch.
        renormalize: see `top_any`.
        sparsity: λ. Without it everything stays; where it is large, only the first expert does.
        lr: learning rate.
        temperatures: of the Gumbel-softmax, first and last; it falls geometrically.
        on_step: called after each step with the number of steps done, the divergence, nats per token, and the
            share of slots kept.
        state: keeps what training came to in this file, every SAVE_EVERY steps, and goes on from it where it
            exists: with the same arguments, to the same masks. None keeps nothing.

    Raises ValueError when a loss is not finite.

    Source: MC# (2025), online top-any pruning; the temperatures are our reading.
    """
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for mask in masks for p in mask.parameters()], lr=lr)
    first, last = temperatures
    shares: list[Tensor] = []

    def remembering(mask: PrefixMask) -> Mask:
        def remembered(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
            mask_TK: Tensor = mask(x_TD, weights_TK)
            shares.append(mask_TK.mean())
            return mask_TK

        return remembered

    begin = 0 if state is None else _resumed(state, masks, optimizer, model.device)
    for step, ids_BS in enumerate(batches_BS[begin:], begin):
        ids_BS = ids_BS.to(model.device)
        for mask in masks:
            mask.temperature = first * (last / first) ** (step / max(len(batches_BS) - 1, 1))
        with torch.no_grad():
            target_BSV = teacher(ids_BS).logits.float().log_softmax(-1)
        shares.clear()
        with top_any(banks, [remembering(mask) for mask in masks], renormalize=renormalize):
            given_BSV = model(ids_BS).logits.float().log_softmax(-1)
        divergence = F.kl_div(
            given_BSV.flatten(0, 1), target_BSV.flatten(0, 1), reduction="batchmean", log_target=True
        )
        ratio = torch.stack(shares).mean()
        loss = divergence + sparsity * ratio
        if not bool(loss.isfinite()):
            raise ValueError(f"the loss is {loss.item()} at step {step}; use a smaller lr than {lr:g}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done = step + 1
        if state is not None and (done % SAVE_EVERY == 0 or done == len(batches_BS)):
            _keep(state, done, masks, optimizer, model.device)
        on_step(done, divergence.item(), ratio.item())
    for mask in masks:
        mask.temperature = None


def _keep(
    file: Path,
    steps: int,
    masks: Sequence[PrefixMask],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    content = {
        "steps": steps,
        "masks": [mask.state_dict() for mask in masks],
        "optimizer": optimizer.state_dict(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    with written_whole(file) as draft:
        torch.save(content, draft)


def _resumed(
    file: Path, masks: Sequence[PrefixMask], optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Puts what `_keep` kept into its places; returns how many steps that was after."""
    if not file.exists():
        return 0
    content = torch.load(file, map_location="cpu", weights_only=True)
    for mask, state in zip(masks, content["masks"], strict=True):
        mask.load_state_dict(state)
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["cpu"])
    if content["cuda"] is not None:
        torch.cuda.set_rng_state(content["cuda"], device)
    return int(content["steps"])


def _masking(mask: Mask, count: Kept, renormalize: bool) -> Any:
    def hook(bank: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        args, kwargs, mask_TK = mask_slots(bank, args, kwargs, mask, renormalize=renormalize)
        count.slots += mask_TK.numel()
        count.kept += int(mask_TK.detach().sum())
        return args, kwargs

    return hook
