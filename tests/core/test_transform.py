"""The algebra on all three shapes of compression: rewriting leaves, masking groups, sharing blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.core.leaf import is_compressed, leaves_with_paths, materialise_tree, nbytes, replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import EmptyState, chain, compress, identity, masked, named_chain, stateless, wrap_optax
from jaxcomp.fold import share_blocks, unfold
from jaxcomp.formats import MaskedArray, QuantizedArray
from jaxcomp.quantize import rtn
from jaxcomp.sparsify import magnitude

KEYS = jax.random.split(jax.random.key(0), 8)
PARAMS = {
    f"blocks_{i}": {"a": {"kernel": jax.random.normal(KEYS[i], (32, 32)), "bias": jnp.ones(32)}} for i in range(4)
}


def apply(params, x):
    for i in range(4):
        x = jnp.tanh(x @ params[f"blocks_{i}"]["a"]["kernel"] + params[f"blocks_{i}"]["a"]["bias"].reshape(1, -1))
    return x


def test_identity_and_empty_chain_change_nothing():
    for transform in (identity(), chain()):
        out, _, _ = compress(transform, PARAMS)
        assert all(a is b for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(PARAMS), strict=True))


def test_chain_applies_in_order_and_keeps_states_by_name():
    double = stateless(lambda p, _: jax.tree.map(lambda x: 2 * x, p))
    add = stateless(lambda p, _: jax.tree.map(lambda x: x + 1, p))
    out, state, _ = compress(named_chain(("double", double), ("add", add)), {"w": jnp.float32(3)})
    assert out["w"] == 7 and state == {"double": EmptyState(), "add": EmptyState()}
    with pytest.raises(ValueError, match="must differ"):
        named_chain(("x", add), ("x", add))


def test_three_shapes_of_compression_stack():
    """Share blocks, mask groups, quantize: in one chain, on one tree."""
    transform = named_chain(("fold", share_blocks(2)), ("mask", magnitude(0.5, 4)), ("quantize", rtn(8)))
    small, state, seconds = compress(transform, PARAMS)
    kernels = [x for p, x in leaves_with_paths(small).items() if p.endswith("kernel")]
    assert len(kernels) == 2 and all(isinstance(k, QuantizedArray) for k in kernels)
    groups = kernels[0].materialise().T.reshape(32, 8, 4)
    assert ((groups == 0).all(-1).sum(-1) >= 4).all(), "masked groups stay exactly zero under the quantizer"
    assert nbytes(small) < nbytes(PARAMS) / 6 and seconds > 0
    x = jnp.ones((2, 32))
    from jaxcomp.core.apply import compressed

    run = jax.jit(lambda tree: compressed(apply)(unfold(tree, state["fold"]), x))
    np.testing.assert_allclose(
        run(small), apply(unfold(materialise_tree(small), state["fold"]), x), rtol=1e-4, atol=1e-4
    )


def test_masked_touches_only_its_rules():
    out, _, _ = compress(masked(rtn(4), [Rule("blocks_1"), Rule("blocks_2/a/bias")]), PARAMS)
    changed = {p for p, x in leaves_with_paths(out).items() if is_compressed(x)}
    assert changed == {"blocks_1/a/kernel"}
    assert out["blocks_0"]["a"]["kernel"] is PARAMS["blocks_0"]["a"]["kernel"]


def test_second_quantizer_passes_over_quantized_leaves():
    out, _, _ = compress(chain(rtn(4, rules=[Rule("blocks_0/a/kernel")]), rtn(8)), PARAMS)
    bits = {p: x.grid.bits for p, x in leaves_with_paths(out).items() if is_compressed(x)}
    assert bits == {"blocks_0/a/kernel": 4, **{f"blocks_{i}/a/kernel": 8 for i in (1, 2, 3)}}


def test_wrap_optax_projects_onto_the_mask():
    tx = wrap_optax(optax.sgd(0.1), magnitude(0.25, 4), every=2)
    params, state = PARAMS, tx.init(PARAMS)
    loss = lambda p: (apply(p, jnp.ones((2, 32))) ** 2).sum()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    density = lambda p: float((jnp.abs(p["blocks_0"]["a"]["kernel"]) > 1e-6).mean())
    params, state = step(params, state)
    assert density(params) > 0.9
    params, state = step(params, state)
    assert density(params) <= 0.25
    assert loss(params) < loss(PARAMS)
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params, state)


def test_errors_name_the_path_and_the_remedy():
    broken = replace_leaves(PARAMS, {"blocks_2/a/kernel": jnp.full((32, 32), jnp.nan)})
    with pytest.raises(ValueError, match="blocks_2/a/kernel: 1024 weights are NaN"):
        compress(rtn(4), broken)
    with pytest.raises(
        ValueError, match=r"blocks_0/a/kernel: in_dim 32 is not divisible by group_size 24; use group_size=16"
    ):
        compress(rtn(4, group_size=24), PARAMS)
    with pytest.raises(ValueError, match="unknown options"):
        compress(rtn(4, wbits=3), PARAMS)
    with pytest.raises(ValueError, match=r"pass calibration data, or Rule\('w', axes"):
        compress(rtn(4, rules=[Rule("w")]), {"w": jnp.ones((2, 3, 4))})
    with pytest.raises(ValueError, match="holds no arrays"):
        compress(rtn(4), {})
    with pytest.raises(KeyError, match="no leaf at"):
        replace_leaves(PARAMS, {"nowhere": 0})
    with pytest.raises(ValueError, match="density"):
        magnitude(0.0)


def test_mask_of_a_transform_is_a_masked_leaf():
    out, _, _ = compress(magnitude(0.25, 8), PARAMS)
    leaf = out["blocks_0"]["a"]["kernel"]
    assert isinstance(leaf, MaskedArray) and float(leaf.density) == 0.25
