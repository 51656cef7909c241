"""An MoE layer inside a model of one's own, trained the three ways people train."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from coterie.nn import LinearScore, MoE, Router, SwiGLUExperts, TopK, balance
from coterie.train import LossOutput, fit


class Classifier(nn.Module):
    """Points on a ring to their quadrant, through one MoE layer; the loss comes with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 16)
        self.moe = MoE(Router(LinearScore(16, 4), TopK(2)), SwiGLUExperts(4, 16, 32))
        self.head = nn.Linear(16, 4)

    def forward(self, points, labels=None):
        h = self.embed(points)
        y, routing = self.moe(h)
        logits = self.head(h + y)
        loss = nn.functional.cross_entropy(logits, labels) + 0.01 * balance.load_balance(routing)
        return {"loss": loss, "logits": logits, "routing": routing}


def ring(n=256):
    angle = torch.rand(n) * 2 * torch.pi
    return torch.stack([angle.cos(), angle.sin()], 1), (angle / (torch.pi / 2)).long().clamp(max=3)


def accuracy(model):
    points, labels = ring()
    return (model(points, labels)["logits"].argmax(1) == labels).float().mean().item()


def test_plain_pytorch():
    model, (points, labels) = Classifier(), ring()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(points, labels)["loss"].backward()
        optimizer.step()
    assert accuracy(model) > 0.9


def test_coterie_fit():
    def loss(model, batch):
        points, labels = batch
        out = model(points, labels)
        return LossOutput(out["loss"], out["loss"].detach(), len(labels), [out["routing"]])

    model = Classifier()
    fit(model, TensorDataset(*ring()), loss=loss, steps=60, batch_size=128, lr=1e-2, progress=False)
    assert accuracy(model) > 0.9


def test_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    class ForTrainer(Classifier):
        def forward(self, points, labels=None):
            out = super().forward(points, labels)
            return {"loss": out["loss"], "logits": out["logits"]}

    model, (points, labels) = ForTrainer(), ring()
    rows = [{"points": p, "labels": l} for p, l in zip(points, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=60, per_device_train_batch_size=128, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert accuracy(model) > 0.9
