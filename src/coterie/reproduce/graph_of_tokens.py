"""Sequences whose tokens come from a few clusters: does a token route more steadily when its neighbours vote?

Eight clusters in 16 dimensions. A sequence draws three and its 24 tokens one of those each: the cluster's
centre plus v, normal of standard deviation 0.6. The label, one of four, is the largest entry of v times a
matrix of the cluster, so that a token needs the expert of its cluster, and tokens of the same cluster in its
sequence are informative neighbours. 400 sequences for training and 200 for testing; their noisy copy adds
normal noise of standard deviation 0.5. One layer: single-head attention, then top-2 of eight ReLU experts of
width 16, both with a residual, then a linear classifier. Adam at 3e-3, batches of 32, 25 epochs, balance
weight 0.01. Centres, matrices and sequences are drawn anew for every seed; the arms of a seed share them.

Fluctuation is measured on the test sequences from epoch to epoch, and is the mean of the last eight. It
varies so much from seed to seed that six seeds, as first planned, do not decide; all claims are judged on
eighteen, with the margins set for six. τ is √D = 4; sharp is τ = 1, diffuse is τ = 16.

The paper trains language and vision models, among them on WikiText-103 with swapped words. `--data` takes a
file or folder of text: the arms are then decoders of two layers on its bytes, and in the noisy copy one byte
in twenty is another one of the text.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from coterie.language.graph_of_tokens import graph_of_tokens, make_ffn
from coterie.language.scored_text import scored_text
from coterie.models import Decoder, DecoderConfig
from coterie.nn import (
    AttentionAffinity,
    AttentionHeads,
    LinearScore,
    MLPExperts,
    MoE,
    Router,
    Routing,
    SimilarityAffinity,
    StabilityTracker,
    TopK,
    balance,
)
from coterie.reproduce import Budget, Card, Claim, Plot, Values, train
from coterie.train import Every, LossOutput

CARD = Card(
    slug="graph-of-tokens",
    title="Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
    authors="Nguyen et al.",
    year=2025,
    venue="arXiv 2505.00792",
    area="language",
    methods=("similarity-aware routing", "attention-aware routing", "token mixing", "routing fluctuation"),
    problem="Tokens routed one by one hop between experts, late in training and under noise; does it steady "
    "them to decide together with similar tokens?",
    headline="Both variants lower the entropy of expert selection and the fluctuation of routing, and beat "
    "softmax-gated MoE transformers in accuracy and robustness.",
)

SEEDS = 18
CLUSTERS, PRESENT, DIM, LABELS, LENGTH = 8, 3, 16, 4, 24
EPOCHS = {"smoke": 3, "standard": 25, "full": 100}
BATCH = 32
TEXT = DecoderConfig(
    257,
    dim=48,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=12,
    hidden=96,
    num_experts=CLUSTERS,
    expert_hidden=32,
    max_len=64,
)


def run(seed: int, budget: Budget, data: Any, *, affinity: str | None = None, tau: float = 1.0) -> Values:
    """One arm; τ is given in multiples of √D. Without an affinity it is plain top-2."""
    epochs, few = EPOCHS[budget], budget == "smoke"
    if data is None:
        training, test, noisy = clustered_sequences(seed, training=64 if few else 400)
    else:
        training, test, noisy = _text_sequences(seed, *(part[:64] if few else part for part in data))
    torch.manual_seed(seed)
    model = _tagger(affinity, tau) if data is None else _decoder(affinity, tau)
    inputs, targets = test
    tracker, epoch = StabilityTracker(lambda model: model(inputs)[1]), len(training[0]) // BATCH
    train(
        model,
        TensorDataset(*training),
        loss=_loss,
        steps=epochs * epoch,
        batch_size=BATCH,
        lr=3e-3,
        min_lr_ratio=1.0,
        warmup_steps=0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        grad_clip=None,
        callbacks=[Every(epoch, tracker.update)],
        seed=seed,
    )
    model.eval()
    accuracy, routings = _accuracy(model, inputs, targets)
    flip_rate = tracker.flip_rate(model, lambda model: model(noisy)[1])
    return {
        "accuracy": accuracy,
        "noisy accuracy": _accuracy(model, noisy, targets)[0],
        "fluctuation": tracker.fluctuation(last=min(8, epochs - 1)),
        "flip rate": flip_rate,
        "entropy": float(balance.entropy(routings)),
        "busiest expert": max(float(r.load.max() / r.load.sum()) for r in routings),
        "accuracy by flip rate": [(flip_rate, accuracy)],
        "fluctuation by epoch": [(step / epoch, share) for step, share in tracker.fluctuations],
        "entropy by epoch": [(step / epoch, nats) for step, nats in tracker.entropies],
    }


ARMS = {
    "base": run,
    "similarity": partial(run, affinity="similarity"),
    "similarity-sharp": partial(run, affinity="similarity", tau=0.25),
    "similarity-diffuse": partial(run, affinity="similarity", tau=4.0),
    "attention": partial(run, affinity="attention"),
}


def _ratio(arm: str, name: str) -> Any:
    return lambda arms: arms[arm][name] / arms["base"][name]


def _gain(arm: str, name: str) -> Any:
    return lambda arms: arms[arm][name] - arms["base"][name]


CLAIMS = [
    Claim(
        "noise flips at most 0.7 times as many tokens with similarity as without",
        _ratio("similarity", "flip rate"),
        at_most=0.7,
    ),
    Claim(
        "similarity: fluctuation late in training at most 0.9 times that without",
        _ratio("similarity", "fluctuation"),
        at_most=0.9,
    ),
    Claim(
        "similarity: entropy of expert selection at most 0.9 times that without",
        _ratio("similarity", "entropy"),
        at_most=0.9,
    ),
    Claim(
        "similarity gains at least one point of accuracy",
        _gain("similarity", "accuracy"),
        at_least=0.01,
    ),
    Claim(
        "similarity is at least as accurate under noise",
        _gain("similarity", "noisy accuracy"),
        at_least=0,
    ),
    Claim(
        "noise flips at most 0.6 times as many tokens with attention as without",
        _ratio("attention", "flip rate"),
        at_most=0.6,
    ),
    Claim(
        "attention: fluctuation late in training at most 0.9 times that without",
        _ratio("attention", "fluctuation"),
        at_most=0.9,
        note="Six seeds were planned. The first six gave 0.91, the next six 0.37, the last six 0.47: on "
        "seeds 4 and 5 attention fluctuates more than the base. Similarity gave 0.79, 0.39 and 0.44.",
    ),
    Claim(
        "attention is at least as accurate",
        _gain("attention", "accuracy"),
        at_least=0,
    ),
]

PLOTS = [
    Plot(
        "accuracy by flip rate",
        x="share of tokens whose first expert changes under noise",
        y="test accuracy",
        points=True,
        note="Left is steadier, up is better.",
    ),
    Plot(
        "fluctuation by epoch",
        x="epoch",
        y="share of tokens that changed their first expert",
        log_y=True,
        note="On the same test tokens, since the epoch before.",
    ),
    Plot("entropy by epoch", x="epoch", y="entropy of the scores that choose, nats"),
]

Pairs = tuple[Tensor, Tensor]


def clustered_sequences(
    seed: int, *, training: int = 400, test: int = 200, length: int = LENGTH
) -> tuple[Pairs, Pairs, Tensor]:
    """Sequences of tokens from three of eight clusters, whose labels need the cluster's own map.

    Args:
        seed: of everything, centres and maps included.
        training, test: sequences of each.
        length: S tokens per sequence.

    Returns: training inputs [N, S, 16] and labels [N, S] int64, the same for testing, and the test inputs
    with noise.

    >>> (inputs, labels), _, noisy = clustered_sequences(0, training=5, test=2)
    >>> inputs.shape, labels.shape, noisy.shape
    (torch.Size([5, 24, 16]), torch.Size([5, 24]), torch.Size([2, 24, 16]))
    """
    rng = torch.Generator().manual_seed(seed)
    centres_CD = torch.randn(CLUSTERS, DIM, generator=rng)
    maps_CDL = torch.randn(CLUSTERS, DIM, LABELS, generator=rng)
    count = training + test
    present = torch.rand(count, CLUSTERS, generator=rng).argsort(1)[:, :PRESENT]
    cluster_BS = present.gather(1, torch.randint(PRESENT, (count, length), generator=rng))
    v_BSD = 0.6 * torch.randn(count, length, DIM, generator=rng)
    inputs = centres_CD[cluster_BS] + v_BSD
    labels = torch.einsum("bsd,bsdl->bsl", v_BSD, maps_CDL[cluster_BS]).argmax(-1)
    noisy = inputs[training:] + 0.5 * torch.randn(test, length, DIM, generator=rng)
    return (inputs[:training], labels[:training]), (inputs[training:], labels[training:]), noisy


class Tagger(nn.Module):
    """Tokens [B, S, D] to labels [B, S, L] and routings: attention, an MoE, each residual; a classifier."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.moe, self.head = moe, nn.Linear(DIM, LABELS)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, list[Routing]]:
        q, k, v = (project(x_BSD).unsqueeze(1) for project in (self.q, self.k, self.v))
        h_BSD = x_BSD + self.o(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        y_BSD, routing = self.moe(h_BSD, attention=AttentionHeads(q, k, v, self.o.weight))
        return self.head(h_BSD + y_BSD), [routing]


def read_data(path: Path) -> Pairs:
    """Up to 2000 windows of 65 bytes for training and up to 200 for testing, int64."""
    parts = scored_text(path, 64, BATCH)
    order = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[arg-type]
    training = torch.stack([parts[0][i][0] for i in order[:2000]])
    return training, torch.stack([parts[1][i][0] for i in range(len(parts[1]))])  # type: ignore[arg-type]


def _text_sequences(seed: int, training: Tensor, test: Tensor) -> tuple[Pairs, Pairs, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    inputs = test[:, :-1]
    others = inputs.flatten()[torch.randperm(inputs.numel(), generator=rng)].view_as(inputs)
    noisy = torch.where(torch.rand(inputs.shape, generator=rng) < 0.05, others, inputs)
    return (training[:, :-1], training[:, 1:]), (inputs, test[:, 1:]), noisy


def _tagger(affinity: str | None, tau: float) -> nn.Module:
    bank = MLPExperts(CLUSTERS, DIM, DIM, activation="relu")
    if affinity is None:
        return Tagger(MoE(Router(LinearScore(DIM, CLUSTERS), TopK(2)), bank))
    if affinity == "similarity":
        similarity = SimilarityAffinity(DIM, causal=False, tau=tau * math.sqrt(DIM))
        return Tagger(graph_of_tokens(bank, DIM, similarity))
    return Tagger(graph_of_tokens(bank, DIM, AttentionAffinity(num_heads=1)))


def _decoder(affinity: str | None, tau: float) -> nn.Module:
    if affinity is None:
        return Decoder(TEXT)
    if affinity == "similarity":
        return Decoder(TEXT, make_ffn(TEXT, "similarity", tau=tau * math.sqrt(TEXT.dim)))
    return Decoder(TEXT, make_ffn(TEXT, "attention"))


def _loss(model: nn.Module, batch: Pairs) -> LossOutput:
    inputs, targets = batch
    logits, routings = model(inputs)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = cross_entropy + 0.01 * balance.load_balance(routings)
    return LossOutput(loss, cross_entropy.detach(), targets.numel(), routings)


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, list[Routing]]:
    logits, routings = model(inputs)
    return (logits.argmax(-1) == targets).double().mean().item(), routings
