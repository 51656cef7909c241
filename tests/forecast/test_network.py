import pytest
import torch
from torch import nn

from coterie.forecast.backbone import tiny_backbone
from coterie.forecast.network import SMETimes, roll
from coterie.forecast.prompts import CacheMismatchError, PromptEncoder
from coterie.forecast.training import train


def small(**options):
    torch.manual_seed(0)
    return SMETimes(tiny_backbone(steps=1), seq_len=48, token_len=12, **options).eval()


@torch.no_grad()
def test_the_network_is_the_papers_steps_written_out():
    model, x = small(encoder="linear"), torch.randn(3, 48)
    prompts = torch.randn(3, 4, 64)
    model.fusion.fill_(0.7)
    y, _ = model(x, prompts)
    gate, bank = model.moe.router.score, model.moe.experts
    for b in range(3):
        mean, scale = x[b].mean(), (x[b].var(correction=0) + 1e-5).sqrt()
        alpha = torch.tensor(0.7).sigmoid()
        tokens = [
            alpha * model.encoder((x[b, 12 * n : 12 * n + 12] - mean) / scale) + (1 - alpha) * prompts[b, n]
            for n in range(4)
        ]
        for n, h in enumerate(model.backbone(torch.stack(tokens).unsqueeze(0))[0]):
            weights = (gate.weight @ h + gate.bias).softmax(0)
            mixed = sum(w * matrix @ h for w, matrix in zip(weights, bank.weight, strict=True))
            torch.testing.assert_close(y[b, 12 * n : 12 * n + 12], model.decoder(mixed) * scale + mean)


@torch.no_grad()
def test_a_prediction_never_sees_what_comes_after_its_patch():
    model, x = small(), torch.randn(2, 48)
    y, _ = model(x)
    changed = x.clone()
    changed[:, 36:] = x[:, 36:].flip(1)  # same mean and deviation of the window
    torch.testing.assert_close(model(changed)[0][:, :36], y[:, :36])
    assert not torch.allclose(model(changed)[0][:, 36:], y[:, 36:])


@torch.no_grad()
def test_forecasts_move_and_stretch_with_their_window():
    model, x = small(), torch.randn(2, 48)
    torch.testing.assert_close(model(5 * x + 7)[0], 5 * model(x)[0] + 7, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_constant_window_is_forecast_near_its_level():
    y, _ = small()(torch.full((1, 48), 3.0))
    assert (y - 3).abs().max() < 0.05


def test_a_gate_may_choose_some_experts_only():
    _, routing = small(num_experts=5, gate_top_k=2)(torch.randn(3, 48))
    assert routing.slots_per_token.tolist() == [2] * 12


@torch.no_grad()
def test_rolling_feeds_forecasts_back_and_cuts_off_at_the_end():
    model, x = small(), torch.randn(2, 48)
    first = model(x)[0][:, -12:]
    second = model(torch.cat([x[:, 12:], first], 1))[0][:, -12:]
    torch.testing.assert_close(roll(model, x, 17), torch.cat([first, second[:, :5]], 1))


@torch.no_grad()
def test_prompts_of_forecast_patches_are_written_from_forecasts_unless_an_oracle_is_asked_for():
    model, x, truth = small(), torch.randn(2, 48), torch.randn(2, 36)
    write, seen = PromptEncoder(model.backbone), []
    prompts = write(x.view(8, 12)).view(2, 4, -1)

    def prompt_of(patch, first):
        seen.append((first, patch))
        return write(patch)

    rolled = roll(model, x, 36, prompts_BND=prompts, prompt_of=prompt_of)
    assert [first for first, _ in seen] == [48, 60]
    torch.testing.assert_close(torch.cat([patch for _, patch in seen], 1), rolled[:, :24])
    seen.clear()
    oracle = roll(model, x, 36, prompts_BND=prompts, prompt_of=prompt_of, oracle_BH=truth)
    torch.testing.assert_close(torch.cat([patch for _, patch in seen], 1), truth[:, :24])
    torch.testing.assert_close(oracle[:, :12], rolled[:, :12])
    assert not torch.allclose(oracle[:, 12:], rolled[:, 12:])


def test_training_changes_everything_but_the_backbone_and_keeps_the_best_epoch():
    model, x = small(), torch.randn(64, 60)
    before, frozen = {n: t.clone() for n, t in model.trained().items()}, model.backbone.digest
    errors = iter([3.0, 1.0, 2.0, 4.0])
    states = []

    def validate():
        states.append({n: t.clone() for n, t in model.trained().items()})
        return next(errors)

    trained = train(
        model,
        lambda rows: (x[rows, :48], x[rows, 12:], torch.ones(len(rows), 4, 64)),
        64,
        epochs=9,
        batch_size=16,
        lr=1e-2,
        balance_coef=0.01,
        generator=torch.Generator().manual_seed(0),
        validate=validate,
        patience=2,
    )
    assert trained.validation == [3.0, 1.0, 2.0, 4.0]
    assert trained.best == 1
    assert trained.loss[-1] < trained.loss[0]
    del model.backbone._digest
    assert model.backbone.digest == frozen
    for name, tensor in model.trained().items():
        assert torch.equal(tensor, states[1][name])
        assert not torch.equal(tensor, before[name])


def test_balance_spreads_the_use_of_experts():
    busiest = {}
    for weight in (0.0, 1.0):
        model, x = small(), torch.randn(64, 60)
        nn.init.constant_(model.moe.router.score.bias, 0)
        model.moe.router.score.bias.data[0] = 3
        options = {"epochs": 20, "batch_size": 64, "lr": 1e-2, "generator": torch.Generator()}
        train(model, lambda rows, x=x: (x[rows, :48], x[rows, 12:], None), 64, balance_coef=weight, **options)
        _, routing = model(x[:, :48])
        busiest[weight] = (routing.importance / routing.importance.sum()).max().item()
    assert busiest[1.0] < busiest[0.0] - 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_len": 13}, "seq_len=48 is not a multiple of token_len=13; with that token_len use 52"),
        ({"num_experts": 0}, "num_experts=0; should be at least 1"),
        ({"gate_top_k": 5}, "top_k=5 but the router has 4 experts"),
        ({"encoder": "cnn"}, "encoder='cnn'"),
        ({"token_len": 0}, "token_len=0; should be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SMETimes(tiny_backbone(steps=1), **{"seq_len": 48, "token_len": 12, **options})


def test_prompts_of_another_backbone_and_other_windows_are_refused():
    with pytest.raises(CacheMismatchError, match=r"shape \(2, 4, 2048\); for backbone 'tiny'"):
        small()(torch.randn(2, 48), torch.randn(2, 4, 2048))
    with pytest.raises(ValueError, match=r"shape \(2, 60\); should be \[B, 48\]"):
        small()(torch.randn(2, 60))
