import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.data import attack_tokens, corrupt_images


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_an_attack_swaps_about_its_share_of_the_tokens_and_leaves_the_others():
    ids = torch.arange(40_000).view(100, 400) % 50
    before = ids.clone()
    attacked = attack_tokens(ids, 0.1, 50, rng())
    assert torch.equal(ids, before)
    swapped = attacked == 50
    assert swapped.double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(attacked[~swapped], ids[~swapped])
    assert swapped.any(0).all()
    assert swapped.any(1).all()


def test_an_attack_of_nothing_changes_nothing_and_repeats_by_seed():
    ids = torch.randint(50, (10, 20))
    assert torch.equal(attack_tokens(ids, 0.0, 50), ids)
    assert torch.equal(attack_tokens(ids, 0.5, 50, rng(1)), attack_tokens(ids, 0.5, 50, rng(1)))
    assert not torch.equal(attack_tokens(ids, 0.5, 50, rng(1)), attack_tokens(ids, 0.5, 50, rng(2)))


@given(kind=st.sampled_from(["gaussian", "impulse", "contrast"]), level=st.floats(0, 1))
def test_corrupted_images_stay_images(kind, level):
    images = torch.rand(20, 8, 8, generator=rng())
    before = images.clone()
    corrupted = corrupt_images(images, kind, level, rng(1))
    assert torch.equal(images, before)
    assert corrupted.shape == images.shape
    assert 0 <= float(corrupted.min()) <= float(corrupted.max()) <= 1
    assert torch.equal(corrupted, corrupt_images(images, kind, level, rng(1)))
    torch.testing.assert_close(corrupt_images(images, kind, 0.0, rng(1)), images)


def test_each_kind_does_what_its_level_says():
    grey = torch.full((500, 8, 8), 0.5)
    noise = corrupt_images(grey, "gaussian", 0.05, rng()) - 0.5
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(noise.mean().item()) < 1e-3
    impulse = corrupt_images(grey, "impulse", 0.2, rng())
    assert (impulse == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (impulse == 1).double().mean().item() == pytest.approx(0.1, abs=0.01)
    image = torch.rand(8, 8)
    assert corrupt_images(image, "contrast", 0.75).std().item() == pytest.approx(image.std().item() / 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attack_tokens(torch.zeros(3), 1.1, 0), "rate=1.1; should lie in 0 ≤ rate ≤ 1"),
        (lambda: attack_tokens(torch.zeros(3), -0.1, 0), "rate=-0.1"),
        (lambda: corrupt_images(torch.zeros(3), "blur", 0.1), "use one of gaussian, impulse, contrast"),
        (lambda: corrupt_images(torch.zeros(3), "impulse", 1.1), "0 ≤ level ≤ 1"),
        (lambda: corrupt_images(torch.zeros(3), "gaussian", -0.1), "level=-0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
