"""Balance: losses on routings, and the update that needs no loss.

Every loss takes one Routing or the list a model returns, and gives the mean over layers. Padding is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, distributed

from coterie.nn.routing import Routing

Routings = Routing | Sequence[Routing]


def load_balance(
    routings: Routings, *, expert_weights: Tensor | None = None, global_batch: bool = True
) -> Tensor:
    """Load-balance loss: E · Σ_e (share of slots at e) · (mean score of e). 1 when balanced, up to E.

    The share counts what the router chose, slots dropped over capacity included: the router must learn that
    it asks too much of an expert.

    Scores are normalised to sum to one per token first, which changes nothing for softmax gates and is what
    DeepSeek-V3 does for sigmoid ones. With K = 1 this is Switch's loss; for K > 1 transformers'
    `load_balancing_loss_func` is K times as large, since it counts slots per token instead of shares.

    Args:
        routings: one Routing, or one per layer.
        expert_weights: [E] factor ≥ 0 on each expert's term; None for 1. An expert with a smaller factor is
            penalised less for its load and ends up with more of it: MoE++ gives experts that cost nothing a
            factor τ < 1. With factors the balanced value is their mean.
        global_batch: count load over all processes of a distributed run, so that the loss and its gradient
            are those of the joined batch.

    Raises:
        ValueError: `expert_weights` is not over the routing's experts.

    Source: Fedus et al. 2021 (Switch), eq. 4–6; Lepikhin et al. 2020 (GShard), section 2.2; the factors: Jin
    et al. 2024 (MoE++), heterogeneous load-balance loss.

    >>> float(load_balance(Routing.dense(torch.full((6, 4), 0.25))))
    1.0
    """

    def loss(routing: Routing) -> Tensor:
        scores_TE = routing.scores / routing.scores.sum(-1, keepdim=True).clamp(min=1e-20)
        chosen_E = routing.load if routing.chosen_E is None else routing.chosen_E
        load_E, tokens, world = chosen_E.to(scores_TE), routing.num_tokens.to(scores_TE), 1
        if global_batch and distributed.is_available() and distributed.is_initialized():
            counts = torch.cat([load_E, tokens.view(1)])
            distributed.all_reduce(counts)
            load_E, tokens, world = counts[:-1], counts[-1], distributed.get_world_size()
        share_E = load_E / load_E.sum().clamp(min=1)
        # processes average their gradients: dividing by tokens / world makes that the joined batch's mean
        score_E = _masked(scores_TE, routing).sum(0) / (tokens / world).clamp(min=1)
        if expert_weights is not None:
            if expert_weights.shape != (routing.num_experts,):
                raise ValueError(
                    f"expert_weights has shape {tuple(expert_weights.shape)}; "
                    f"give one factor for each of {routing.num_experts} experts"
                )
            share_E = share_E * expert_weights.to(share_E)
        return routing.num_experts * (share_E * score_E).sum()

    return _over_layers(loss, routings)


def router_z(routings: Routings) -> Tensor:
    """Router z-loss: mean squared log-sum-exp of the logits, which keeps them small.

    Source: Zoph et al. 2022 (ST-MoE), eq. 5.
    """

    def loss(routing: Routing) -> Tensor:
        return _token_mean(routing.logits.logsumexp(-1).square(), routing)

    return _over_layers(loss, routings)


def entropy(routings: Routings) -> Tensor:
    """Mean entropy of a token's scores, in nats: 0 for a certain router, ln E for an undecided one.

    Scores are normalised to sum to one per token first.

    Source: Huang et al. 2024 (dynamic routing), section 3.3.
    """
    return _over_layers(lambda routing: _token_mean(token_entropy(routing), routing), routings)


def token_entropy(routing: Routing) -> Tensor:
    """[T]: entropy of each token's normalised scores, in nats."""
    scores_TE = routing.scores / routing.scores.sum(-1, keepdim=True).clamp(min=1e-20)
    entropy_T: Tensor = torch.special.entr(scores_TE.clamp(min=0)).sum(-1)
    return entropy_T


def path_entropy(routings: Routings) -> Tensor:
    """Mean over tokens of Σ_j Σ_i -P log(P + 1e-6), in nats: 0 when each of J trees picks one leaf.

    P are the `paths` that `TreeRouter` puts on its routing; ValueError when they are missing. It acts on the
    paths, not on the gate, which may stay soft over the leaves that the trees picked.

    Source: Ibrahim et al. 2023 (COMET), section 3; Hazimeh et al. 2021 (DSelect-k), section 3.2.
    """

    def loss(routing: Routing) -> Tensor:
        if routing.paths is None:
            raise ValueError("path_entropy needs the paths of trees; route with TreeRouter")
        return _token_mean(-(routing.paths * (routing.paths + 1e-6).log()).sum((1, 2)), routing)

    return _over_layers(loss, routings)


def importance_cv2(routings: Routings) -> Tensor:
    """Squared coefficient of variation of the experts' importance (summed weights).

    Source: Shazeer et al. 2017, eq. 6–7.
    """
    return _over_layers(lambda routing: _cv2(routing.importance), routings)


def importance_entropy(routings: Routings) -> Tensor:
    """Entropy of the experts' shares of summed weight, in nats: ln E when all are used alike, 0 for one.

    Subtract it from a loss: unlike the L1 norm of softmax weights, which is constant, it spreads the use of
    experts over a batch and leaves each token free to decide.

    >>> round(float(importance_entropy(Routing.dense(torch.tensor([[1.0, 0.0], [0.0, 1.0]])))), 4)
    0.6931
    """

    def loss(routing: Routing) -> Tensor:
        share_E = routing.importance / routing.importance.sum().clamp(min=1e-20)
        return -(share_E * share_E.clamp(min=1e-20).log()).sum()

    return _over_layers(loss, routings)


def load_cv2(routings: Routings) -> Tensor:
    """Squared coefficient of variation of the experts' smoothed load.

    Needs `choice_probability`, which `NoisyTopK` fills while training: the count itself has no gradient.
    ValueError when it is missing.

    Source: Shazeer et al. 2017, eq. 8–11.
    """

    def loss(routing: Routing) -> Tensor:
        if routing.choice_probability is None:
            raise ValueError("load_cv2 needs choice_probability; route with NoisyTopK in training mode")
        return _cv2(_masked(routing.choice_probability, routing).sum(0))

    return _over_layers(loss, routings)


def router_anchor(
    routings: Routings,
    experts: Sequence[int],
    *,
    on: Literal["topk", "softmax"] = "topk",
    tokens_T: Tensor | None = None,
) -> Tensor:
    """Pulls tokens to given experts: mean over tokens of ‖g - a‖², a being 1/M for each of M experts, else 0.

    It is 0 when a token's scores are a, and 2 at most. Unlearning holds tokens at the expert that knows their
    topic with it; trained without, a router may find that moving them elsewhere also makes the loss smaller.

    Args:
        routings: one Routing, or one per layer; their scores are those of a softmax.
        experts: M ids.
        on: what g is. "topk": the scores of the experts that a token uses, 0 elsewhere, and those of
            `experts` whether it uses them or not: where it does not, 0 would have no gradient to come back
            by. "softmax": all scores.
        tokens_T: [T] bool, the tokens to pull; None for all that are not padding.

    Raises ValueError for an expert that does not exist, or another `on`.

    Source: UOE (2024, arXiv 2411.18797), router anchor loss; the mean over tokens is our reading.

    >>> routing = Routing.dense(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    >>> float(router_anchor(routing, [0]))
    0.25
    """
    if on not in ("topk", "softmax"):
        raise ValueError(f'on={on!r}; use "topk" or "softmax"')

    def loss(routing: Routing) -> Tensor:
        if not experts or not all(0 <= e < routing.num_experts for e in experts):
            raise ValueError(
                f"experts={list(experts)}; give at least one, each in 0 … {routing.num_experts - 1}"
            )
        ids = torch.tensor(list(experts), device=routing.scores.device)
        wanted_E = routing.scores.new_zeros(routing.num_experts).index_fill(0, ids, 1 / len(experts))
        gates_TE = routing.scores
        if on == "topk":
            gates_TE = torch.where(routing.used_TE | (wanted_E > 0), gates_TE, 0)
        distance_T = (gates_TE - wanted_E).square().sum(1)
        if tokens_T is not None:
            mask = tokens_T if routing.mask is None else tokens_T & routing.mask
            routing = replace(routing, mask=mask)
        return _token_mean(distance_T, routing)

    return _over_layers(loss, routings)


@torch.no_grad()
def loss_free_update(bias_E: Tensor, load_E: Tensor, rate: float = 1e-3) -> None:
    """Moves a selection bias in place: up by `rate` for underloaded experts, down for overloaded ones.

    Args:
        bias_E: the `bias` of a `TopK`.
        load_E: tokens per expert in the last global batch.
        rate: size of the step.

    Source: Wang et al. 2024 (loss-free balancing), algorithm 1.

    >>> bias = torch.zeros(2)
    >>> loss_free_update(bias, torch.tensor([30, 10]), rate=0.5)
    >>> bias.tolist()
    [-0.5, 0.5]
    """
    load_E = load_E.to(bias_E)
    bias_E += rate * torch.sign(load_E.mean() - load_E)


def _over_layers(loss: Callable[[Routing], Tensor], routings: Routings) -> Tensor:
    layers = [routings] if isinstance(routings, Routing) else list(routings)
    if not layers:
        raise ValueError("no routings given; a dense model has no balance to keep")
    return torch.stack([loss(routing) for routing in layers]).mean()


def _cv2(values_E: Tensor) -> Tensor:
    return values_E.var(correction=0) / values_E.mean().square().clamp(min=1e-10)


def _masked(values_TE: Tensor, routing: Routing) -> Tensor:
    return values_TE if routing.mask is None else torch.where(routing.mask.unsqueeze(1), values_TE, 0)


def _token_mean(values_T: Tensor, routing: Routing) -> Tensor:
    if routing.mask is not None:
        values_T = torch.where(routing.mask, values_T, 0)
    return values_T.sum() / routing.num_tokens.clamp(min=1)
