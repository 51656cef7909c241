"""Expert labels that are learned: which expert should stand behind each label of a router?

A step on a router's weights cannot swap two experts; a step on a relaxed permutation between router and
experts can. `LearnedPermutation` is that permutation, `PermuteLabels` puts it behind any router, and the
training callback `coterie.train.PermutationSearch` sharpens it and ends the search.

Source: Ibrahim et al. 2023 (COMET), section 4, "permutation-based local search".
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coterie.nn.routers import AnyRouter
from coterie.nn.routing import Routing
from coterie.nn.score import wide


class LearnedPermutation(nn.Module):
    """A permutation of E experts, relaxed to a doubly stochastic matrix while it is learned.

    The matrix is sinkhorn(A / τ) with A learned, and its rounding is the permutation that keeps most of it
    (Hungarian algorithm). Routers that are to agree on the labels share one; each its own, otherwise.

    Args:
        num_experts: E.
        tau: temperature at the first and at the last step of the search; between them its logarithm is
            linear. The released code goes from 1e-3 to 1e-7, where A hardly gets a gradient: in a few hundred
            steps that finds little.
        iterations: Sinkhorn iterations at the first and at the last step; linear between them, 20 to 150 in
            the released code.

    Attributes: `progress`, how far the search is, 0 … 1; `hard`, whether it has ended.

    Raises ValueError for a temperature or a number of iterations that is not positive.

    >>> relabel = LearnedPermutation(4)
    >>> relabel.matrix().sum(1).allclose(torch.ones(4)), sorted(relabel.permutation.tolist())
    (True, [0, 1, 2, 3])
    """

    keeps_init = True
    progress: Tensor
    hard: Tensor
    final: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        tau: tuple[float, float] = (1.0, 0.01),
        iterations: tuple[int, int] = (40, 40),
    ) -> None:
        super().__init__()
        if not min(tau) > 0:
            raise ValueError(f"tau={tau}; both temperatures should be > 0")
        if min(iterations) < 1:
            raise ValueError(f"iterations={iterations}; both should be at least 1")
        self.num_experts, self.tau, self.iterations = num_experts, tau, iterations
        self.logits = nn.Parameter(torch.empty(num_experts, num_experts).uniform_(-0.05, 0.05))  # A
        self.register_buffer("progress", torch.tensor(0.0))
        self.register_buffer("hard", torch.tensor(False))
        self.register_buffer("final", torch.arange(num_experts))

    def matrix(self) -> Tensor:
        """[E, E]: the share of label i (row) that goes to expert e; rows and columns sum to about 1."""
        progress = float(self.progress)
        (first, last), (few, many) = self.tau, self.iterations
        tau = first * (last / first) ** progress
        return sinkhorn(wide(self.logits) / tau, round(few + (many - few) * progress))

    @property
    def permutation(self) -> Tensor:
        """int64 [E]: the expert of each label; the rounded matrix, or what it was when the search ended."""
        return self.final if bool(self.hard) else round_to_permutation(self.matrix())

    @torch.no_grad()
    def harden(self) -> None:
        """Ends the search: keeps the rounded permutation for good. Doing so again does nothing."""
        self.final.copy_(self.permutation)
        self.hard.fill_(True)


class PermuteLabels(nn.Module):
    """Sends what a router gives to label i to the expert that a learned permutation puts behind it.

    While training and before the search has ended, every token's weights go through the relaxed matrix and
    are rescaled to the sum they had; nearly every expert then sees every token. In evaluation, and once the
    search has ended, labels are exchanged by the rounded permutation, and nothing else changes.

    `paths` of tree routers stay those of the leaves: their entropy does not depend on labels.

    Args:
        router: any router over E experts.
        permutation: over the same E; a new one if None. Give routers of several tasks the same to share it.

    Raises ValueError when router and permutation differ in E.

    >>> from coterie.nn import HashRouter
    >>> router = PermuteLabels(HashRouter(torch.arange(3), num_experts=3)).eval()
    >>> ids = torch.tensor([2, 0])
    >>> experts = router(torch.zeros(2, 8), token_ids=ids).experts.squeeze(1)
    >>> experts.equal(router.permutation.permutation[ids])
    True
    """

    def __init__(self, router: AnyRouter, permutation: LearnedPermutation | None = None) -> None:
        super().__init__()
        self.router, self.num_experts = router, router.num_experts
        self.permutation = LearnedPermutation(router.num_experts) if permutation is None else permutation
        if self.permutation.num_experts != self.num_experts:
            raise ValueError(
                f"the permutation is over {self.permutation.num_experts} experts "
                f"but the router over {self.num_experts}"
            )

    def forward(self, x_TD: Tensor, **context: Any) -> Routing:
        routing = self.router(x_TD, **context)
        if self.training and not bool(self.permutation.hard):
            with torch.autocast(x_TD.device.type, enabled=False):
                return _mix(routing, self.permutation.matrix())
        routing = _relabel(routing, self.permutation.permutation)
        if self.training:
            # a gradient of 0, not none: DistributedDataParallel waits for every parameter it began with
            routing = replace(routing, weights=routing.weights + 0 * self.permutation.logits.sum())
        return routing


def sinkhorn(logits_EE: Tensor, iterations: int) -> Tensor:
    """Scales rows and columns of exp(logits) in turn until both sum to about 1; columns last.

    Source: Sinkhorn 1964; in log space as in Mena et al. 2018 (Gumbel-Sinkhorn), section 2.

    >>> sinkhorn(torch.zeros(2, 2), 1).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    for _ in range(iterations):
        logits_EE = logits_EE.log_softmax(1)  # x - logsumexp(x)
        logits_EE = logits_EE.log_softmax(0)
    return logits_EE.exp()


def round_to_permutation(matrix_EE: Tensor) -> Tensor:
    """int64 [E]: the permutation p with the largest Σ_i matrix[i, p_i] (Hungarian algorithm).

    >>> round_to_permutation(torch.tensor([[0.4, 0.6], [0.3, 0.7]])).tolist()
    [0, 1]
    """
    from scipy.optimize import linear_sum_assignment  # takes as long to import as all of coterie.nn

    _, columns = linear_sum_assignment(matrix_EE.detach().double().cpu().numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64, device=matrix_EE.device)


def permutation_entropy(matrix_EE: Tensor) -> Tensor:
    """Entropy of a doubly stochastic matrix and of the same with rows that sum to 1: 0 for a permutation.

    Σ -M log(M + 1e-6) over all entries, for both, in nats.

    Source: Ibrahim et al. 2023 (COMET), section 4, and the released code.

    >>> abs(float(permutation_entropy(torch.eye(3)))) < 1e-4
    True
    """
    rows_EE = matrix_EE / matrix_EE.sum(1, keepdim=True).clamp(min=1e-20)
    both_2EE = torch.stack((matrix_EE, rows_EE))
    return -(both_2EE * (both_2EE + 1e-6).log()).sum()


def _mix(routing: Routing, matrix_EE: Tensor) -> Routing:
    """Weights, scores and logits through the relaxed permutation; every expert it reaches gets a slot."""
    matrix_EE = matrix_EE.to(routing.weights)
    weights_TE = routing.weights_TE @ matrix_EE
    before_T1, after_T1 = routing.weights.sum(1, keepdim=True), weights_TE.sum(1, keepdim=True)
    weights_TE = weights_TE * (before_T1 / torch.where(after_T1 == 0, 1, after_T1))
    reached_TE = routing.used_TE.to(matrix_EE) @ (matrix_EE > 0).to(matrix_EE) > 0
    # their exponentials are mixed: the -inf of an expert that cannot be chosen, times 0, would be NaN
    top_T1 = routing.logits.detach().amax(1, keepdim=True)
    mixed_TE = (routing.logits - top_T1).exp() @ matrix_EE
    logits_TE = mixed_TE.clamp(min=torch.finfo(mixed_TE.dtype).tiny).log() + top_T1
    probability_TE = routing.choice_probability
    return replace(
        Routing.dense(weights_TE, logits_TE, routing.mask).keep(reached_TE),
        scores=routing.scores @ matrix_EE,
        choice_probability=None if probability_TE is None else probability_TE @ matrix_EE,
        paths=routing.paths,
    )


def _relabel(routing: Routing, permutation_E: Tensor) -> Routing:
    """The same decision with label i called expert `permutation_E[i]`."""
    label_E = permutation_E.argsort()  # of each expert
    chosen_E, probability_TE = routing.chosen_E, routing.choice_probability
    return replace(
        routing,
        experts=permutation_E[routing.experts.clamp(min=0)].where(routing.used, -1),
        scores=routing.scores[:, label_E],
        logits=routing.logits[:, label_E],
        chosen_E=None if chosen_E is None else chosen_E[label_E],
        choice_probability=None if probability_TE is None else probability_TE[:, label_E],
    )
