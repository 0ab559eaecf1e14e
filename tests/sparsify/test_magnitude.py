"""Magnitude group masks against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.transform import compress
from jaxcomp.sparsify import keep_largest, magnitude

W = np.asarray(jax.random.normal(jax.random.key(0), (64, 24)))


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_keeps_the_largest_groups_of_every_row(density, group):
    out, _, _ = compress(magnitude(density, group), {"kernel": jnp.asarray(W)})
    norms = np.linalg.norm(W.T.reshape(24, -1, group), axis=-1)
    kept = max(1, round(density * 64 / group))
    keep = np.zeros_like(norms, bool)
    np.put_along_axis(keep, np.argsort(-norms, 1, kind="stable")[:, :kept], True, 1)
    want = np.where(np.repeat(keep, group, 1), W.T, 0).T
    np.testing.assert_array_equal(out["kernel"].materialise(), want)


def test_ties_go_to_the_lower_index():
    assert keep_largest(jnp.ones((1, 4)), 0.5).tolist() == [[True, True, False, False]]


def test_error_falls_with_group_size_and_density():
    def error(density, group):
        out, _, _ = compress(magnitude(density, group), {"kernel": jnp.asarray(W)})
        return float(((out["kernel"].materialise() - W) ** 2).sum())

    assert error(0.5, 1) < error(0.5, 4) < error(0.5, 16)
    assert error(0.75, 4) < error(0.5, 4) < error(0.25, 4)


def test_group_must_divide():
    with pytest.raises(ValueError, match="kernel: in_dim 64 is not divisible by group_size 24"):
        compress(magnitude(0.5, 24), {"kernel": jnp.asarray(W)})
