"""Soft filter pruning: which filters go, that they may come back, and that removal keeps the function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.core.transform import chain, compress, wrap_optax
from jaxcomp.io.super_resolution import param_shapes
from jaxcomp.models.rlfn import RLFN, rlfn_ntire
from jaxcomp.sparsify.filters import Space, channel_norms, remove_zero_filters, rlfn_spaces, soft_filter_pruning

MODEL = RLFN(channels=8, mid=6, num_blocks=2, esa_features=4, data_range=1.0)
SPACES = rlfn_spaces(2)
X = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, 17, 16, 3)), jnp.float32)


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), param_shapes(model))


PARAMS = random_params(MODEL)
PRUNED, _, _ = compress(soft_filter_pruning(SPACES, 0.25), PARAMS)


def test_the_filters_of_smallest_norm_are_zeroed_in_every_space():
    fuse, esa = PARAMS["blocks_0"]["fuse"], PARAMS["blocks_0"]["esa"]
    after = PARAMS["blocks_1"]
    written = [fuse["kernel"], fuse["bias"], after["conv_2"]["kernel"], after["conv_2"]["bias"]]
    scaled = [esa["expand"]["kernel"], esa["expand"]["bias"]]
    read = [esa["reduce"]["kernel"], after["conv_0"]["kernel"], after["fuse"]["kernel"]]
    slices = [np.moveaxis(np.asarray(x), -1, 0) for x in written + scaled] + [np.moveaxis(x, -2, 0) for x in read]
    norms = sum(np.sqrt((x.reshape(8, -1) ** 2).sum(1)) for x in slices)
    np.testing.assert_allclose(channel_norms(PARAMS, SPACES[1]), norms, rtol=1e-5)
    gone = np.argsort(norms)[:2]
    kept = np.setdiff1d(np.arange(8), gone)
    for name in ("kernel", "bias"):
        before, now = fuse[name], PRUNED["blocks_0"]["fuse"][name]
        assert not np.any(now[..., gone])
        np.testing.assert_array_equal(now[..., kept], before[..., kept])
    np.testing.assert_array_equal(PRUNED["blocks_0"]["esa"]["reduce"]["kernel"], esa["reduce"]["kernel"])


def test_removal_keeps_the_function_in_the_smaller_network():
    small, _, _ = compress(chain(soft_filter_pruning(SPACES, 0.25), remove_zero_filters(SPACES)), PARAMS)
    model = RLFN(channels=6, mid=6, num_blocks=2, esa_features=4, data_range=1.0)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, param_shapes(model))
    zeroed = MODEL.apply({"params": PRUNED}, X)
    assert np.ptp(zeroed) > 1
    np.testing.assert_allclose(model.apply({"params": small}, X), zeroed, atol=1e-5 * np.ptp(zeroed))
    assert np.abs(MODEL.apply({"params": PARAMS}, X) - zeroed).max() > 0.1


def test_removal_without_zero_filters_changes_nothing():
    same, _, _ = compress(remove_zero_filters(SPACES), PARAMS)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, PARAMS))


def test_48_channels_become_the_network_of_the_challenge():
    params = random_params(RLFN(48, 48, 4))
    spaces = rlfn_spaces(4)
    small, _, _ = compress(chain(soft_filter_pruning(spaces, 2 / 48), remove_zero_filters(spaces)), params)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, param_shapes(rlfn_ntire()))


def test_zeroed_filters_train_on_between_two_projections():
    optimizer = wrap_optax(optax.sgd(1e-3), soft_filter_pruning(SPACES, 0.25), every=2)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(MODEL.apply({"params": p}, X) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state, zeros = PARAMS, optimizer.init(PARAMS), []
    for _ in range(4):
        params, state = step(params, state)
        filters = np.asarray(params["blocks_0"]["fuse"]["kernel"])
        zeros.append(int((np.abs(filters).sum((0, 1, 2)) == 0).sum()))
    assert zeros == [0, 2, 0, 2]


def test_wrong_spaces_are_refused():
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1"):
        soft_filter_pruning(SPACES, 1)
    with pytest.raises(ValueError, match="blocks_2/conv_2/kernel: expected a dense array, found nothing"):
        compress(soft_filter_pruning(rlfn_spaces(3), 0.25), PARAMS)
    mixed = Space((("head/kernel", -1),), (("blocks_0/conv_0/kernel", -1),))
    with pytest.raises(ValueError, match="conv_0/kernel: expected 8 channels as in head/kernel, found 6"):
        compress(soft_filter_pruning([mixed], 0.25), PARAMS)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    with pytest.raises(ValueError, match="head/kernel: all 8 channels are zero"):
        compress(remove_zero_filters(SPACES), zero)
