"""One training loop on Hugging Face Accelerate, with what it needs: losses, schedules, callbacks."""

from coterie.train.callbacks import Callback, Every, LossFreeBias, PermutationSearch, Run
from coterie.train.epochs import EpochHistory, train_epochs
from coterie.train.evaluate import evaluate
from coterie.train.fit import fit
from coterie.train.history import History
from coterie.train.losses import LossFn, LossOutput, classification_loss, language_model_loss
from coterie.train.memory import PeakMemory
from coterie.train.optimizer import adamw, weight_decay_groups
from coterie.train.schedule import cosine_with_warmup

__all__ = [
    "Callback",
    "EpochHistory",
    "Every",
    "History",
    "LossFn",
    "LossFreeBias",
    "LossOutput",
    "PeakMemory",
    "PermutationSearch",
    "Run",
    "adamw",
    "classification_loss",
    "cosine_with_warmup",
    "evaluate",
    "fit",
    "language_model_loss",
    "train_epochs",
    "weight_decay_groups",
]
