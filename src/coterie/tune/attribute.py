"""Which expert knows a topic: the one that the topic's tokens are weighed to most."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from coterie.hf import MoEBlock, find_moe_blocks, route
from coterie.tune.batch import Batch
from coterie.tune.kept import Kept, digest, digest_text

_NAME = "affinity"

NEAR = 0.1  # ranks closer than this share of the first may change places on other text


class Target(NamedTuple):
    """An expert of a model: the number of its MoE block, in order of depth, and its own."""

    layer: int
    expert: int


@dataclass(frozen=True, eq=False)
class Affinity:
    """How much of a text's gate mass each expert got.

    Args:
        scores_LE: [L, E] float64 mean combine weight, first over a sequence's tokens, then over sequences.
            Where a block has fewer experts than another, what it lacks has 0.
        names: of the L blocks.

    >>> found = Affinity(torch.tensor([[0.5, 0.1], [0.2, 0.3]]), ["a", "b"])
    >>> found.ranked()[:2], round(found.margin(), 2)
    ([Target(layer=0, expert=0), Target(layer=1, expert=1)], 0.4)
    """

    scores_LE: Tensor
    names: Sequence[str]

    def ranked(self, within_layer: int | None = None) -> list[Target]:
        """All experts, or those of one block, the one with the most affinity first."""
        order = self.scores_LE.flatten().argsort(descending=True, stable=True).tolist()
        width = self.scores_LE.shape[1]
        targets = [Target(i // width, i % width) for i in order]
        return [t for t in targets if within_layer in (None, t.layer)]

    def __getitem__(self, target: Target) -> float:
        return float(self.scores_LE[target.layer, target.expert])

    def margin(self, m: int = 1, within_layer: int | None = None) -> float:
        """By how much rank m is before rank m + 1, as a share of rank m; 1 if nothing follows."""
        ranked = self.ranked(within_layer)[m - 1 : m + 1]
        return 1 - self[ranked[1]] / self[ranked[0]] if len(ranked) == 2 and self[ranked[0]] else 1.0

    def top(self, m: int = 1, within_layer: int | None = None) -> list[Target]:
        """The m experts with the most affinity.

        Args:
            m: how many.
            within_layer: number of the block to choose from; None for all together.

        Warns when the next expert has nearly as much: another text might choose that one.

        Raises ValueError if there are not so many experts, or the block does not exist.
        """
        ranked = self.ranked(within_layer)
        if not 1 <= m <= len(ranked):
            raise ValueError(f"{m} experts were asked for, of {len(ranked)}; use 1 ≤ experts ≤ {len(ranked)}")
        if self.margin(m, within_layer) < NEAR:
            last, following = ranked[m - 1], ranked[m]
            warnings.warn(
                f"expert {following.expert} of {self.names[following.layer]} has an affinity of "
                f"{self[following]:.3f}, nearly as much as expert {last.expert} of {self.names[last.layer]} "
                f"with {self[last]:.3f}: the choice between them is uncertain",
                stacklevel=2,
            )
        return ranked[:m]


@torch.no_grad()
def attribute_experts(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    blocks: Sequence[MoEBlock] | None = None,
    *,
    keep: Kept | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Affinity:
    """Runs a model on a topic's text and measures the affinity of every routed expert.

    Affinity of expert e is (1/Z) Σ_j (1/L_j) Σ_t g_e(t) over Z sequences of L_j tokens, g being the combine
    weight that the block applies, 0 where the expert is not chosen. Padding does not count, and neither do
    shared experts, to which every token goes.

    Args:
        model: in evaluation mode, with its original weights.
        batches: the topic's text; some 100 000 tokens are enough for a large model.
        blocks: of the model; None finds them.
        keep: keeps what each batch gave, so that an interrupted run goes on after it; None keeps nothing.
        on_batch: called after each batch.

    Raises ValueError if there is no text or no MoE block, a sequence is all padding, or something was kept of
    another text or model.

    Source: UOE (2024, arXiv 2411.18797), expert attribution. The weights are those applied: renormalised
    where the model does so.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)).eval()
    >>> affinity = attribute_experts(model, [Batch(torch.arange(20).view(2, 10))])
    >>> affinity.scores_LE.shape, affinity.scores_LE.sum(1).round(decimals=4).tolist()
    (torch.Size([2, 4]), [1.0, 1.0])
    """
    blocks = find_moe_blocks(model) if blocks is None else blocks
    if not batches:
        raise ValueError("no text was given; the experts of a topic are found by running the model on some")
    sums: list[Tensor] = [torch.zeros(block.num_experts, dtype=torch.float64) for block in blocks]
    done = sequences = 0
    run = {} if keep is None else {"the text": digest_text(batches), "the routers": _routers(blocks)}
    found = None if keep is None else keep.read(_NAME, run)
    if found is not None:
        tensors, (done, sequences) = found
        sums = [tensors[str(i)] for i in range(len(blocks))]
    for number, batch in enumerate(batches, 1):
        if number <= done:
            on_batch()
            continue
        batch = batch.to(model.device)
        present_BS = batch.present_BS if batch.present_BS is not None else torch.ones_like(batch.ids_BS)
        lengths_B = present_BS.sum(1)
        if not bool(lengths_B.all()):
            raise ValueError("a sequence is all padding; leave it out")
        _, routings = route(model, blocks, **batch.inputs())
        for sum_E, routing in zip(sums, routings, strict=True):
            gates_BE = routing.weights_TE.double().view(*batch.ids_BS.shape, -1).sum(1)
            sum_E += (gates_BE / lengths_B.unsqueeze(1)).sum(0).cpu()
        sequences += len(lengths_B)
        if keep is not None:
            keep.write(_NAME, run, {str(i): sum_E for i, sum_E in enumerate(sums)}, [number, sequences])
        on_batch()
    return Affinity(pad_sequence(sums, batch_first=True) / sequences, [block.name for block in blocks])


def _routers(blocks: Sequence[MoEBlock]) -> str:
    rows = [(b.name, vars(b.router)) for b in blocks]
    return digest({f"{name} {role}": t for name, roles in rows for role, t in roles.items() if t is not None})
