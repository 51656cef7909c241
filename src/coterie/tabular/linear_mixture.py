"""A gated mixture of logistic regressions that experts can be added to, removed from and merged in.

Letters: T rows, E experts, D features. Everything is float64: the models are tiny, and sums of attributions
    are then exact to 1e-12.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from coterie.nn import (
    Dense,
    LinearExperts,
    LinearScore,
    Router,
    Routing,
    append_experts,
    bias_for_share,
    keep_experts,
)

Mix = Literal["prob", "logit"]


@dataclass(frozen=True)
class Mixed:
    """What the mixture makes of T rows.

    Args:
        scores_TE: s_i(x), the logit of each expert.
        routing: the gate's.
        mix: what is mixed, probabilities or logits.
    """

    scores_TE: Tensor
    routing: Routing
    mix: Mix

    @cached_property
    def score_T(self) -> Tensor:
        """S(x) = Σ g_i s_i, the score that attributions explain."""
        return (self.routing.weights * self.scores_TE).sum(1)

    @cached_property
    def log_odds_T(self) -> Tensor:
        """log p / (1 - p); for mixed logits it is S."""
        if self.mix == "logit":
            return self.score_T
        log_gate_TE = self.routing.logits.log_softmax(1)  # in logarithms: 1 - p would round to 0
        log_p_T = (log_gate_TE + F.logsigmoid(self.scores_TE)).logsumexp(1)
        return log_p_T - (log_gate_TE + F.logsigmoid(-self.scores_TE)).logsumexp(1)


class LinearMixture(nn.Module):
    """E logistic regressions and a linear softmax gate that mixes all of them.

    Args:
        dim: D.
        num_experts: E.
        mix: "prob" for p = Σ g_i σ(s_i), "logit" for p = σ(Σ g_i s_i).

    >>> LinearMixture(3, 2, "prob")(torch.randn(5, 3, dtype=torch.float64)).log_odds_T.shape
    torch.Size([5])
    """

    def __init__(self, dim: int, num_experts: int, mix: Mix) -> None:
        super().__init__()
        self.router = Router(LinearScore(dim, num_experts, bias=True), Dense())
        self.experts = LinearExperts(num_experts, dim, 1, bias=True)
        self.mix = mix
        self.double()

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def banks(self) -> tuple[LinearScore, LinearExperts]:
        """The two that grow together."""
        assert isinstance(self.router.score, LinearScore)
        return self.router.score, self.experts

    def forward(self, x_TD: Tensor) -> Mixed:
        return Mixed(self.experts.each(x_TD).squeeze(2), self.router(x_TD), self.mix)


def classification_loss(mixed: Mixed, y_T: Tensor, *, localized: bool) -> Tensor:
    """Mean cross-entropy of the mixture, or with `localized` Σ g_i · (that of expert i alone).

    The second makes each expert answer for its own region.

    Source: Jacobs et al. 1991, eq. 1.2, for the localized one.
    """
    if not localized:
        return F.binary_cross_entropy_with_logits(mixed.log_odds_T, y_T)
    each_TE = F.binary_cross_entropy_with_logits(
        mixed.scores_TE, y_T.unsqueeze(1).expand_as(mixed.scores_TE), reduction="none"
    )
    return (mixed.routing.weights * each_TE).sum(1).mean()


@torch.no_grad()
def add_expert(
    model: LinearMixture, x_TD: Tensor, weight_D: Tensor, bias: float, optimizer: Optimizer
) -> None:
    """Appends an expert whose share of the gate is 1 / (E + 1) on these rows, wherever they are.

    A gate row of ordinary scale would take rows at random from experts that know them.
    """
    gate, experts = model.banks
    logits_TE = gate(x_TD)
    share_bias = bias_for_share(logits_TE, logits_TE.new_zeros(len(x_TD)), 1 / (model.num_experts + 1))
    append_experts(
        gate, {"weight": torch.zeros_like(gate.weight[:1]), "bias": torch.tensor([share_bias])}, optimizer
    )
    append_experts(experts, {"weight": weight_D.view(1, 1, -1), "bias": torch.tensor([[bias]])}, optimizer)


def remove_expert(model: LinearMixture, expert: int, optimizer: Optimizer) -> None:
    """Takes one expert out; the gate shares its rows out among the others."""
    kept = [e for e in range(model.num_experts) if e != expert]
    for bank in model.banks:
        keep_experts(bank, kept, optimizer)


@torch.no_grad()
def merge_experts(model: LinearMixture, pair: tuple[int, int], x_TD: Tensor, optimizer: Optimizer) -> None:
    """Makes one expert of two, at the first one's place.

    Weights and gate rows are means, weighted by the experts' shares on these rows; the gate's bias is such
    that the one gets as much as the two had.
    """
    one, other = pair
    gate, _ = model.banks
    share_E = model.router(x_TD).weights.mean(0)
    weight = share_E[[one, other]] / share_E[[one, other]].sum()
    for bank in model.banks:
        for parameter in bank.parameters():
            parameter[one] = torch.tensordot(weight, parameter[[one, other]], 1)
    others = [e for e in range(model.num_experts) if e not in pair]
    if others:
        logits_TE = gate(x_TD)
        wanted = float(share_E[[one, other]].sum())
        assert gate.bias is not None
        without_bias_T = logits_TE[:, one] - gate.bias[one]
        gate.bias[one] = bias_for_share(logits_TE[:, others], without_bias_T, wanted)
    remove_expert(model, other, optimizer)


def most_alike(model: LinearMixture) -> tuple[tuple[int, int], float]:
    """The two experts whose weights point in the most similar direction, and their cosine."""
    unit_ED = F.normalize(model.experts.weight.detach().squeeze(1), dim=1)
    cosine_EE = (unit_ED @ unit_ED.t()).fill_diagonal_(-torch.inf)
    one, other = divmod(int(cosine_EE.argmax()), model.num_experts)
    return (min(one, other), max(one, other)), float(cosine_EE.max())
