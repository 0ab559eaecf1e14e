"""The public function against decoded floats for all widths, groups, zero points; choice, gradients, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arbitrary_bit_matmul import (
    ActivationCodes,
    Prepared,
    WeightSpec,
    api,
    arbitrary_bit_matmul,
    choose,
    code_matmul,
    pack_dense,
    prefer,
    prepare,
    quantize_activations,
    reference,
    tiles,
    weight_spec,
    xla,
)


def weight(bits, n=6, k=96, groups=1, levels=0, zero=True, seed=0):
    """(codes, packed, scale, zero point) of a random matrix."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, levels or 2**bits, (n, k)).astype(np.uint8)
    scale = jnp.asarray(rng.random((n, groups)) + 0.5, jnp.float32)
    points = jnp.asarray(rng.integers(0, levels or 2**bits, (n, groups)), jnp.float32) if zero else None
    return codes, pack_dense(codes, bits), scale, points


def decoded(codes, scale, zero, bits, levels=0):
    zero = jnp.full(scale.shape, (levels or 2**bits) // 2, jnp.float32) if zero is None else zero
    return np.asarray(reference.decode(codes, scale, zero), np.float64)


def rows(m, k, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, k)), jnp.float32)


def quantized_values(x, bits, symmetric=True):
    return np.asarray(quantize_activations(x, bits, symmetric).values(), np.float64)


def assert_near(y, want, relative=3e-6):
    np.testing.assert_allclose(y, want, rtol=0, atol=relative * np.abs(want).max())


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits):
    """Ragged M, N, K; floating-point and integer activations; groups that do and do not begin at words."""
    for k, groups, zero, m in ((45, 3 if bits % 2 else 1, True, 1), (256, 2, bits % 3 == 0, 5 if bits % 2 else 2)):
        codes, packed, scale, points = weight(bits, n=7, k=k, groups=groups, zero=zero)
        x, w = rows(m, k), decoded(codes, scale, points, bits)
        both = lambda *a, b=bits: (arbitrary_bit_matmul(*a, bits=b), arbitrary_bit_matmul(*a, bits=b, act_bits=8))
        floating, integer = jax.jit(both)(x, packed, scale, points)
        assert_near(floating, np.asarray(x, np.float64) @ w.T)
        assert_near(integer, quantized_values(x, 8) @ w.T)


@pytest.mark.parametrize("act_bits", [1, 8])
def test_asymmetric_activations(act_bits):
    codes, packed, scale, zero = weight(3, groups=3)
    x = rows(2, 96) + 1
    f = functools.partial(arbitrary_bit_matmul, bits=3, act_bits=act_bits, act_symmetric=False)
    y = jax.jit(f)(x, packed, scale, zero)
    assert_near(y, quantized_values(x, act_bits, False) @ decoded(codes, scale, zero, 3).T, 1e-5)


def test_five_levels_centre_on_two():
    codes, packed, scale, _ = weight(3, levels=5, zero=False)
    x = rows(2, 96)
    y = jax.jit(functools.partial(arbitrary_bit_matmul, bits=3, levels=5))(x, packed, scale)
    assert_near(y, np.asarray(x, np.float64) @ decoded(codes, scale, None, 3, levels=5).T)


def test_integer_product_is_exact():
    codes, packed, scale, _ = weight(8, n=16, k=4096, zero=False)
    ones = jnp.ones_like(scale)
    x = np.random.default_rng(0).integers(-128, 128, (3, 4096)).astype(np.int8)
    y = code_matmul(ActivationCodes(jnp.asarray(x), jnp.ones((3, 1))), packed, ones, bits=8)
    want = x.astype(np.int64) @ (codes.astype(np.int64) - 128).T
    np.testing.assert_array_equal(y, want.astype(np.float32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", [1, 3])
def test_xla_reads_bytes_as_it_reads_words(bits, groups):
    _, packed, scale, zero = weight(bits, groups=groups)
    x, static = rows(2, 96), dict(bits=bits, act_bits=8, implementation="xla")
    as_bytes = Prepared(np.asarray(packed).view(np.uint8), "bytes")
    run = jax.jit(lambda x, w: arbitrary_bit_matmul(x, w, scale, zero, **static))
    np.testing.assert_array_equal(run(x, as_bytes), run(x, packed))
    first = prepare(packed, k=96, groups=groups, bits=bits, implementation="xla")
    assert first.layout == ("bytes" if bits in (1, 2, 4, 8) else "dense")


def test_row_blocks_with_a_tail(monkeypatch):
    monkeypatch.setattr(xla, "BLOCKS", ((96 * 16,),))
    codes, packed, scale, zero = weight(2, n=39)
    x, w = rows(6, 96), decoded(codes, scale, zero, 2)
    both = lambda x, *a: (arbitrary_bit_matmul(x[:1], *a, bits=2), arbitrary_bit_matmul(x, *a, bits=2))
    with tiles.trying((96 * 16,)):
        found = jax.jit(both)(x, packed, scale, zero)
    for y in found:
        assert_near(y, np.asarray(x[: y.shape[0]], np.float64) @ w.T)


@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 8), (3, 1)])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_decode_allocates_far_less_than_the_matrix(bits, groups, act_bits):
    n, k = 8192, 1024
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    args = shape(1, k), shape(n, k * bits // 32, dtype=jnp.uint32), shape(n, groups), shape(n, groups)
    f = lambda *a: arbitrary_bit_matmul(*a, bits=bits, act_bits=act_bits)
    temp = jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temp < args[1].size * 4 + 4 * xla.BLOCKS[0][0] < n * k


def test_batch_axes_and_dtype():
    _, packed, scale, zero = weight(4)
    x = rows(6, 96).astype(jnp.bfloat16)
    y = arbitrary_bit_matmul(x.reshape(2, 3, 96), packed, scale, zero, bits=4)
    assert y.shape == (2, 3, 6) and y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.reshape(6, 6), arbitrary_bit_matmul(x, packed, scale, zero, bits=4))


@pytest.mark.parametrize("act_bits", [None, 8])
def test_gradients_are_those_of_the_decoded_weight(act_bits):
    codes, packed, scale, zero = weight(4, groups=3)
    x, dy = rows(2, 96), rows(2, 6, seed=2)  # few rows: digits; the gradient is that of the floating-point product
    f = lambda x, s, z: (arbitrary_bit_matmul(x, packed, s, z, bits=4, act_bits=act_bits) * dy).sum()
    dx, ds, dz = jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, scale, zero)
    seen = x if act_bits is None else quantize_activations(x, act_bits).values()
    dense = lambda x, s, z: (reference.dense_product(x, codes, s, z) * dy).sum()
    for got, want in zip((dx, ds, dz), jax.jit(jax.grad(dense, argnums=(0, 1, 2)))(seen, scale, zero), strict=True):
        assert_near(got, want, 1e-5)


def test_integer_zero_points_have_no_gradient():
    _, packed, scale, zero = weight(4)
    f = lambda x, z: arbitrary_bit_matmul(x, packed, scale, z, bits=4).sum()
    assert jax.eval_shape(jax.grad(f), rows(1, 96), zero.astype(jnp.uint8)).shape == (1, 96)


def test_vmap_over_weights():
    packs = [weight(2, seed=s)[1:] for s in range(3)]
    stacked = [jnp.stack(a) for a in zip(*packs, strict=True)]
    x = rows(1, 96)
    f = lambda p, s, z: arbitrary_bit_matmul(x, p, s, z, bits=2)
    got = jax.jit(jax.vmap(f))(*stacked)
    for y, args in zip(got, packs, strict=True):
        assert_near(y, jax.jit(f)(*args))


def test_wrong_shapes_say_what_was_expected():
    _, packed, scale, zero = weight(4)
    with pytest.raises(ValueError, match=r"expected uint32 \(6, 9\), found uint32 \(6, 12\)"):
        arbitrary_bit_matmul(rows(1, 96), packed, scale, zero, bits=3)
    with pytest.raises(ValueError, match="equal groups"):
        arbitrary_bit_matmul(rows(1, 96), packed, jnp.ones((6, 7)), bits=4)
    with pytest.raises(ValueError, match=r"zero: expected \(6, 1\)"):
        arbitrary_bit_matmul(rows(1, 96), packed, scale, jnp.ones((6, 2)), bits=4)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        arbitrary_bit_matmul(rows(1, 96), packed, scale, bits=4, implementation="cuda")


def test_xla_covers_everything_on_cpu():
    _, packed, scale, zero = weight(5, k=95)
    spec = weight_spec(packed, scale, zero, k=95, bits=5)
    assert choose(spec, rows(1, 95), packed, ["xla"]) == ("xla", {})


def test_accelerator_kernels_need_a_prepared_weight_and_then_lower_for_their_platform():
    _, packed, scale, _ = weight(4, n=128, k=256)
    spec = weight_spec(packed, scale, None, k=256, bits=4)
    x = rows(2, 256)
    assert "use `prepare`" in choose(spec, x, packed, api.preference()["tpu"], convert=False).reasons["tpu"]
    prepared = prepare(packed, k=256, groups=1, bits=4, implementation="tpu")
    f = jax.jit(lambda w: arbitrary_bit_matmul(x, w, scale, bits=4, act_bits=8))
    lower = lambda w, platform: f.trace(w).lower(lowering_platforms=(platform,)).as_text()
    assert "tpu_custom_call" in lower(prepared, "tpu")
    assert "tpu_custom_call" not in lower(packed, "tpu")
    assert_near(f(prepared), f(packed))


def test_prefer_puts_implementations_first_and_traces_again():
    _, packed, scale, _ = weight(4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 96)), jnp.float32)
    product = jax.jit(lambda x: arbitrary_bit_matmul(x, packed, scale, bits=4, act_bits=8))
    integer = lambda: bool(re.search(r"dot_general.*xi32>", product.lower(x).as_text()))
    plain, usual = product(x), api.preference()
    with prefer("xla"):
        assert integer() and all(names[0] == "xla" for names in api.preference().values())
    with prefer("reference"):
        assert api.preference() == {platform: ("reference", *names) for platform, names in usual.items()}
        assert not integer()
        np.testing.assert_array_equal(product(x), plain)
    assert api.preference() == usual
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        prefer("fast")


def test_reference_refuses_sums_that_float32_does_not_hold():
    refuses = lambda k: reference.BACKEND.refuse(WeightSpec(4, k, 1, 8), jax.ShapeDtypeStruct((2, k), jnp.int8))
    assert refuses(1024) is None and "not exact in float32" in refuses(1032)
