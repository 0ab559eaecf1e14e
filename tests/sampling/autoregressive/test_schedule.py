"""The staggered schedule: every chunk does all its steps, none runs ahead, given ones rest."""

import itertools

import numpy as np
import pytest

from jaxcomp.sampling.autoregressive.schedule import ChunkSchedule, check_schedule, staggered

GRID = [(n, s, g) for n, s, g in itertools.product((1, 4, 7), (0, 1, 3, 7), (1, 2, 4)) if s <= n]


@pytest.mark.parametrize("steps, stagger, chunks", GRID)
def test_every_chunk_does_all_steps_in_order_and_none_runs_ahead(steps, stagger, chunks):
    schedule = staggered(chunks, steps, stagger)
    check_schedule(schedule, chunks, steps)
    assert schedule.updates == chunks * steps
    done = np.zeros(chunks, int)
    for row in schedule.step:
        for g in range(1, chunks):
            if row[g] == 0:
                assert done[g - 1] >= min(stagger, steps)
        done += row >= 0
    np.testing.assert_array_equal(done, steps)
    np.testing.assert_array_equal(schedule.finished().max(), len(schedule.step))


def test_an_example_by_hand():
    expected = [[0, -1], [1, -1], [2, 0], [-1, 1], [-1, 2]]
    np.testing.assert_array_equal(staggered(2, 3, 2).step, expected)


def test_the_published_setting():
    """50 steps, a stagger of 5, five chunks: 70 rows with up to five chunks in flight."""
    schedule = staggered(5, 50, 5)
    assert len(schedule.step) == 70 and (schedule.step >= 0).sum(1).max() == 5


def test_given_chunks_rest():
    schedule = staggered(3, 4, 4, prefix=1)
    assert (schedule.step[:, 0] == -1).all() and schedule.finished()[0] == 0
    np.testing.assert_array_equal(schedule.step[:, 1:], staggered(2, 4, 4).step)


@pytest.mark.parametrize("arguments", [(2, 0, 0), (2, 4, 5), (2, 4, -1), (1, 4, 4, 1), (0, 4, 4)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        staggered(*arguments)


def test_a_schedule_for_something_else_is_refused():
    schedule = staggered(2, 4, 2)
    with pytest.raises(ValueError, match="2 chunks of 4; make it again"):
        check_schedule(schedule, 3, 4)
    with pytest.raises(ValueError, match="chunk 1 must do the steps"):
        check_schedule(ChunkSchedule(schedule.step[:-1], 4, 0), 2, 4)
