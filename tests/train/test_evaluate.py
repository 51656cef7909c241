import math

import pytest
import torch
from tiny import TinyMoE, tiny_data

from coterie.nn import Routing
from coterie.train import LossOutput, PeakMemory, evaluate, language_model_loss
from coterie.train.totals import Sums


def test_evaluation_does_not_depend_on_the_batch_size_and_counts_a_ragged_end() -> None:
    model, data = TinyMoE(), tiny_data(10)
    whole = evaluate(model, data, language_model_loss(), batch_size=10)
    parts = evaluate(model, data, language_model_loss(), batch_size=4)
    assert parts["cross_entropy"] == pytest.approx(whole["cross_entropy"], rel=1e-6)
    assert parts["imbalance"] == whole["imbalance"]
    assert parts["tokens"] == 80
    assert parts["bits_per_token"] == pytest.approx(parts["cross_entropy"] / math.log(2))


def test_evaluation_is_without_dropout_gradient_or_lasting_mode() -> None:
    model = TinyMoE(dropout=0.9).train()
    runs = [evaluate(model, tiny_data(4), language_model_loss(), batch_size=2) for _ in range(2)]
    assert runs[0] == runs[1]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    evaluate(model.eval(), tiny_data(4), language_model_loss(), batch_size=2)
    assert not model.training


def test_only_the_first_batches_are_read_when_asked() -> None:
    model, data = TinyMoE(), tiny_data(10)
    some = evaluate(model, data, language_model_loss(), batch_size=3, batches=2)
    assert some == evaluate(model, data[:6], language_model_loss(), batch_size=3)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 items, batch_size=2"):
        evaluate(TinyMoE(), [], language_model_loss(), batch_size=2)  # type: ignore[arg-type]


def test_sums_weigh_by_tokens_and_add_loads() -> None:
    def output(loss: float, tokens: int, scores: list[float]) -> LossOutput:
        routings = [Routing.dense(torch.tensor([scores])), Routing.dense(torch.rand(2, 3))]
        value = torch.tensor(loss)
        return LossOutput(value, value / 2, tokens, routings, {"double": 2 * value})

    sums = Sums()
    sums.add(output(1.0, 3, [0.5, 0.5]))
    sums.add(output(5.0, 1, [0.5, 0.5]))
    sums.add(output(math.nan, 100, [0.5, 0.5]), weight=0)
    totals = sums.totals(votes=[True, False])
    assert (totals.loss, totals.cross_entropy, totals.metrics) == (2.0, 1.0, {"double": 4.0})
    assert (totals.tokens, totals.votes) == (4, [1, 0])
    assert [load.tolist() for load in totals.loads] == [[2, 2], [4, 4, 4]]
    assert totals.imbalance == 1.0


def test_peak_memory_sees_what_was_freed_before_the_end() -> None:
    with PeakMemory("cpu") as small:
        pass
    with PeakMemory("cpu") as large:
        block = torch.ones(30_000_000)
        del block
    assert large.bytes > small.bytes or large.since_start
    if not large.since_start:
        assert 100e6 < large.bytes - small.bytes < 200e6
