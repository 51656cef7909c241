"""AW-MoE as an estimator: a log of who met what when, and how it went."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.data import Events, TableEncoder, Vocabulary, check_columns, histories, import_pandas
from coterie.data.tables import as_texts
from coterie.models import load_estimator, save_estimator
from coterie.models.estimator import BaseEstimator, check_above, check_at_least
from coterie.recsys.aw_moe import AWMoE, GateKind, ranking_loss
from coterie.recsys.training import train_on_rows

if TYPE_CHECKING:
    import pandas as pd


class AWMoERanker(BaseEstimator):  # type: ignore[misc]
    """Ranks items for a user by what the user liked before: experts, weighted by a vote of the history.

    It reads a log with a user, an item, a time and an outcome in each row. A row's history is what its user
    had a positive outcome with at an earlier time; nothing from its own time or later is looked at.

    Args:
        user: the log's column of users.
        item: its column of items.
        time: its column of times, which are numbers.
        target: its column of outcomes.
        threshold: outcomes of at least this are positive: 4 for ratings up to 5, 1 for clicks.
        history: the latest positive items that are read.
        n_experts: K.
        item_dim: width of an item's vector.
        expert_hidden: hidden width of an expert.
        gate: "attention" for AW-MoE, "softmax" for the usual mixture, "one expert" for a DIN.
        length_norm: divide the votes by √(number of items in the history).
        embedding: width of an item's embedding; 0 to know items by their features only.
        min_count: items with fewer rows share the embedding that unknown ones get.
        contrastive: weight of the contrastive loss on the gate. Small values, or 0: it pulls apart users.
        mask_prob: share of the history that the contrastive loss leaves out.
        temperature: of the contrastive loss.
        epochs: passes over the rows.
        batch_size: rows of a step.
        lr: Adam's learning rate.
        random_state: seed; torch's global generator is left alone.

    After `fit`: `loss_curve_`, mean loss of each epoch; `num_parameters_`; `expert_usage_`, share of the
    gate's weight, signs dropped, that each expert gets on the training rows.

    >>> pd = import_pandas()
    >>> log = pd.DataFrame({"user_id": [1, 1, 1, 2, 2] * 8, "item_id": range(40), "timestamp": range(40)})
    >>> log["rating"] = log["item_id"] % 5 + 1
    >>> ranker = AWMoERanker(epochs=1, min_count=1).fit(log)
    >>> items, scores = ranker.rank([3, 4], candidates=[7, 8, 9])
    >>> sorted(items), bool((scores[:-1] >= scores[1:]).all())
    ([7, 8, 9], True)
    """

    def __init__(
        self,
        *,
        user: str = "user_id",
        item: str = "item_id",
        time: str = "timestamp",
        target: str = "rating",
        threshold: float = 4.0,
        history: int = 20,
        n_experts: int = 4,
        item_dim: int = 16,
        expert_hidden: int = 32,
        gate: GateKind = "attention",
        length_norm: bool = True,
        embedding: int = 8,
        min_count: int = 5,
        contrastive: float = 0.0,
        mask_prob: float = 0.5,
        temperature: float = 1.0,
        epochs: int = 6,
        batch_size: int = 512,
        lr: float = 3e-3,
        random_state: int = 0,
    ) -> None:
        self.user, self.item, self.time, self.target = user, item, time, target
        self.threshold, self.history = threshold, history
        self.n_experts, self.item_dim, self.expert_hidden = n_experts, item_dim, expert_hidden
        self.gate, self.length_norm, self.embedding, self.min_count = gate, length_norm, embedding, min_count
        self.contrastive, self.mask_prob, self.temperature = contrastive, mask_prob, temperature
        self.epochs, self.batch_size, self.lr, self.random_state = epochs, batch_size, lr, random_state

    def fit(self, log: "pd.DataFrame", items: "pd.DataFrame | None" = None) -> "AWMoERanker":
        """Learns from a log.

        Args:
            log: with the four columns.
            items: a row per item: its identifier and features, numbers or texts; None for identifiers only.

        Raises:
            ValueError: an argument out of range, a column that is missing, an outcome or time that is no
                number, an item twice in `items`, outcomes that are all positive or all not.
        """
        check_at_least(self, 1, "min_count", "epochs", "batch_size")
        check_above(self, 0, "lr")
        check_columns(log, [self.user, self.item, self.time, self.target], "the log")
        label = self._labels(log)
        if label.all() or not label.any():
            raise ValueError(
                f"all {len(log)} outcomes are {'' if label.any() else 'not '}positive "
                f"({self.target!r} ≥ {self.threshold:g}); use another threshold"
            )
        self._vocabulary = Vocabulary(min_count=self.min_count).fit(log[self.item])
        features = self._item_features(items)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            self._build(features)
        self._past = self._behaviours(log)
        history_BM, target_B = self._encode(log, self._past)
        users_B = torch.from_numpy(np.unique(self._past_users(log), return_inverse=True)[1])
        generator = torch.Generator().manual_seed(self.random_state)
        self.loss_curve_ = train_on_rows(
            self.model_,
            [history_BM, target_B, torch.from_numpy(label.astype(np.float32)), users_B],
            lambda batch: ranking_loss(
                self.model_,
                *batch,
                contrastive=self.contrastive,
                mask_prob=self.mask_prob,
                temperature=self.temperature,
                generator=generator,
            ),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.random_state,
        )
        weight_BK = self._run(history_BM, target_B)[1].abs()
        self.expert_usage_ = (weight_BK.sum(0) / weight_BK.sum()).double().numpy()
        return self

    def predict_proba(self, rows: "pd.DataFrame", since: "pd.DataFrame | None" = None) -> npt.NDArray[Any]:
        """Probability [rows] that the outcome is positive.

        Args:
            rows: user, item and time of each.
            since: what was logged after `fit`, for the histories; of each row, only what is earlier counts.
                Rows that were fitted on may be in it again.
        """
        logits_B, _ = self._run(*self.encode(rows, since))
        probability: npt.NDArray[Any] = logits_B.sigmoid().numpy()
        return probability

    def gate_weights(self, rows: "pd.DataFrame", since: "pd.DataFrame | None" = None) -> npt.NDArray[Any]:
        """Weights of the experts [rows, K], of any sign, for rows as `predict_proba` takes them."""
        weights: npt.NDArray[Any] = self._run(*self.encode(rows, since))[1].numpy()
        return weights

    def rank(
        self, user_history: Sequence[Any], candidates: Sequence[Any]
    ) -> tuple[list[Any], npt.NDArray[Any]]:
        """Candidates from best to worst, with their scores (logits).

        Args:
            user_history: items the user liked, the latest last; unknown ones are left out.
            candidates: items to rank.
        """
        pd = import_pandas()
        liked = self._vocabulary.encode(pd.Series(list(user_history), dtype=object))
        liked = liked[liked > 0][-self.history :]
        history_M = np.concatenate([np.zeros(self.history - len(liked), np.int64), liked])
        target_B = torch.from_numpy(self._vocabulary.encode(pd.Series(list(candidates), dtype=object)))
        history_BM = torch.from_numpy(history_M).repeat(len(target_B), 1)
        history_BM[history_BM == target_B.unsqueeze(1)] = 0
        scores = self._run(history_BM, target_B)[0].numpy()
        order = np.argsort(-scores, kind="stable")
        return [candidates[place] for place in order], scores[order]

    def encode(self, rows: "pd.DataFrame", since: "pd.DataFrame | None" = None) -> tuple[Tensor, Tensor]:
        """Numbers of items: the history [rows, M] before each row, and the row's own [rows]."""
        check_columns(rows, [self.user, self.item, self.time], "the rows")
        past = self._past
        if since is not None:
            check_columns(since, [self.user, self.item, self.time, self.target], "since")
            both = [import_pandas().DataFrame(e._asdict()) for e in (past, self._behaviours(since))]
            # a row of the log that was fitted on may be given once more; it happened once
            once = import_pandas().concat(both).drop_duplicates()
            past = Events(*(once[name].to_numpy() for name in Events._fields))
        return self._encode(rows, past)

    def save(self, folder: str | Path) -> Path:
        """Writes a folder without pickle, which `load` reads: the log's positive rows are part of it."""
        return save_estimator(
            folder,
            "AWMoERanker",
            parameters=self.get_params(),
            learnt={
                "items": self._vocabulary.values,
                "users": [str(user) for user in np.asarray(self._past.users)],
                "loss_curve": self.loss_curve_,
                "usage": self.expert_usage_.tolist(),
            },
            tensors={
                **{f"model.{name}": tensor for name, tensor in self.model_.state_dict().items()},
                "past.items": torch.tensor(self._past.items),
                "past.times": torch.tensor(self._past.times),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "AWMoERanker":
        """The ranker that `save` wrote. ValueError for another folder."""
        parameters, learnt, tensors = load_estimator(folder, "AWMoERanker")
        ranker = cls(**parameters)
        ranker._vocabulary = Vocabulary(min_count=ranker.min_count)
        ranker._vocabulary.values = learnt["items"]
        ranker.loss_curve_, ranker.expert_usage_ = learnt["loss_curve"], np.array(learnt["usage"])
        users = np.array(learnt["users"], dtype=str)
        ranker._past = Events(users, tensors.pop("past.items").numpy(), tensors.pop("past.times").numpy())
        with torch.random.fork_rng(devices=[]):
            ranker._build(tensors["model.item_features"])
        ranker.model_.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
        ranker.model_.eval()
        return ranker

    def _build(self, item_features: Tensor) -> None:
        self.model_ = AWMoE(
            item_features,
            embedding=self.embedding,
            n_experts=self.n_experts,
            item_dim=self.item_dim,
            expert_hidden=self.expert_hidden,
            gate=self.gate,
            length_norm=self.length_norm,
        )
        self.num_parameters_ = sum(p.numel() for p in self.model_.parameters())

    def _item_features(self, items: "pd.DataFrame | None") -> Tensor:
        if items is None:
            return torch.zeros(len(self._vocabulary), 0)
        check_columns(items, [self.item], "items")
        twice = items[self.item][items[self.item].duplicated()]
        if len(twice):
            raise ValueError(f"item {twice.tolist()[0]!r} is in items twice; give one row for each")
        columns = items.columns.drop(self.item)
        encoded = TableEncoder().fit(items[columns]).transform(items[columns])
        features = torch.zeros(len(self._vocabulary), encoded.shape[1])
        numbers = self._vocabulary.encode(items[self.item])
        features[torch.from_numpy(numbers)] = torch.from_numpy(encoded)
        features[0] = 0  # items that the log does not know have written here
        return features

    def _labels(self, log: "pd.DataFrame") -> npt.NDArray[np.bool_]:
        outcome = _numbers(log, self.target)
        positive: npt.NDArray[np.bool_] = outcome >= self.threshold
        return positive

    def _behaviours(self, log: "pd.DataFrame") -> Events:
        positive = self._labels(log)
        items, times = self._vocabulary.encode(log[self.item]), _numbers(log, self.time)
        return Events(self._past_users(log)[positive], items[positive], times[positive])

    def _past_users(self, rows: "pd.DataFrame") -> npt.NDArray[np.str_]:
        return np.array(as_texts(rows[self.user]).to_numpy(), dtype=str)

    def _encode(self, rows: "pd.DataFrame", past: Events) -> tuple[Tensor, Tensor]:
        items = self._vocabulary.encode(rows[self.item])
        shown = Events(self._past_users(rows), items, _numbers(rows, self.time))
        return torch.from_numpy(histories(shown, past, self.history)), torch.from_numpy(items)

    @torch.no_grad()
    def _run(self, history_BM: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(torch.split(history_BM, 4096), torch.split(target_B, 4096), strict=True)
        outputs = [self.model_(*pair) for pair in pairs]
        return torch.cat([o.logits for o in outputs]), torch.cat([o.gate for o in outputs])


def _numbers(frame: "pd.DataFrame", name: str) -> npt.NDArray[np.float64]:
    column = import_pandas().to_numeric(frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = ~np.isfinite(column)
    if wrong.any():
        row = int(wrong.argmax())
        found = frame[name].tolist()[row]
        raise ValueError(f"column {name!r}, row {frame.index[row]}: {found!r}; should be a finite number")
    return np.asarray(column)
