"""Streaming statistics of routings, cheap enough to stay on: a few [T, E] operations per layer and step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.nn.balance import entropy, token_entropy
from coterie.nn.routing import Routing


@dataclass
class _Layer:
    load_E: Tensor
    dropped_E: Tensor
    tokens: Tensor
    entropy: Tensor
    together_EE: Tensor


class Monitor:
    """Sums what routings say, layer by layer, without a synchronisation until a statistic is read.

    >>> monitor = Monitor()
    >>> monitor.update([Routing.dense(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))])
    >>> monitor.load.tolist(), monitor.imbalance.tolist(), round(monitor.entropy.item(), 3)
    ([[2, 2]], [1.0], 0.347)
    """

    def __init__(self) -> None:
        self._layers: list[_Layer] = []

    def reset(self) -> None:
        """Forgets everything."""
        self._layers = []

    @torch.no_grad()
    def update(self, routings: Routing | Sequence[Routing]) -> None:
        """Adds one routing per layer. ValueError when the number of layers or experts has changed."""
        layers = [routings] if isinstance(routings, Routing) else routings
        news = [_measure(routing) for routing in layers]
        if not self._layers:
            self._layers = news
            return
        if [len(n.load_E) for n in news] != [len(s.load_E) for s in self._layers]:
            raise ValueError(
                f"routings over {[len(n.load_E) for n in news]} experts; this monitor has seen layers of "
                f"{[len(s.load_E) for s in self._layers]}; reset() it or use another"
            )
        for seen, new in zip(self._layers, news, strict=True):
            for name in vars(seen):
                setattr(seen, name, getattr(seen, name) + getattr(new, name))

    @property
    def loads(self) -> list[Tensor]:
        """Per layer: int64 [E], tokens each expert received."""
        return [layer.load_E for layer in self._layers]

    @property
    def load(self) -> Tensor:
        """int64 [L, E], for layers of equal E."""
        return torch.stack(self.loads)

    @property
    def imbalance(self) -> Tensor:
        """[L]: load of the busiest expert over the mean load; 1 is balanced, E is collapse."""
        loads = [load_E.double() for load_E in self.loads]
        return torch.stack([load_E.max() / load_E.mean().clamp(min=1e-9) for load_E in loads])

    @property
    def entropy(self) -> Tensor:
        """[L]: mean entropy of a token's scores, in nats."""
        return torch.stack([layer.entropy / layer.tokens.clamp(min=1) for layer in self._layers])

    @property
    def drop_rate(self) -> Tensor:
        """[L]: share of chosen slots that were dropped over capacity."""
        rates = []
        for layer in self._layers:
            dropped = layer.dropped_E.sum().double()
            rates.append(dropped / (dropped + layer.load_E.sum()).clamp(min=1))
        return torch.stack(rates)

    @property
    def experts_per_token(self) -> Tensor:
        """[L]: mean number of experts a token used."""
        return torch.stack([s.load_E.sum() / s.tokens.clamp(min=1) for s in self._layers])

    @property
    def co_activation(self) -> list[Tensor]:
        """Per layer: int64 [E, E], tokens that used both experts; the diagonal is the load."""
        return [layer.together_EE.long() for layer in self._layers]

    def summary(self) -> dict[str, float]:
        """Worst imbalance and mean entropy, drop rate, experts per token over layers; {} if never updated."""
        if not self._layers:
            return {}
        return {
            "imbalance": self.imbalance.max().item(),
            "entropy": self.entropy.mean().item(),
            "drop_rate": self.drop_rate.mean().item(),
            "experts_per_token": self.experts_per_token.double().mean().item(),
        }


class StabilityTracker:
    """How much the routing of one fixed probe batch moves from checkpoint to checkpoint.

    Routes in evaluation mode and without gradients, else dropout and router noise would count as movement;
    the model comes back in the mode it was in.

    Args:
        route: from a model to its routings of the probe, such as `lambda model: model(ids)[1]`.

    Attributes:
        fluctuations: (step, `fluctuation` since the update before), one per update but the first.
        entropies: (step, mean entropy of a token's scores in nats), one per update.

    >>> from coterie.nn import LinearScore, Router, TopK
    >>> router, x = Router(LinearScore(8, 4), TopK(1)), torch.randn(100, 8)
    >>> tracker = StabilityTracker(lambda model: model(x))
    >>> tracker.update(router, step=1)
    >>> _ = router.score.weight.data.neg_()
    >>> tracker.update(router, step=2)
    >>> tracker.fluctuation(), tracker.flip_rate(router, lambda model: model(x + 1e-9))
    (1.0, 0.0)
    """

    def __init__(self, route: Callable[[nn.Module], Routing | Sequence[Routing]]) -> None:
        self.route = route
        self.fluctuations: list[tuple[int, float]] = []
        self.entropies: list[tuple[int, float]] = []
        self._before: list[Routing] = []

    def update(self, model: nn.Module, step: int) -> None:
        """Routes the probe through a checkpoint, the one after those of earlier updates."""
        routings = _evaluated(model, self.route)
        if self._before:
            self.fluctuations.append((step, fluctuation(self._before, routings)))
        self.entropies.append((step, float(entropy(routings))))
        self._before = routings

    def fluctuation(self, last: int | None = None) -> float:
        """Mean of the `last` fluctuations; of all for None. ValueError when there are fewer."""
        shares = [share for _, share in self.fluctuations]
        if not 1 <= (last or 1) <= len(shares):
            raise ValueError(
                f"{len(shares)} fluctuations so far, one per update but the first; asked for {last or 'any'}"
            )
        some = shares[-last:] if last else shares
        return math.fsum(some) / len(some)

    def flip_rate(
        self, model: nn.Module, perturbed: Callable[[nn.Module], Routing | Sequence[Routing]]
    ) -> float:
        """Share of the probe's tokens whose top expert differs under a perturbed input.

        Args:
            perturbed: like `route`, with the same tokens perturbed.
        """
        return fluctuation(_evaluated(model, self.route), _evaluated(model, perturbed))


def fluctuation(before: Routing | Sequence[Routing], after: Routing | Sequence[Routing]) -> float:
    """Share of tokens whose top expert differs between two routings of the same tokens; mean over layers.

    Compare the same probe batch at two checkpoints, or a clean and a perturbed input.

    Args:
        before: one Routing, or one per layer.
        after: the same, of the same tokens.

    Raises:
        ValueError: not of the same tokens, experts or number of layers.

    Source: Nguyen et al. 2025 (graph of tokens), routing fluctuation.

    >>> a, b = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    >>> fluctuation(Routing.dense(a), Routing.dense(b))
    0.5
    """
    return _mean_over_layers(_fluctuation, before, after)


@torch.no_grad()
def expert_overlap(before: Routing | Sequence[Routing], after: Routing | Sequence[Routing]) -> float:
    """Share of the experts that tokens used before and still use, mean over tokens and layers; 1 at best.

    Args:
        before: one Routing, or one per layer.
        after: the same, of the same tokens.

    Raises:
        ValueError: not of the same tokens, experts or number of layers.

    Source: UOE (2024, arXiv 2411.18797), expert overlap ratio.

    >>> a, b = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1, 0], [0, 2]])
    >>> ones, scores = torch.ones(2, 2), torch.ones(2, 3)
    >>> expert_overlap(Routing(a, ones, scores, scores, 3), Routing(b, ones, scores, scores, 3))
    0.75
    """
    return _mean_over_layers(_overlap, before, after)


def _overlap(before: Routing, after: Routing) -> float:
    stay_T = (before.used_TE & after.used_TE).sum(1) / before.slots_per_token.clamp(min=1)
    # padding, and whatever else used no expert, has none to keep
    return stay_T[before.slots_per_token > 0].double().mean().item()


def _mean_over_layers(
    compare: Callable[[Routing, Routing], float],
    before: Routing | Sequence[Routing],
    after: Routing | Sequence[Routing],
) -> float:
    befores = [before] if isinstance(before, Routing) else before
    afters = [after] if isinstance(after, Routing) else after
    if not befores or len(befores) != len(afters):
        raise ValueError(
            f"routings of {len(befores)} and of {len(afters)} layers; should be as many, at least 1"
        )
    for one, other in zip(befores, afters, strict=True):
        if one.experts.shape[0] != other.experts.shape[0] or one.num_experts != other.num_experts:
            raise ValueError(
                f"routings of {one.experts.shape[0]} tokens over {one.num_experts} experts and of "
                f"{other.experts.shape[0]} over {other.num_experts}; both must be of the same tokens and "
                "experts"
            )
    return math.fsum(map(compare, befores, afters)) / len(befores)


def _fluctuation(before: Routing, after: Routing) -> float:
    changed = _top_expert(before) != _top_expert(after)
    if before.mask is not None:
        changed = changed[before.mask]
    return changed.double().mean().item()


@torch.no_grad()
def _evaluated(model: nn.Module, route: Callable[[nn.Module], Routing | Sequence[Routing]]) -> list[Routing]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        routings = route(model)
    finally:
        for module, mode in training.items():
            module.training = mode
    return [routings] if isinstance(routings, Routing) else list(routings)


def _top_expert(routing: Routing) -> Tensor:
    best = routing.weights.masked_fill(~routing.used, -torch.inf).argmax(1, keepdim=True)
    return routing.experts.gather(1, best).squeeze(1)


def _measure(routing: Routing) -> _Layer:
    entropy_T = token_entropy(routing.detach())
    if routing.mask is not None:
        entropy_T = torch.where(routing.mask, entropy_T, 0)
    used_TE = routing.used_TE.float()
    return _Layer(
        load_E=routing.load,
        dropped_E=routing.dropped,
        tokens=routing.num_tokens,
        entropy=entropy_T.double().sum(),
        together_EE=(used_TE.t() @ used_TE).double(),
    )
