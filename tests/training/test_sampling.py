"""Even micro-batches: the same pairs in every optimizer step, whatever the number of ranks, and near-equal loads."""

from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.training.sampling import EvenLoadSampler


def steps(sampler):
    order = list(sampler)
    size = sampler.batch_size * sampler.batches_per_step
    return [order[i : i + size] for i in range(0, len(order), size)]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=80), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_every_comparison_once_an_epoch_and_the_same_ones_in_every_step(loads, batch, batches, epoch):
    samplers = EvenLoadSampler(loads, batch, batches, seed=7), EvenLoadSampler([1] * len(loads), batch, batches, seed=7)
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert sorted(i for i in sampler if i != sampler.filler) == list(range(len(loads)))
        assert len(list(sampler)) == len(sampler) and len(sampler) % (batch * batches) == 0
        assert list(sampler) == list(sampler)
    assert [sorted(step) for step in steps(samplers[0])] == [sorted(step) for step in steps(samplers[1])]


def test_ranks_and_accumulated_batches_are_interchangeable():
    """Two ranks, or one process accumulating two batches: the micro-batches are the same."""
    loads = [(7 * i) % 50 + 1 for i in range(64)]
    assert list(EvenLoadSampler(loads, 4, 2, seed=0)) == list(EvenLoadSampler(loads, 4, 2 * 1, seed=0))


@given(st.lists(st.integers(100, 1000), min_size=32, max_size=32))
def test_loads_are_near_equal(loads):
    sampler = EvenLoadSampler(loads, 8, 4, seed=0)
    order = list(sampler)
    totals = [sum(loads[i] for i in order[b : b + 8]) for b in range(0, 32, 8)]
    assert max(totals) - min(totals) <= max(loads)


def test_epochs_differ():
    sampler = EvenLoadSampler([1] * 50, 5, 2, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
