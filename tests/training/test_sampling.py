"""The same comparisons in every optimizer step, whatever the number of ranks, and even micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.training.sampling import StepSampler, length_grouped_order, random_order, sequential_order


def even_load(loads, batch_size, batches_per_step, seed, **options):
    return StepSampler(random_order(len(loads), seed), len(loads), batch_size, batches_per_step, loads=loads, **options)


def steps(sampler):
    order = list(sampler)
    return [order[i : i + sampler.step] for i in range(0, len(order), sampler.step)]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=80), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_every_comparison_once_an_epoch_and_the_same_ones_in_every_step(loads, batch, batches, epoch):
    samplers = even_load(loads, batch, batches, seed=7), even_load([1] * len(loads), batch, batches, seed=7)
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert sorted(i for i in sampler if i != sampler.filler) == list(range(len(loads)))
        assert len(list(sampler)) == len(sampler) and len(sampler) % (batch * batches) == 0
        assert list(sampler) == list(sampler)
    assert [sorted(step) for step in steps(samplers[0])] == [sorted(step) for step in steps(samplers[1])]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_every_order_keeps_what_it_should_and_fills_up_the_last_step_alone(count, batch, batches, drop_last):
    lengths = [(7 * i) % 50 + 1 for i in range(count)]
    kept = count // batch * batch if drop_last else count
    for order in (
        random_order(count, 3),
        sequential_order(count),
        length_grouped_order(lengths, batch * batches, 3),
    ):
        sampler = StepSampler(order, count, batch, batches, drop_last=drop_last)
        laid_out = steps(sampler)
        seen = [i for step in laid_out for i in step if i != sampler.filler]
        assert len(seen) == len(set(seen)) == kept
        assert all(sampler.filler not in step for step in laid_out[:-1])


def test_ranks_and_accumulated_batches_are_interchangeable():
    """Two ranks, or one process accumulating two batches: the micro-batches are the same."""
    loads = [(7 * i) % 50 + 1 for i in range(64)]
    assert list(even_load(loads, 4, 2, seed=0)) == list(even_load(loads, 4, 2 * 1, seed=0))


@given(st.lists(st.integers(100, 1000), min_size=32, max_size=32))
def test_loads_are_near_equal(loads):
    order = list(even_load(loads, 8, 4, seed=0))
    totals = [sum(loads[i] for i in order[b : b + 8]) for b in range(0, 32, 8)]
    assert max(totals) - min(totals) <= max(loads)


def test_grouping_by_length_puts_like_lengths_into_a_micro_batch():
    lengths = [(37 * i) % 101 + 1 for i in range(64)]
    grouped, mixed = (
        StepSampler(order, 64, 4, 2) for order in (length_grouped_order(lengths, 8, 0), random_order(64, 0))
    )

    def spread(sampler):
        order = list(sampler)
        batches = [[lengths[i] for i in order[b : b + 4]] for b in range(0, 64, 4)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(grouped) < spread(mixed) / 3


@pytest.mark.parametrize(
    "order", [random_order(50, 0), length_grouped_order(list(range(1, 51)), 10, 0)], ids=["random", "group_by_length"]
)
def test_epochs_differ(order):
    sampler = StepSampler(order, 50, 5, 2)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
