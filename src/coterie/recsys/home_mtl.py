"""HoME: experts in a hierarchy, normalised, each bank with a view of its own; and the mixtures before it.

Source: Wang et al. 2025, "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou" (KDD
2025, arXiv 2408.05430).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coterie.data import TableEncoder, Vocabulary, check_columns, import_pandas
from coterie.models import load_estimator, save_estimator
from coterie.models.estimator import BaseEstimator, check_above, check_at_least
from coterie.recsys.labels import as_frame, binary_labels
from coterie.recsys.metrics import masked_bce
from coterie.recsys.multi_task import LevelOutput, MultiTaskMoE, Preset, expert_health
from coterie.recsys.training import train_on_rows

if TYPE_CHECKING:
    import pandas as pd


class MultiTaskMoEClassifier(BaseEstimator):  # type: ignore[misc]
    """Predicts several behaviours of a user, each yes or no, with one mixture of experts.

    Args:
        preset: the layout: "shared-bottom", "mmoe", "cgc", "ple", "adatt" or "home".
        categories: task → category, which "home" needs: tasks of one category share experts that no other
            task reaches. None puts all tasks in one, for the other layouts.
        ids: columns of identifiers, such as users and items, that get an embedding each. The others are
            features: numbers are standardised, texts one-hot, missing ones flagged (see `TableEncoder`).
        layout: options of the preset in `coterie.recsys.levels`, such as {"experts": 10} for "mmoe".
        hidden: width of an expert's output.
        embedding: width of an identifier's embedding.
        min_count: identifiers with fewer rows share the embedding that unseen ones get.
        epochs: passes over the rows.
        batch_size: rows of a step.
        lr: Adam's learning rate.
        random_state: seed of weights and batches; torch's global generator is left alone.

    After `fit`: `tasks_`, names of the label columns; `num_parameters_`; `loss_curve_`, mean loss of each
    epoch, summed over tasks; `expert_names_`, of the last level; `expert_usage_`, task → share of its gate's
    weight that each of them gets on the training rows.

    >>> pd = import_pandas()
    >>> rows = pd.DataFrame({"user": [1, 2, 1, 2] * 8, "age": range(32)})
    >>> labels = pd.DataFrame({"click": [1, 0, 1, 0] * 8, "like": [1, 0, None, 0] * 8})
    >>> tasks = {"click": "watch", "like": "social"}
    >>> ranker = MultiTaskMoEClassifier(categories=tasks, ids=["user"], lr=0.03, random_state=0)
    >>> probability = ranker.fit(rows, labels).predict_proba(rows)
    >>> probability.shape, bool((probability[0] > probability[1]).all())
    ((32, 2), True)
    """

    def __init__(
        self,
        preset: Preset = "home",
        *,
        categories: Mapping[str, str] | None = None,
        ids: Sequence[str] = (),
        layout: Mapping[str, Any] | None = None,
        hidden: int = 32,
        embedding: int = 8,
        min_count: int = 5,
        epochs: int = 4,
        batch_size: int = 512,
        lr: float = 3e-3,
        random_state: int = 0,
    ) -> None:
        self.preset, self.categories, self.ids, self.layout = preset, categories, ids, layout
        self.hidden, self.embedding, self.min_count = hidden, embedding, min_count
        self.epochs, self.batch_size, self.lr, self.random_state = epochs, batch_size, lr, random_state

    def fit(self, X: Any, Y: Any) -> "MultiTaskMoEClassifier":
        """Learns from rows and their labels.

        Args:
            X: DataFrame, or array, of features and identifiers.
            Y: DataFrame, or array, with a column of 0, 1 or NaN (no label) for each task.

        Raises:
            ValueError: an argument out of range, labels of another kind or for other rows (column and row are
                named), a task without a category or a category without a task, a column that is missing.
        """
        check_at_least(self, 1, "min_count", "epochs", "batch_size")
        check_above(self, 0, "lr")
        frame, labels = as_frame(X), as_frame(Y)
        self.tasks_ = [str(task) for task in labels.columns]
        labels_TK = binary_labels(labels, len(frame))
        categories = self._categories()
        check_columns(frame, self.ids)
        self._features = frame.columns.drop([*self.ids])
        self._encoder = TableEncoder()
        if len(self._features):
            self._encoder.fit(frame[self._features])
        self._vocabularies = {
            name: Vocabulary(min_count=self.min_count).fit(frame[name]) for name in self.ids
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            self._build(categories)
        ids_TI, features_TD = self._encode(frame)
        self.loss_curve_ = train_on_rows(
            self.model_,
            [ids_TI, features_TD, labels_TK],
            lambda batch: masked_bce(self.model_(batch[0], batch[1])[0], batch[2]),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.random_state,
        )
        self.expert_usage_ = self._usage(ids_TI, features_TD)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """Probability of each behaviour [rows, tasks]. ValueError for columns that are missing."""
        ids_TI, features_TD = self._encode(as_frame(X))
        with torch.no_grad():
            parts = [self.model_(*batch)[0] for batch in _batches(ids_TI, features_TD)]
        probability: npt.NDArray[np.float32] = torch.cat(parts).sigmoid().numpy()
        return probability

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """1 where a behaviour is more likely than not, [rows, tasks]."""
        return (self.predict_proba(X) > 0.5).astype(np.int64)

    def expert_health(self, X: Any) -> "pd.DataFrame":
        """One row per expert: is it dead, on another scale, or in the hands of one gate?

        Columns: level; expert; zero_fraction, of its outputs; std of its outputs; share_GATE, how much of its
        gate weight comes from each gate; monopolised_by, the gate with over 0.9 of it where several reach it.
        """
        ids_TI, features_TD = self._encode(as_frame(X))
        with torch.no_grad():
            batches = [self.model_.features(*batch) for batch in _batches(ids_TI, features_TD)]
        rows = []
        mixture = self.model_.mixture
        measured = zip(mixture.layout, expert_health(mixture, batches), strict=True)
        for number, (level, health) in enumerate(measured, 1):
            gates, share_GE, reach_GE = list(level.gates), health.gate_share, level.reach
            for expert, name in enumerate(_expert_names(level.bank_of)):
                top, several = int(share_GE[:, expert].argmax()), int(reach_GE[:, expert].sum()) > 1
                rows.append(
                    {
                        "level": number,
                        "expert": name,
                        "zero_fraction": float(health.zero_fraction[expert]),
                        "std": float(health.std[expert]),
                        **{f"share_{g}": float(share_GE[i, expert]) for i, g in enumerate(gates)},
                        "monopolised_by": gates[top] if several and share_GE[top, expert] > 0.9 else "",
                    }
                )
        return import_pandas().DataFrame(rows)

    def save(self, folder: str | Path) -> Path:
        """Writes a folder without pickle, which `load` reads. ValueError if it holds something else."""
        return save_estimator(
            folder,
            "MultiTaskMoEClassifier",
            parameters={
                **self.get_params(),
                "ids": list(self.ids),
                "layout": dict(self.layout or {}),
                "categories": None if self.categories is None else dict(self.categories),
            },
            learnt={
                "tasks": self.tasks_,
                "features": [*self._features],
                "encoder": self._encoder.to_dict(),
                "ids": {name: vocabulary.values for name, vocabulary in self._vocabularies.items()},
                "loss_curve": self.loss_curve_,
                "usage": {task: list(map(float, shares)) for task, shares in self.expert_usage_.items()},
            },
            tensors=self.model_.state_dict(),
        )

    @classmethod
    def load(cls, folder: str | Path) -> "MultiTaskMoEClassifier":
        """The estimator that `save` wrote. ValueError for another folder."""
        parameters, learnt, tensors = load_estimator(folder, "MultiTaskMoEClassifier")
        ranker = cls(**parameters)
        ranker.tasks_, ranker.loss_curve_ = learnt["tasks"], learnt["loss_curve"]
        ranker._features = import_pandas().Index(learnt["features"], dtype=object)
        ranker._encoder = TableEncoder.from_dict(learnt["encoder"])
        ranker._vocabularies = {}
        for name, values in learnt["ids"].items():
            ranker._vocabularies[name] = Vocabulary(min_count=ranker.min_count)
            ranker._vocabularies[name].values = values
        with torch.random.fork_rng(devices=[]):
            ranker._build(ranker._categories())
        ranker.model_.load_state_dict(tensors)
        ranker.model_.eval()
        ranker.expert_usage_ = {task: np.array(shares) for task, shares in learnt["usage"].items()}
        return ranker

    def _categories(self) -> dict[str, str]:
        if self.categories is None:
            if self.preset == "home":
                raise ValueError(
                    f"home needs a category for each task, such as categories={{{self.tasks_[0]!r}: 'watch'}}"
                )
            return dict.fromkeys(self.tasks_, "all tasks")
        if {*self.categories} != {*self.tasks_}:
            raise ValueError(
                f"categories are for {sorted(self.categories)}, labels for {sorted(self.tasks_)}; "
                "give every task exactly one category"
            )
        return {task: self.categories[task] for task in self.tasks_}

    def _build(self, categories: Mapping[str, str]) -> None:
        sizes = [len(vocabulary) for vocabulary in self._vocabularies.values()]
        dense = len(self._encoder.feature_names)
        self.model_ = _Network(
            sizes, self.embedding, dense, self.preset, categories, self.hidden, self.layout
        )
        self.num_parameters_ = sum(p.numel() for p in self.model_.parameters())
        self.expert_names_ = _expert_names(self.model_.mixture.layout[-1].bank_of)

    def _encode(self, frame: "pd.DataFrame") -> tuple[Tensor, Tensor]:
        check_columns(frame, [*self.ids, *self._features])
        columns = [v.encode(frame[name]) for name, v in self._vocabularies.items()]
        ids_TI = np.stack(columns, 1) if columns else np.zeros((len(frame), 0), np.int64)
        features = np.zeros((len(frame), 0), np.float32)
        if len(self._features):
            features = self._encoder.transform(frame[self._features])
        return torch.from_numpy(ids_TI), torch.from_numpy(features)

    @torch.no_grad()
    def _usage(self, ids_TI: Tensor, features_TD: Tensor) -> dict[str, npt.NDArray[np.float64]]:
        masses = [self.model_(*batch)[1][-1].weights_TGE.sum(0) for batch in _batches(ids_TI, features_TD)]
        shares_KE = (torch.stack(masses).sum(0) / len(ids_TI)).double().numpy()
        return dict(zip(self.tasks_, shares_KE, strict=True))


class _Network(nn.Module):
    """Embeddings of identifiers beside the features, then the mixture."""

    def __init__(
        self,
        sizes: Sequence[int],
        embedding: int,
        dense: int,
        preset: Preset,
        categories: Mapping[str, str],
        hidden: int,
        layout: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        # small, so that identifiers seen a few times hardly count
        self.embeddings = nn.ModuleList(
            nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
                0.05 * torch.randn(size, embedding), freeze=False
            )
            for size in sizes
        )
        dim = dense + embedding * len(sizes)
        self.mixture = MultiTaskMoE.from_preset(preset, dim, categories, hidden=hidden, **(layout or {}))

    def features(self, ids_TI: Tensor, features_TD: Tensor) -> Tensor:
        embedded = [table(ids_T) for table, ids_T in zip(self.embeddings, ids_TI.unbind(1), strict=True)]
        return torch.cat([*embedded, features_TD], 1)

    def forward(self, ids_TI: Tensor, features_TD: Tensor) -> tuple[Tensor, list[LevelOutput]]:
        output: tuple[Tensor, list[LevelOutput]] = self.mixture(self.features(ids_TI, features_TD))
        return output


def _batches(*columns: Tensor, rows: int = 4096) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(column, rows) for column in columns), strict=True))


def _expert_names(bank_of: Sequence[str]) -> list[str]:
    return [f"{bank} {bank_of[:place].count(bank) + 1}" for place, bank in enumerate(bank_of)]
