from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from coterie.data import ShuffledBatches


@given(items=st.integers(1, 60), batch=st.integers(1, 60), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_sees_every_item_at_most_once_and_drops_less_than_a_batch(
    items: int, batch: int, seed: int, epoch: int
) -> None:
    if batch > items:
        with pytest.raises(ValueError, match=f"{items} items do not fill one batch of {batch}"):
            ShuffledBatches(items, batch, seed)
        return
    batches = ShuffledBatches(items, batch, seed)
    steps = batches.steps_per_epoch
    seen = [i for step in range(epoch * steps, (epoch + 1) * steps) for i in batches.at(step)[0]]
    assert len(set(seen)) == len(seen) == steps * batch > items - batch
    assert set(seen) <= set(range(items))


@given(world=st.integers(1, 4), accumulate=st.integers(1, 4), each=st.integers(1, 3), step=st.integers(0, 12))
def test_the_batches_of_all_processes_join_to_those_of_one(
    world: int, accumulate: int, each: int, step: int
) -> None:
    size = world * accumulate * each
    one = ShuffledBatches(4 * size + 1, size, seed=3, accumulate=accumulate)
    ranks = [
        ShuffledBatches(4 * size + 1, size, seed=3, rank=rank, world=world, accumulate=accumulate)
        for rank in range(world)
    ]
    for micro, whole in enumerate(one.at(step)):
        assert [i for rank in ranks for i in rank.at(step)[micro]] == whole
    [whole] = ShuffledBatches(4 * size + 1, size, seed=3).at(step)
    assert [i for part in one.at(step) for i in part] == whole


@given(start=st.integers(0, 30))
def test_starting_late_gives_what_an_unbroken_run_sees(start: int) -> None:
    unbroken = islice(ShuffledBatches(10, 4, seed=1, accumulate=2), 2 * start, 2 * start + 8)
    assert list(unbroken) == list(islice(ShuffledBatches(10, 4, seed=1, accumulate=2, start_step=start), 8))


def test_seeds_and_epochs_differ() -> None:
    orders = [ShuffledBatches(50, 50, seed).at(epoch)[0] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_data_loader_takes_it_as_batch_sampler() -> None:
    data = torch.arange(10) * 10
    loader = DataLoader(data, batch_sampler=ShuffledBatches(10, 5, seed=0))  # type: ignore[arg-type]
    first, second = islice(loader, 2)
    assert sorted([*first.tolist(), *second.tolist()]) == data.tolist()


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=6 cannot be shared by 2 processes × 2 micro-batches"):
        ShuffledBatches(10, 6, world=2, accumulate=2)
    with pytest.raises(ValueError, match="rank=2 of 2"):
        ShuffledBatches(10, 6, rank=2, world=2)
