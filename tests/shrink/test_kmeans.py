import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from coterie.shrink import kmeans
from coterie.shrink.kmeans import spherical_kmeans

seeds = st.integers(0, 1000)


def points(seed, n=12, width=4):
    g = torch.Generator().manual_seed(seed)
    lengths = 10 ** (2 * torch.rand(n, 1, generator=g) - 1)
    return lengths * F.normalize(torch.randn(n, width, generator=g), dim=1), torch.rand(n, generator=g)


def plain(points_NW, weights_N, first, iterations):
    """The algorithm point by point, in float64."""
    x, w = points_NW.double(), weights_N.double()
    unit = [v / v.norm() for v in x]
    centres = [unit[i] for i in first]

    def nearest():
        return [max(range(len(centres)), key=lambda c: float(u @ centres[c])) for u in unit]

    for _ in range(iterations):
        owner = nearest()
        for c in range(len(centres)):
            total = sum((w[n] * unit[n] for n in range(len(x)) if owner[n] == c), torch.zeros(x.shape[1]))
            if total.norm() > 0:
                centres[c] = total / total.norm()
    owner, made = nearest(), []
    for c, centre in enumerate(centres):
        mine = [n for n in range(len(x)) if owner[n] == c]
        weight = sum(float(w[n]) for n in mine)
        length = (
            sum(float(w[n] * x[n].norm()) for n in mine) / weight if weight else float(x[first[c]].norm())
        )
        made.append(centre * length)
    return torch.stack(made), owner


@given(seeds, st.integers(1, 8))
def test_it_is_what_the_loop_over_points_gives(seed, iterations):
    x, w = points(seed)
    centres, owner = spherical_kmeans(x, w, torch.tensor([0, 3, 5]), iterations=iterations)
    wanted, wanted_owner = plain(x, w, [0, 3, 5], iterations)
    assert owner.tolist() == wanted_owner
    torch.testing.assert_close(centres.double(), wanted.double(), rtol=1e-4, atol=1e-5)


@given(seeds)
def test_no_iteration_makes_points_less_like_their_centres(seed):
    x, w = points(seed, n=30)
    found = []
    for iterations in range(6):
        centres, owner = spherical_kmeans(x, w, torch.arange(5), iterations=iterations)
        cosine_N = (F.normalize(x, dim=1) * F.normalize(centres, dim=1)[owner]).sum(1)
        found.append(float((w * cosine_N).sum()))
    assert all(after >= before - 1e-4 for before, after in itertools.pairwise(found))


@given(seeds, st.floats(0.1, 10))
def test_a_longer_point_pulls_no_harder_and_weights_have_no_unit(seed, factor):
    x, w = points(seed)
    first = torch.arange(4)
    centres, owner = spherical_kmeans(x, w, first)
    scaled = x.clone()
    scaled[7] *= factor
    other, other_owner = spherical_kmeans(scaled, factor * w, first)
    assert torch.equal(owner, other_owner)
    torch.testing.assert_close(F.normalize(centres, dim=1), F.normalize(other, dim=1), rtol=1e-3, atol=1e-4)


def test_twins_share_a_centre_between_them_by_weight():
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [4.0, 0.0], [6.0, 0.0]])
    centres, owner = spherical_kmeans(x, torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([0, 1]))
    assert owner.tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(centres, torch.tensor([[4.5, 0.0], [0.0, 1.0]]))


def test_a_centre_without_points_or_whose_points_weigh_nothing_stays():
    x = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.1, 2.0]])
    centres, _ = spherical_kmeans(x, torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(centres, torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))


def test_as_many_centres_as_points_that_differ_are_the_points():
    x, w = points(3)
    centres, owner = spherical_kmeans(x, w, torch.arange(12))
    torch.testing.assert_close(centres, x)
    assert owner.tolist() == list(range(12))


def test_chunks_change_nothing(monkeypatch):
    x, w = points(1, n=50)
    whole = spherical_kmeans(x, w, torch.arange(6))
    monkeypatch.setattr(kmeans, "_CHUNK", 7)
    for ours, theirs in zip(spherical_kmeans(x, w, torch.arange(6)), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_clustered_in_float32(dtype):
    x, w = points(2)
    centres, _ = spherical_kmeans(x.to(dtype), w, torch.arange(4))
    wanted, _ = spherical_kmeans(x.to(dtype).float(), w, torch.arange(4))
    assert centres.dtype == torch.float32
    assert torch.equal(centres, wanted)
