import pytest
import torch
from torch.nn import functional as F

from coterie.models import ViT, ViTConfig
from coterie.nn import LinearScore, MLPExperts, MoE, Router, TopK
from coterie.train import classification_loss

CONFIG = ViTConfig((8, 8), 4, classes=5, dim=8, layers=2, heads=2, hidden=8)


def model_of(experts):
    def moe(layer):
        return MoE(Router(LinearScore(8, 4), TopK(2)), MLPExperts(4, 8, 8))

    model = ViT(CONFIG, moe if experts else None).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def batch():
    return torch.rand(6, 3, 8, 8), torch.arange(6) % 5


def test_the_penalty_and_smoothing_are_in_the_loss_and_not_in_the_cross_entropy(batch):
    model = model_of(experts=True)
    logits = model(batch[0])[0]
    plain = F.cross_entropy(logits, batch[1])
    loss = classification_loss(lambda routings: torch.tensor(float(len(routings))), label_smoothing=0.1)
    output = loss(model, batch)
    torch.testing.assert_close(output.cross_entropy, plain)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, batch[1], label_smoothing=0.1) + 2)
    assert output.metrics["accuracy"].item() == pytest.approx(
        (logits.argmax(-1) == batch[1]).double().mean().item()
    )
    assert output.tokens == 6


def test_a_model_without_experts_has_no_penalty(batch):
    output = classification_loss(lambda routings: torch.tensor(9.0))(model_of(experts=False), batch)
    torch.testing.assert_close(output.loss.detach(), output.cross_entropy)
    assert output.routings == []
