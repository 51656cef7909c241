"""A decoder trained under a balancing rule or an auxiliary loss, and how even its experts then are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from coterie.language import mixed_markov as text
from coterie.language.alf_lb import BiasUpdate, Rule, max_violation
from coterie.models import Decoder, DecoderConfig
from coterie.nn import LinearScore, MoE, Monitor, Router, SwiGLUExperts, TopK
from coterie.nn.balance import load_balance
from coterie.reproduce import Budget, Values, train
from coterie.train import LossOutput, evaluate

DIM, EXPERTS, TOP_K = 48, 16, 2
Text = tuple[int, Dataset[Any], Dataset[Any]]  # vocabulary size, training, validation


def train_decoder(
    seed: int, budget: Budget, data: Any, *, rule: Rule | None = None, balance: float = 0.0
) -> Values:
    """Trains a decoder with a bias rule, with an auxiliary loss, or with neither.

    Args:
        seed: of weights and text.
        budget: how long.
        data: its `text` is such as `draw_text` returns; None, or None there, for that of `draw_text`.
        rule: moves the selection bias after each step; None leaves it at zero.
        balance: weight of the load balance loss.

    Returns: cross-entropy and balance over the whole validation set, the latter in the worst layer.
    """
    steps, sequences = {"smoke": (4, 32), "standard": (400, 1500), "full": (2000, 6000)}[budget]
    vocabulary, training, validation = data.text if data and data.text else draw_text(seed, sequences)
    config = DecoderConfig(vocabulary, DIM, layers=2, heads=4, kv_heads=4, head_dim=12, hidden=0)
    model = Decoder(config, make_ffn)
    penalty = (lambda routings: balance * load_balance(routings)) if balance else None
    history = train(
        model,
        training,
        loss=text.scored_loss(penalty),
        steps=steps,
        batch_size=16,
        lr=3e-3,
        warmup_steps=min(50, steps // 2),
        weight_decay=0.01,
        callbacks=[BiasUpdate(rule)] if rule else [],
        seed=seed,
    )
    monitor, loss = Monitor(), text.scored_loss()

    def watched(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        output = loss(model, batch)
        monitor.update(output.routings)
        return output

    cross_entropy = evaluate(model, validation, watched, batch_size=64)["cross_entropy"]
    violation = max(map(max_violation, monitor.loads))
    loads = [load_E.double() / load_E.double().mean() for load_E in monitor.loads]
    return {
        "cross-entropy, nats": cross_entropy,
        "MaxVio": violation,
        "MinLoad": min(float(load_E.min()) for load_E in loads),
        "experts under 0.1 L": sum(int((load_E < 0.1).sum()) for load_E in loads),
        "MaxVio of the batch by step": [
            (step, imbalance - 1)
            for step, imbalance in zip(history.step, history.imbalance, strict=True)
            if imbalance is not None and (step <= 20 or step % 5 == 0)
        ],
        "loss and balance": [(violation, cross_entropy)],
    }


def make_ffn(layer: int) -> MoE:
    """A layer of the trained decoder. Its bias stays at zero in the arms without a rule."""
    select = TopK(TOP_K, gate="sigmoid", bias=torch.zeros(EXPERTS))
    return MoE(Router(LinearScore(DIM, EXPERTS), select), SwiGLUExperts(EXPERTS, DIM, 32))


def draw_text(seed: int, sequences: int) -> Text:
    """Sequences of 64 tokens."""
    training = TensorDataset(*text.mixed_markov(sequences, 64, seed=100 + seed))
    return text.VOCAB_SIZE, training, TensorDataset(*text.mixed_markov(min(sequences, 200), 64, seed=999))
