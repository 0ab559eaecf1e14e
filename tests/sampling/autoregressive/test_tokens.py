"""The capacity ladder takes the smallest capacity that holds what every sample wants, and computes exactly that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.sampling.autoregressive.tokens import ALL_OR_NONE, Ladder, Wanted, check_ladder, compute_tokens, ladder

LENGTH = 8
H = jax.random.normal(jax.random.key(0), (2, LENGTH, 3))
LADDER = Ladder((2, 5))


def trunk(h, cache, index):
    """Squares; the cache holds how often each token ran."""
    del index
    return h**2, cache + 1.0


@jax.jit
def run(need, rank):
    done = compute_tokens(trunk, H, jnp.zeros(()), Wanted(need, rank), LADDER)
    return done.h, done.mask, done.tokens, done.cache


def wanted(*rows):
    need = np.zeros((2, LENGTH), bool)
    for row, tokens in enumerate(rows):
        need[row, list(tokens)] = True
    return jnp.asarray(need)


RANK = jnp.tile(jnp.arange(LENGTH, dtype=jnp.float32), (2, 1))


@pytest.mark.parametrize(
    "rows, capacity",
    [
        (((), ()), 0),
        (((3,), ()), 2),
        (((0, 1), (4, 5)), 2),
        (((0, 1, 2), (4,)), 5),
        ((range(6), ()), 8),
        ((range(8), ()), 8),
    ],
)
def test_the_smallest_capacity_that_holds_all_samples(rows, capacity):
    need = wanted(*rows)
    h, mask, tokens, runs = run(need, RANK)
    assert tokens == capacity and int(runs) == int(capacity > 0)
    np.testing.assert_array_equal(mask.sum(1), capacity)
    assert bool((mask | ~need).all())
    np.testing.assert_array_equal(h, jnp.where(mask[..., None], H**2, H))


def test_places_left_over_go_to_the_highest_ranks():
    _, mask, _, _ = run(wanted((0,), ()), RANK)
    np.testing.assert_array_equal(mask, wanted((0, 7), (6, 7)))


def test_deferring_takes_the_largest_capacity_and_the_highest_ranks():
    run = jax.jit(lambda need: compute_tokens(trunk, H, 0.0, Wanted(need, RANK), Ladder((2,), defer=True)))
    done = run(wanted((0, 2, 5), (1,)))
    assert done.tokens == 2
    np.testing.assert_array_equal(done.mask, wanted((2, 5), (1, 7)))
    assert run(wanted(range(8), range(8))).tokens == 8


def test_only_the_taken_branch_is_in_the_way():
    """The choice is a conditional of the program, not a selection among all results."""
    text = run.lower(wanted((), ()), RANK).as_text()
    assert "stablehlo.case" in text


def test_shares_become_capacities():
    assert ladder(8, (0.5, 0.25, 0.5)) == Ladder((2, 4))
    assert ladder(8, ()) == ALL_OR_NONE


@pytest.mark.parametrize("shares", [(0.0,), (1.0,), (0.01,), (1.5,)])
def test_a_capacity_of_zero_or_all_is_refused(shares):
    with pytest.raises(ValueError, match="at least 1 token and fewer than all"):
        ladder(8, shares)


@pytest.mark.parametrize("wrong", [Ladder((0, 2)), Ladder((4, 2)), Ladder((8,)), Ladder((), defer=True)])
def test_wrong_ladders_are_refused(wrong):
    with pytest.raises(ValueError, match=r"capacities must rise|nothing can be deferred"):
        check_ladder(wrong, 8)
