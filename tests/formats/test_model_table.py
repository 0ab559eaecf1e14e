"""Every row is unmodified library code, run on compressed leaves in jit, vmap, grad and on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.leaf import is_compressed, leaves_with_paths, map_leaves, materialise_tree
from jaxcomp.formats import ActivationQuantizer, FakeQuantizedArray, Grid, LowRankArray, MaskedArray, QuantizedArray

KEY = jax.random.key(0)


@dataclasses.dataclass
class Row:
    """A model: its apply function, params, input, and the contracted axes of the leaves to compress."""

    apply: Callable
    params: Any
    x: jax.Array
    axes: dict[str, tuple[int, ...]]  # path suffix -> contracted axes
    dense: tuple[str, ...] = ()  # path suffixes that the row may materialise, and why is said in the row


def linen(module, x, axes, dense=()):
    params = module.init(jax.random.key(1), x)
    return Row(module.apply, params, x, axes, dense)


def nnx_row(make, x, axes, call=lambda m, x: m(x)):
    graph, params, rest = nnx.split(make(nnx.Rngs(1)), nnx.Param, ...)
    return Row(lambda p, x: call(nnx.merge(graph, p, rest), x), params, x, axes)


def noise(*shape):
    return jax.random.normal(KEY, shape)


class TiedEmbed(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(40, 32)
        return embed.attend(jnp.tanh(embed(ids)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)()(x)[0]


@jax.custom_vjp
def _scaled(x):
    return x * 2


_scaled.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))


def plain(params, x):
    """A function without a library: einsum, custom_vjp, custom_jvp (relu), a loop over stacked leaves."""
    y = jnp.einsum("btd,dhk->bthk", x, params["in"])
    y = jax.nn.relu(_scaled(y))
    y = jnp.einsum("bthk,hkd->btd", y, params["out"])
    for i in range(2):
        y = y + jnp.tanh(y @ params["stack"][i])
    return y


def plain_row():
    params = {"in": noise(32, 4, 8) / 6, "out": noise(4, 8, 32) / 6, "stack": noise(2, 32, 32) / 6}
    return Row(plain, params, noise(2, 5, 32), {"in": (0,), "out": (0, 1), "stack": (-2,)})


ROWS = {
    "linen.Dense": lambda: linen(nn.Dense(48), noise(2, 5, 32), {"kernel": (0,)}),
    "linen.DenseGeneral": lambda: linen(nn.DenseGeneral((4, 8)), noise(2, 5, 32), {"kernel": (0,)}),
    "linen.DenseGeneral(out)": lambda: linen(nn.DenseGeneral(24, axis=(-2, -1)), noise(2, 5, 4, 8), {"kernel": (0, 1)}),
    "linen.Conv": lambda: linen(nn.Conv(16, (3, 3)), noise(2, 9, 9, 32), {"kernel": (0, 1, 2)}),
    "linen.Conv(strided)": lambda: linen(nn.Conv(16, (3, 3), strides=2), noise(2, 9, 9, 32), {"kernel": (0, 1, 2)}),
    "linen.Conv(grouped)": lambda: linen(
        nn.Conv(16, (3, 3), feature_group_count=2), noise(2, 9, 9, 64), {"kernel": (0, 1, 2)}
    ),
    "linen.ConvTranspose": lambda: linen(
        nn.ConvTranspose(16, (3, 3), strides=(2, 2)), noise(2, 5, 5, 32), {"kernel": (0, 1, 2)}
    ),
    "linen.Embed(tied)": lambda: linen(TiedEmbed(), jnp.arange(10).reshape(2, 5), {"embedding": (1,)}),
    "linen.MultiHeadAttention": lambda: linen(
        nn.MultiHeadDotProductAttention(4), noise(2, 5, 32), {"out/kernel": (0, 1), "kernel": (0,)}
    ),
    "linen.scan": lambda: linen(Scanned(), noise(2, 5, 32), {"kernel": (-2,)}),
    "linen.scan(remat)": lambda: linen(Scanned(remat=True), noise(2, 5, 32), {"kernel": (-2,)}),
    "linen.remat": lambda: linen(Remat(), noise(2, 5, 32), {"kernel": (0,)}),
    "nnx.Linear": lambda: nnx_row(lambda r: nnx.Linear(32, 48, rngs=r), noise(2, 5, 32), {"kernel": (0,)}),
    "nnx.Conv": lambda: nnx_row(lambda r: nnx.Conv(32, 16, (3, 3), rngs=r), noise(2, 9, 9, 32), {"kernel": (0, 1, 2)}),
    "nnx.MultiHeadAttention": lambda: nnx_row(
        lambda r: nnx.MultiHeadAttention(4, 32, decode=False, rngs=r),
        noise(2, 5, 32),
        {"out/kernel": (0, 1), "kernel": (0,)},
    ),
    "plain JAX": plain_row,
}


def compress(row: Row, make: Callable) -> Any:
    """Replaces the row's leaves by `make(array, negative contracted axes, batch axes)`."""

    def one(path, leaf):
        path = path.removesuffix("/value")
        suffix = next((s for s in row.axes if path.endswith(s)), None)
        if suffix is None or is_compressed(leaf):
            return leaf
        axes = row.axes[suffix]
        batch = 1 if axes[0] < 0 else 0
        return make(leaf, axes, batch)

    return map_leaves(one, row.params)


def stacked(make):
    """`make(array, axes)` over a leading batch axis where there is one."""
    return lambda w, axes, batch: jax.vmap(lambda a: make(a, axes))(w) if batch else make(w, axes)


LEAVES = {
    "w4": stacked(lambda w, a: QuantizedArray.quantize(w, Grid(4), a)),
    "w3g32 asymmetric": stacked(lambda w, a: QuantizedArray.quantize(w, Grid(3, symmetric=False, group_size=32), a)),
    "w4a8": stacked(lambda w, a: QuantizedArray.quantize(w, Grid(4), a, ActivationQuantizer(Grid(8, symmetric=False)))),
    "fake w4a8": stacked(lambda w, a: FakeQuantizedArray.of(w, Grid(4), a, ActivationQuantizer(Grid(8)))),
    "masked": stacked(lambda w, a: MaskedArray.of(w, _every_other(w, a), a, 8)),
    "low rank": stacked(lambda w, a: LowRankArray.of(w, 2, KEY, a)),
}


def _every_other(w, axes):
    n = w.size // np.prod([w.shape[a] for a in axes])
    return (jnp.arange(n)[:, None] + jnp.arange(w.size // n // 8)[None]) % 2 == 0


def dense_reference(row, tree):
    return row.apply(materialise_tree(tree), row.x)


@pytest.mark.parametrize("leaf", ["w4", "w3g32 asymmetric", "masked", "low rank"])
@pytest.mark.parametrize("name", ROWS)
def test_jit_equals_materialised(name, leaf):
    row = ROWS[name]()
    tree = compress(row, LEAVES[leaf])
    y = jax.jit(compressed(row.apply))(tree, row.x)
    np.testing.assert_allclose(y, dense_reference(row, tree), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_materialised(name):
    row = ROWS[name]()
    tree = compress(row, LEAVES["w4"])
    seen = explain(row.apply, tree, row.x)
    assert not seen.materialised, seen
    assert not seen.unused, seen
    assert {e.leaf for e in seen.events} == {p for p, x in leaves_with_paths(tree).items() if is_compressed(x)}


@pytest.mark.parametrize("name", ROWS)
def test_integer_model_equals_fake_quantized_model(name):
    row = ROWS[name]()
    fake = compress(row, LEAVES["fake w4a8"])
    packed = map_leaves(lambda _, x: x.quantize() if isinstance(x, FakeQuantizedArray) else x, fake)
    a, b = (jax.jit(compressed(row.apply))(t, row.x) for t in (fake, packed))
    error, size = jnp.abs(a - b), float(jnp.abs(a).max())
    assert float(error.mean()) <= 1e-4 * size
    assert float(error.max()) <= 1e-2 * size  # a float sum next to a rounding boundary may move one code by one


@pytest.mark.parametrize("name", [n for n in ROWS if "Embed" not in n])
def test_vmap(name):
    row = ROWS[name]()
    tree = compress(row, LEAVES["w4"])
    xs = jnp.stack([row.x, 2 * row.x])
    y = jax.jit(jax.vmap(compressed(row.apply), in_axes=(None, 0)))(tree, xs)
    np.testing.assert_allclose(y[1], compressed(row.apply)(tree, xs[1]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("leaf", ["fake w4a8", "low rank", "masked"])
@pytest.mark.parametrize("name", ROWS)
def test_training_reduces_the_loss(name, leaf):
    row = ROWS[name]()
    tree = compress(row, LEAVES[leaf])
    floats, rest = _split_floats(tree)
    target = dense_reference(row, row.params) * 0.5

    @jax.jit
    def loss(floats):
        return jnp.mean((compressed(row.apply)(_join(floats, rest), row.x) - target) ** 2)

    first, grads = jax.value_and_grad(loss)(floats)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    assert np.isfinite(norm) and norm > 0
    steps = [1e-3, 1e-2, 1e-1]
    best = min(float(loss(jax.tree.map(lambda p, g, s=s: p - s * g / norm, floats, grads))) for s in steps)
    assert best < first


def _split_floats(tree):
    leaves, treedef = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    floats = [x for x, f in zip(leaves, is_float, strict=True) if f]
    return floats, (treedef, is_float, [x for x, f in zip(leaves, is_float, strict=True) if not f])


def _join(floats, rest):
    treedef, is_float, others = rest
    floats, others = iter(floats), iter(others)
    return jax.tree.unflatten(treedef, [next(floats) if f else next(others) for f in is_float])


@pytest.mark.parametrize("name", ["linen.Dense", "linen.MultiHeadAttention", "linen.Conv", "linen.scan", "nnx.Linear"])
def test_mesh_of_eight_devices(name):
    row = ROWS[name]()
    tree = compress(row, LEAVES["w4a8"])
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))

    def shard(_, leaf):
        if not is_compressed(leaf):
            return jax.device_put(leaf, NamedSharding(mesh, P()))
        rows = lambda a: P(*(None,) * (a.ndim - 2), "model" if a.shape[-2] % 4 == 0 else None, None)
        return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, rows(a))), leaf)

    sharded = map_leaves(shard, tree)
    packed = next(x for x in leaves_with_paths(sharded).values() if is_compressed(x)).packed
    assert len({str(s.index) for s in packed.addressable_shards}) == 4
    x = jax.device_put(row.x, NamedSharding(mesh, P("data")))
    y = jax.jit(compressed(row.apply))(sharded, x)
    np.testing.assert_allclose(y, compressed(row.apply)(tree, row.x), rtol=2e-4, atol=2e-4)
