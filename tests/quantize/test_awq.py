"""AWQ's two searches against brute force, and the claim: the output error is at most that of rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.leaf import leaves_with_paths
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import chain, compress
from jaxcomp.formats import Grid
from jaxcomp.formats.grid import fake_quantize, qparams
from jaxcomp.quantize import LINEAR, LLAMA, awq, awq_clip, awq_scale, rtn
from jaxcomp.quantize.awq import channel_scale, output_error, search_clip, search_scale
from jaxcomp.quantize.pairs import bind

N, K, T = 12, 32, 300


@pytest.fixture(scope="module")
def layer():
    """(w [N, K], x [T, K]) with a few salient channels, float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, K)) * np.exp(1.5 * rng.normal(size=K)) @ (np.eye(K) + 0.1 * rng.normal(size=(K, K)))
    return rng.normal(size=(N, K)).astype(np.float32), x.astype(np.float32)


def rounded(w, grid):
    return np.asarray(fake_quantize(jnp.asarray(w), *qparams(jnp.asarray(w), grid), grid))


def test_channel_scale_follows_the_formula():
    mean_abs = np.array([1e-12, 0.5, 2.0, 8.0], np.float32)
    s = np.maximum(mean_abs**0.7, 1e-4)
    np.testing.assert_allclose(channel_scale(jnp.asarray(mean_abs), 0.7), s / np.sqrt(s.max() * s.min()), rtol=1e-5)
    np.testing.assert_array_equal(channel_scale(jnp.asarray(mean_abs), 0.0), 1)


def test_output_error_is_the_squared_norm_of_the_change(layer):
    d, x = layer
    np.testing.assert_allclose(output_error(jnp.asarray(d), jnp.asarray(x.T @ x)), np.sum((x @ d.T) ** 2), rtol=1e-4)


@pytest.mark.parametrize("grid", [Grid(3, symmetric=False, group_size=8), Grid(4)], ids=str)
def test_rho_is_the_best_of_the_grid_by_brute_force(layer, grid):
    w, x = layer
    mean_abs = np.abs(x).mean(0)
    errors = []
    for i in range(20):
        s = mean_abs ** (i / 20)
        s /= np.sqrt(s.max() * s.min())
        errors.append(np.linalg.norm(x @ (w - rounded(w * s, grid) / s).T) ** 2)
    scale, rho = search_scale([jnp.asarray(w)], [grid], jnp.asarray(mean_abs), jnp.asarray(x.T @ x))
    assert errors[round(float(rho) * 20)] <= min(errors) * 1.001 and 0 < float(rho)
    assert min(errors) < 0.9 * errors[0], "salient channels: scaling must help"
    np.testing.assert_allclose(scale, channel_scale(jnp.asarray(mean_abs), rho))


@pytest.mark.parametrize("grid", [Grid(3, symmetric=False, group_size=8), Grid(2, symmetric=False), Grid(3)], ids=str)
def test_clipping_is_the_best_of_the_grid_by_brute_force(layer, grid):
    w, x = layer
    size = grid.group_size or K
    found = np.asarray(search_clip(jnp.asarray(w), grid, jnp.asarray(x.T @ x)))
    for start in range(0, K, size):
        part, inputs = w[:, start : start + size], x[:, start : start + size]
        row_grid = Grid(grid.bits, symmetric=grid.symmetric)
        bound = np.abs(part).max(1, keepdims=True)
        tries = [np.clip(part, -bound * (1 - i / 20), bound * (1 - i / 20)) for i in range(10)]
        errors = np.array([np.sum((inputs @ (part - rounded(c, row_grid)).T) ** 2, 0) for c in tries])
        chosen = np.sum((inputs @ (part - rounded(found[:, start : start + size], row_grid)).T) ** 2, 0)
        assert np.all(chosen <= errors.min(0) * 1.001)


@pytest.fixture(scope="module", params=[2, 4])
def effective(toy, request):
    """(places, effective dense weights after scaling and rounding by bits) where W' = Q(W diag(s)) diag(s)^-1."""
    bits, options = request.param, dict(group_size=8, symmetric=False)
    places = bind(toy.params, LLAMA + LINEAR, toy.data)
    scaled = compress(awq_scale(bits, **options), toy.params, toy.data)[0]
    new = leaves_with_paths(compress(rtn(bits, **options), scaled)[0])
    plain = leaves_with_paths(compress(rtn(bits, **options), toy.params)[0])
    return places, leaves_with_paths(scaled), new, plain


def test_output_error_of_every_pair_is_at_most_that_of_rounding(toy, effective):
    places, scaled, new, plain = effective
    old = leaves_with_paths(toy.params)
    stats = toy.data(toy.params, {"gram"})
    better = 0
    for place in places:
        errors = np.zeros(2)
        for t in place.consumers:
            gram = stats[t.path]["gram"]
            row = scaled[t.path] / old[t.path]  # s, and 1/s of rows where the consumer is a producer too
            restored = new[t.path].materialise() / row
            errors += [float(output_error((old[t.path] - q).T, gram)) for q in (restored, plain[t.path].materialise())]
        assert errors[0] <= errors[1] * 1.001, place.source
        better += errors[0] < 0.98 * errors[1]
    assert better >= len(places) // 2


def test_clipping_never_raises_the_output_error_of_a_layer(toy):
    gram = toy.data(toy.params, {"gram"})
    options = dict(group_size=0, symmetric=False)
    clipped = leaves_with_paths(compress(awq_clip(3, **options), toy.params, toy.data)[0])
    plain = leaves_with_paths(compress(rtn(3, **options), toy.params)[0])
    for path, leaf in leaves_with_paths(toy.params).items():
        if path.endswith("kernel"):
            found, base = (output_error((leaf - q[path].materialise()).T, gram[path]["gram"]) for q in (clipped, plain))
            assert found <= base * 1.001, path
            same = jnp.array_equal(clipped[path].materialise(), plain[path].materialise())
            assert same if path.split("/")[-2] in "qk" else not same, path


def test_per_tensor_grids_are_not_clipped(toy):
    found = compress(awq_clip(4, group_size=-1), toy.params, toy.data)[0]
    want = compress(rtn(4, group_size=-1, symmetric=False), toy.params)[0]
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_awq_is_its_two_halves(toy):
    whole = compress(awq(4, group_size=8), toy.params, toy.data)[0]
    halves = compress(chain(awq_scale(4, group_size=8), awq_clip(4, group_size=8)), toy.params, toy.data)[0]
    jax.tree.map(np.testing.assert_array_equal, whole, halves)


def test_a_pair_without_consumers_to_quantize_is_left_alone(toy):
    rules = (Rule("**/gate"), Rule("**/up"))
    out = leaves_with_paths(compress(awq_scale(4, group_size=8, rules=rules), toy.params, toy.data)[0])
    changed = {p for p, x in leaves_with_paths(toy.params).items() if not jnp.array_equal(x, out[p])}
    assert changed == {
        f"blocks_{i}/{name}" for i in (0, 1) for name in ("mlp_norm/scale", "mlp/gate/kernel", "mlp/up/kernel")
    }
