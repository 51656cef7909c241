import subprocess
import sys

import pytest
import torch
from torch import nn

from coterie.train import train_epochs

X = torch.linspace(-1, 1, 12).unsqueeze(1)


def model_and_adam(lr: float = 0.05) -> tuple[nn.Linear, torch.optim.Adam]:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    return model, torch.optim.Adam(model.parameters(), lr=lr)


def error_of(model: nn.Module):
    def loss(rows):
        error = (model(X[rows]) - 3 * X[rows]).square().mean()
        return error + 1.0, error.double()

    return loss


def in_order(epoch: int) -> tuple[torch.Tensor, ...]:
    return torch.split(torch.arange(12), 5)


def test_it_is_the_plain_loop_bit_for_bit_and_shows_the_mean_over_rows():
    model, adam = model_and_adam()
    history = train_epochs(model, adam, in_order, error_of(model), epochs=3)
    plain, adam = model_and_adam()
    means = []
    for _ in range(3):
        total = 0.0
        for rows in in_order(0):
            error = (plain(X[rows]) - 3 * X[rows]).square().mean()
            adam.zero_grad()
            (error + 1.0).backward()
            adam.step()
            total += error.item() * len(rows)
        means.append(total / 12)
    assert history.loss == means
    assert torch.equal(model.weight, plain.weight)
    assert torch.equal(model.bias, plain.bias)
    assert (history.validation, history.best, model.training) == ([], 2, False)


def trained(errors, epochs=9, **options):
    """A history, the weight after each of its epochs, and the one that was left."""
    model, adam = model_and_adam()
    weights, given = [], iter(errors)

    def validate():
        assert not model.training
        weights.append(model.weight.item())
        return next(given)

    history = train_epochs(
        model, adam, in_order, error_of(model), epochs=epochs, validate=validate, **options
    )
    return history, weights, model.weight.item()


def test_the_best_epochs_weights_are_left_and_patience_counts_from_it():
    history, weights, left = trained([3.0, 1.0, 2.0, 1.0, 0.5], patience=2)
    assert history.validation == [3.0, 1.0, 2.0, 1.0]  # an equal error is not better
    assert history.best == 1
    assert left == weights[1] != weights[3]
    history, weights, left = trained([3.0, 1.0, 2.0], epochs=3)
    assert len(history.loss) == 3
    assert left == weights[1]


def test_an_error_that_is_smaller_by_too_little_is_not_better():
    history, weights, left = trained([1.0, 0.95, 0.8, 0.75], epochs=4, min_delta=0.1)
    assert history.best == 2
    assert left == weights[2]


def test_epochs_of_infinite_error_are_no_candidates_and_do_not_use_up_patience():
    infinite = float("inf")
    history, weights, left = trained([infinite] * 4 + [2.0, 3.0], patience=1)
    assert (history.best, len(history.loss)) == (4, 6)
    assert left == weights[4]
    history, weights, left = trained([infinite, float("nan")], epochs=2, patience=1)
    assert history.best == 1  # none was a candidate: the last is kept
    assert left == weights[1]


def test_what_is_frozen_is_neither_learned_nor_copied_and_buffers_are_kept():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(1, 1).requires_grad_(False)
            self.head = nn.Linear(1, 1)
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x):
            self.steps += int(self.training)
            return self.head(self.frozen(x))

    model = Counting()
    before = {name: tensor.clone() for name, tensor in model.frozen.state_dict().items()}
    adam = torch.optim.Adam(model.head.parameters(), lr=0.1)
    errors = iter([1.0, 2.0])

    def validate():
        model.frozen.bias += 1  # someone else's business: it does not come back with the best epoch
        return next(errors)

    train_epochs(model, adam, in_order, error_of(model), epochs=2, validate=torch.no_grad()(validate))
    assert int(model.steps) == 3
    assert torch.equal(model.frozen.weight, before["weight"])
    assert torch.equal(model.frozen.bias, before["bias"] + 2)


def test_the_schedule_moves_after_every_step_and_batches_know_their_epoch():
    model, adam = model_and_adam()
    rates, epochs = [], []

    def batches(epoch):
        epochs.append(epoch)
        return in_order(epoch)

    def loss(rows):
        rates.append(adam.param_groups[0]["lr"])
        return error_of(model)(rows)

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 / (1 + step))
    train_epochs(model, adam, batches, loss, epochs=2, schedule=schedule)
    assert rates == [0.05 * (1 / (1 + step)) for step in range(6)]
    assert epochs == [0, 1]


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    model, adam = model_and_adam(lr=0.25)
    before = model.weight.clone()

    def loss(rows):
        error = model(X[rows]).mean() * float("nan")
        return error, error

    with pytest.raises(ValueError, match=r"epoch 1: the loss became nan; use a smaller lr than 0\.25"):
        train_epochs(model, adam, in_order, loss, epochs=1)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 2, "patience": 0}])
def test_epochs_and_patience_below_one_are_refused(options):
    model, adam = model_and_adam()
    with pytest.raises(ValueError, match="should be at least 1"):
        train_epochs(model, adam, in_order, error_of(model), **options)


def test_no_random_number_is_drawn():
    model, adam = model_and_adam()
    before = torch.get_rng_state()
    train_epochs(model, adam, in_order, error_of(model), epochs=2)
    assert torch.equal(before, torch.get_rng_state())


def test_an_estimator_that_trains_needs_neither_accelerate_nor_rich():
    code = "import sys, coterie.train; sys.exit('accelerate' in sys.modules or 'rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
