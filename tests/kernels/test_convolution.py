"""The C++ convolution, with the machine's vectors and in portable code, against a convolution in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.convolution import Epilogue, View, Window, api, bench, convolution, fused_convolution
from pallas_kernels.convolution.shapes import Shape

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
SHAPES = [  # N, H, W, I, O, window: fewer pixels than a tile, odd channels, several vectors, several groups of vectors
    (2, 5, 7, 3, 5, (3, 3)),
    (1, 17, 26, 46, 52, (3, 3)),
    (1, 9, 13, 8, 70, (1, 1)),
    (1, 3, 9, 4, 115, (1, 1)),
    (1, 4, 30, 5, 33, (5, 3)),
    (3, 1, 1, 1, 16, (3, 3)),
]


@pytest.fixture(scope="module", params=["vectors", "portable"])
def kernel(request, kernel_cache):
    """Registers one build of the kernel under a name of its own."""
    with pytest.MonkeyPatch.context() as patch:
        target, library = f"convolution_{request.param}", api.LIBRARY
        ((_, symbol),) = library.handlers
        flags = tuple(f for f in library.flags if request.param == "vectors" or f != "-march=native")
        patch.setattr(api, "LIBRARY", native.Library(library.source, ((target, symbol),), flags))
        patch.setattr(api, "_TARGET", target)
        yield jax.jit(lambda x, w, window=Window(): convolution(x, w, "cpu_ffi", window), static_argnums=2)
    jax.clear_caches()


def problem(shape, dtype, seed=0):
    n, h, w, inputs, outputs, window = shape
    rng = np.random.default_rng(seed)
    draw = lambda *sizes: jnp.asarray(rng.normal(size=sizes), dtype)
    return draw(n, h, w, inputs), draw(*window, inputs, outputs)


def expected(x, kernel, stride=1, padding=None):
    x, kernel = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, kernel))
    h, w = kernel.shape[:2]
    padded = np.pad(x, ((0, 0), *(padding or ((h // 2, h // 2), (w // 2, w // 2))), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (h, w), (1, 2))[:, ::stride, ::stride]
    return np.einsum("nrcihw,hwio->nrco", windows, kernel)


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.01)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(kernel, shape, dtype, tolerance):
    x, w = problem(shape, dtype)
    y, want = kernel(x, w), expected(x, w)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=tolerance * np.abs(want).max())


WINDOWS = [  # stride, padding, window: no zeros, uneven zeros, even windows, steps over pixels, fewer results than a tile
    (2, ((0, 0), (0, 0)), (3, 3)),
    (2, ((0, 1), (0, 1)), (3, 3)),
    (1, ((0, 1), (1, 0)), (2, 2)),
    (3, ((1, 0), (0, 1)), (2, 3)),
    (5, ((0, 0), (0, 0)), (1, 1)),
    (16, ((4, 4), (4, 4)), (5, 5)),
]


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.01)])
@pytest.mark.parametrize("inputs, outputs", [(16, 52), (3, 16)])
@pytest.mark.parametrize("stride, padding, window", WINDOWS)
def test_strides_and_paddings(kernel, stride, padding, window, inputs, outputs, dtype, tolerance):
    x, w = problem((2, 18, 41, inputs, outputs, window), dtype)
    y, want = kernel(x, w, Window(stride, padding)), expected(x, w, stride, padding)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=tolerance * np.abs(want).max())


@needs_compiler
def test_bfloat16_sums_are_float32(kernel):
    """1 + 256 times 2^-9: a bfloat16 sum would stay at 1."""
    x = jnp.full((1, 1, 1, 257), 2.0**-9, jnp.bfloat16).at[..., 0].set(1)
    assert float(kernel(x, jnp.ones((1, 1, 257, 1), jnp.bfloat16))[0, 0, 0, 0]) == 1.5


@needs_compiler
def test_values_that_are_not_finite_pass_through(kernel):
    x = jnp.zeros((1, 3, 3, 1), jnp.bfloat16).at[0, 1, 1, 0].set(jnp.nan).at[0, 0, 0, 0].set(jnp.inf)
    y = kernel(x, jnp.ones((1, 1, 1, 1), jnp.bfloat16)).astype(jnp.float32)
    assert np.isnan(y[0, 1, 1, 0]) and np.isinf(y[0, 0, 0, 0]) and np.isfinite(y).sum() == 7


@needs_compiler
def test_vmap(kernel):
    x, w = problem(SHAPES[0], "float32")
    np.testing.assert_array_equal(jax.vmap(kernel, (0, None))(x[:, None], w)[:, 0], kernel(x, w))


def test_xla_is_the_fallback():
    x, w = problem(SHAPES[0], "float32")
    np.testing.assert_allclose(convolution(x, w, "xla"), expected(x, w), atol=1e-4)


@pytest.mark.parametrize(
    "window", [Window(0), Window(1, ((3, 0), (0, 0))), Window(1, ((0, 0), (-1, 0))), Window(2, ((0, 0), (0, 0)))]
)
def test_windows_that_miss_the_map_are_refused(window):
    with pytest.raises(ValueError, match=r"less padding than kernel, and a result, found Window\(stride="):
        convolution(jnp.zeros((1, 2, 4, 3)), jnp.zeros((3, 3, 3, 5)), window=window)


@pytest.mark.parametrize(
    "x, kernel, implementation, message",
    [
        ((1, 4, 4, 3), (2, 3, 3, 5), None, "h and w odd without a padding, found x float32"),
        ((1, 4, 4, 3), (3, 3, 4, 5), None, r"kernel float32 \(3, 3, 4, 5\)"),
        ((1, 4, 4, 3), (3, 3, 3, 5), "cuda", "implementation 'cuda' is unknown"),
    ],
)
def test_wrong_arguments_are_refused(x, kernel, implementation, message):
    with pytest.raises(ValueError, match=message):
        convolution(jnp.zeros(x), jnp.zeros(kernel), implementation)


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32 or bfloat16, the same for both"):
        convolution(jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 5), jnp.bfloat16))


@needs_compiler
def test_is_built_after_build(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = native.Library(api.LIBRARY.source, (), ("-std=c++17", "-O0", "-fPIC", "-shared", "-w"))
    assert not library.is_built()
    assert library.build().is_file() and library.is_built()


@needs_compiler
def test_bench_prints_every_shape(monkeypatch, capsys, kernel_cache):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": Shape(4, 5, 3, 7)})
    bench.main(["--shapes=tiny", "--rounds=2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["tiny", "float32"], ["tiny", "bfloat16"]]
    assert Shape(4, 5, 3, 7).macs == 4 * 5 * 9 * 3 * 7


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.01)])
@pytest.mark.parametrize(
    "activation, slope", [("identity", 0.0), ("leaky_relu", 0.05), ("leaky_relu", 0.0), ("sigmoid", 0.0)]
)
@pytest.mark.parametrize("join", ["none", "add", "multiply", "add_first"])
def test_epilogue_equals_the_definition(kernel, activation, slope, join, dtype, tolerance):
    x, w = problem((1, 5, 17, 6, 35, (1, 3)), dtype)
    z, bias = problem((1, 5, 17, 35, 35, (1, 1)), dtype, 1)[0], problem((1, 1, 1, 35, 1, (1, 1)), dtype, 2)[0][0, 0, 0]
    epilogue = Epilogue(activation, slope, join)
    y = jax.jit(fused_convolution, static_argnums=4)([View(x, 0, 6)], w, bias, None if join == "none" else z, epilogue)
    exact = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    want = expected(x, w) + exact(bias) + (exact(z) if join == "add_first" else 0)
    want = {"identity": want, "leaky_relu": np.where(want < 0, slope * want, want), "sigmoid": 1 / (1 + np.exp(-want))}[
        activation
    ]
    want = {"add": want + exact(z), "multiply": want * exact(z)}.get(join, want)
    np.testing.assert_allclose(exact(y), want, atol=tolerance * np.abs(want).max())


def bilinear(z, height, width):
    """[N, h, w, C] in float64 at half-pixel centres, the border repeated."""
    places = lambda size, length: np.clip((np.arange(length) + 0.5) * size / length - 0.5, 0, size - 1)
    weights = lambda size, length: np.maximum(0, 1 - np.abs(places(size, length)[:, None] - np.arange(size)))
    return np.einsum("rh,cw,nhwo->nrco", weights(z.shape[1], height), weights(z.shape[2], width), z)


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.01)])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (5, 17), (9, 40)])
@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_other_map_is_resized(kernel, activation, size, dtype, tolerance):
    x, w = problem((2, 5, 17, 6, 20, (3, 3)), dtype)
    z, _ = problem((2, *size, 20, 1, (1, 1)), dtype, 1)
    epilogue = Epilogue(activation, 0.5, "add_resized")
    y = jax.jit(fused_convolution, static_argnums=4)([View(x, 0, 6)], w, None, z, epilogue).astype(jnp.float32)
    sums, z = expected(x, w), np.asarray(z.astype(jnp.float32), np.float64)
    want = (np.where(sums < 0, 0.5 * sums, sums) if activation == "leaky_relu" else sums) + bilinear(z, 5, 17)
    np.testing.assert_allclose(y, want, atol=tolerance * np.abs(want).max())
    loss = lambda z: jnp.sum(jnp.sin(fused_convolution([View(x, 0, 6)], w, None, z, epilogue).astype(jnp.float32)))
    assert jnp.isfinite(jax.grad(loss)(jnp.asarray(z, dtype)).astype(jnp.float32)).all()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_are_read_side_by_side(kernel, dtype):
    (x, _), (z, w) = problem((2, 9, 11, 40, 1, (1, 1)), dtype), problem((2, 9, 11, 46, 20, (3, 3)), dtype, 1)
    views = [View(x, 3, 39), View(z, 40, 46), View(x, 0, 4)]
    y = jax.jit(fused_convolution)(views, w)
    np.testing.assert_array_equal(y, kernel(jnp.concatenate([x[..., 3:39], z[..., 40:], x[..., :4]], -1), w))
    views = [View(x, 3, 39), View(z, 41, 46)]
    y = jax.jit(fused_convolution)(views, w[:, :, :41])
    np.testing.assert_array_equal(y, kernel(jnp.concatenate([x[..., 3:39], z[..., 41:]], -1), w[:, :, :41]))


@pytest.mark.parametrize("ranges", [((0, 3), (0, 2)), ((-5, -1), (0, 1)), ((0, 4), (4, 4))])
def test_ranges_that_cannot_be_read_are_refused(ranges):
    x = jnp.zeros((1, 4, 4, 6))
    with pytest.raises(ValueError, match="found"):
        fused_convolution([View(x, *bounds) for bounds in ranges], jnp.zeros((3, 3, 5, 2)))


@needs_compiler
def test_sigmoid_of_large_values_and_nan(kernel):
    x = jnp.array([0.0, -200, 200, jnp.inf, -jnp.inf, jnp.nan, -87.0, 1e-3])[None, None, :, None]
    y = jax.jit(fused_convolution, static_argnums=4)(
        [View(x, 0, 1)], jnp.ones((1, 1, 1, 1)), None, None, Epilogue("sigmoid")
    )
    np.testing.assert_allclose(y, jax.nn.sigmoid(x), rtol=1e-5, atol=1e-37)


@needs_compiler
def test_gradients_are_those_of_xla(kernel):
    x, w = problem(SHAPES[0], "float32")
    loss = lambda implementation: lambda x, w: jnp.sum(jnp.sin(convolution(x, w, implementation)))
    found, want = (jax.jit(jax.grad(loss(name), (0, 1)))(x, w) for name in api.BACKENDS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, want)


@pytest.mark.parametrize(
    "bias, other, epilogue, message",
    [
        ((4,), None, Epilogue(), r"expected a bias.*\(5,\).*found \[\(\(4,\)"),
        ((5,), None, Epilogue(join="add"), r"\(1, 4, 4, 5\)"),
        ((5,), (1, 4, 4, 5), Epilogue(), "where it joins one"),
        ((5,), (1, 2, 2, 4), Epilogue(join="add_resized"), r"\(1, 2, 2, 5\)"),
    ],
)
def test_wrong_epilogues_are_refused(bias, other, epilogue, message):
    x, kernel = jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 5))
    with pytest.raises(ValueError, match=message):
        fused_convolution(
            [View(x, 0, 3)], kernel, jnp.zeros(bias), None if other is None else jnp.zeros(other), epilogue
        )


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="expected an activation of"):
        Epilogue("gelu")
