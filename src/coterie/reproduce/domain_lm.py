"""A tiny trained MoE language model of eight domains, which papers on compression share."""

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.data.domain_markov import VOCAB_SIZE, domain_markov
from coterie.models import Decoder, DecoderConfig, to_transformers
from coterie.nn.balance import load_balance
from coterie.reproduce.experiment import train
from coterie.train import LossFn, LossOutput

CONFIG = DecoderConfig(
    VOCAB_SIZE,
    dim=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    hidden=64,
    num_experts=16,
    top_k=2,
    expert_hidden=64,
    max_len=33,
)


def domain_lm(seed: int, steps: int = 1200, config: DecoderConfig = CONFIG) -> PreTrainedModel:
    """A Qwen3-MoE of 2 layers and 16 experts, top-2, trained on `domain_markov`; about 20 seconds of a core.

    A process trains a model once; each call returns a copy that can be edited.

    Args:
        seed: of weights and text.
        steps: of 32 sequences.
        config: for other sizes.
    """
    return copy.deepcopy(_trained(seed, steps, config))


@lru_cache(maxsize=4)
def _trained(seed: int, steps: int, config: DecoderConfig) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = Decoder(config)
    text = domain_markov(32 * steps, seed=1000 + seed)
    options = {"batch_size": 32, "lr": 4e-3, "warmup_steps": min(50, steps), "weight_decay": 0.01}
    train(model, text, loss=domain_lm_loss(), steps=steps, seed=seed, **options)  # type: ignore[arg-type]
    return to_transformers(model)


@torch.no_grad()
def domain_loss(model: PreTrainedModel, ids_NS: Tensor) -> float:
    """Cross-entropy of the steps of `domain_markov` sequences, nats per token.

    The best that can be had is 1.534.
    """
    return _steps_loss(model(ids_NS[:, :-1]).logits, ids_NS).item()


def domain_lm_loss() -> LossFn:
    """The training loss of a decoder: that of `domain_loss`, and load balance where there are experts."""

    def loss_fn(model: nn.Module, ids_BS: Tensor) -> LossOutput:
        logits_BSV, routings = model(ids_BS[:, :-1])
        cross_entropy = _steps_loss(logits_BSV, ids_BS)
        tokens = ids_BS[:, 2:].numel()
        loss = cross_entropy + 0.01 * load_balance(routings) if routings else cross_entropy
        return LossOutput(loss, cross_entropy.detach(), tokens, list(routings))

    return loss_fn


def _steps_loss(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    # what follows the tag is uniform and not scored
    return F.cross_entropy(logits_BSV[:, 1:].flatten(0, 1), ids_BS[:, 2:].flatten())
