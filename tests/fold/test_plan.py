"""Sharing blocks: plans, folding, gradients that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.leaf import nbytes
from jaxcomp.core.transform import compress
from jaxcomp.fold import FoldPlan, contiguous_plan, fold, share_blocks, unfold

KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {
    "params": {
        "embed": jnp.ones((8, 8)),
        **{f"blocks_{i}": {"w": jax.random.normal(KEYS[i], (8, 8))} for i in range(6)},
    }
}


def apply(params, x):
    for i in range(6):
        x = jnp.tanh(x @ params["params"][f"blocks_{i}"]["w"])
    return x @ params["params"]["embed"]


@pytest.mark.parametrize(
    "n,group,keep,source",
    [
        (6, 2, (), (0, 0, 2, 2, 4, 4)),
        (5, 2, (), (0, 0, 2, 2, 4)),
        (6, 2, (0, 5), (0, 1, 1, 3, 3, 5)),
        (4, 1, (), (0, 1, 2, 3)),
        (4, 4, (), (0, 0, 0, 0)),
    ],
)
def test_contiguous_plan(n, group, keep, source):
    plan = contiguous_plan(n, group, keep=keep)
    assert plan.source == source and hash(plan)
    assert sorted(i for g in plan.groups for i in g) == list(range(n))


def test_fold_then_unfold_runs_shared_blocks():
    plan = contiguous_plan(6, 3)
    folded = fold(PARAMS, plan)
    assert sorted(folded["params"]) == ["blocks_0", "blocks_3", "embed"]
    assert nbytes(folded) == 3 * 8 * 8 * 4
    whole = unfold(folded, plan)
    assert whole["params"]["blocks_2"]["w"] is PARAMS["params"]["blocks_0"]["w"]
    x = jnp.ones((2, 8))
    manual = {
        "params": {**PARAMS["params"], **{f"blocks_{i}": PARAMS["params"][f"blocks_{i // 3 * 3}"] for i in range(6)}}
    }
    np.testing.assert_array_equal(apply(whole, x), apply(manual, x))


def test_gradients_of_shared_leaves_add_up():
    plan = contiguous_plan(6, 2)
    folded, x = fold(PARAMS, plan), jnp.ones((2, 8))
    shared = jax.grad(lambda t: apply(unfold(t, plan), x).sum())(folded)
    single = jax.grad(lambda p: apply(p, x).sum())(unfold(folded, plan))
    total = single["params"]["blocks_2"]["w"] + single["params"]["blocks_3"]["w"]
    np.testing.assert_allclose(shared["params"]["blocks_2"]["w"], total, rtol=1e-5, atol=1e-6)


def test_mean_merges_the_group():
    out, plan, _ = compress(share_blocks(3, merge="mean"), PARAMS)
    want = jnp.mean(jnp.stack([PARAMS["params"][f"blocks_{i}"]["w"] for i in range(3)]), 0)
    np.testing.assert_allclose(out["params"]["blocks_0"]["w"], want, rtol=1e-6)
    assert plan == FoldPlan("blocks_", (0, 0, 0, 3, 3, 3))


def test_errors():
    with pytest.raises(ValueError, match=r"1\.\.6"):
        contiguous_plan(6, 0)
    with pytest.raises(ValueError, match="keep names blocks"):
        contiguous_plan(6, 2, keep=(6,))
    with pytest.raises(ValueError, match="no blocks named layer0"):
        compress(share_blocks(2, prefix="layer"), PARAMS)
    with pytest.raises(ValueError, match="found 6 blocks"):
        fold(PARAMS, contiguous_plan(5, 2))
    uneven = {"blocks_0": {"w": jnp.ones((2, 2))}, "blocks_1": {"w": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match="cannot be shared"):
        fold(uneven, contiguous_plan(2, 2))
    with pytest.raises(ValueError, match="first"):
        share_blocks(2, merge="last")
