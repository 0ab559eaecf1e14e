"""Tiles: all give the same product, the search records the fastest, records are used, damage is survived and named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arbitrary_bit_matmul import (
    api,
    arbitrary_bit_matmul,
    bench,
    pack_dense,
    prepare,
    tile_search,
    tiles,
)
from pallas_kernels.arbitrary_bit_matmul.shapes import Shape
from pallas_kernels.arbitrary_bit_matmul.spec import WeightSpec

SHAPE, OPTIONS = Shape("small", 256, 512), bench.Options(("xla",), rounds=3, working_set=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.recorded.cache_clear()
    yield tmp_path
    tiles.recorded.cache_clear()


def problem(name, m=3, bits=4):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (SHAPE.n, SHAPE.k)).astype(np.uint8)
    packed = prepare(pack_dense(codes, bits), k=SHAPE.k, groups=1, bits=bits, implementation=name)
    x = jnp.asarray(rng.integers(-127, 128, (m, SHAPE.k)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (SHAPE.n, 1)), jnp.float32)
    return x, packed, scale, WeightSpec(SHAPE.n, SHAPE.k, 1, bits)


@pytest.mark.parametrize("name, options", [("xla", {}), ("tpu", {"interpret": True})])
def test_every_tile_gives_the_same_product(name, options):
    x, packed, scale, spec = problem(name, m=200 if name == "tpu" else 3)
    found = api.BACKENDS[name].tiles(spec, x)
    assert len(found) > 2 and len(set(found)) == len(found)
    run = lambda tile: api.BACKENDS[name].matmul(x, packed, scale, spec, tile=tile, **options)
    want = run(found[0])
    for tile in found[1:]:
        np.testing.assert_allclose(run(tile), want, rtol=1e-6)


@pytest.mark.parametrize("platform, name, m", [("tpu", "tpu", 200), ("cuda", "mosaic_gpu", 200)])
def test_every_tile_lowers(platform, name, m):
    x, packed, scale, spec = problem(name, m)
    if not (found := api.BACKENDS[name].tiles(spec, x)):
        pytest.skip("this jax has no Mosaic GPU")
    texts = set()
    for tile in found:
        run = lambda x, w, s, tile=tile: api.BACKENDS[name].matmul(x, w, s, spec, tile=tile)
        texts.add(jax.jit(run).trace(x, packed, scale).lower(lowering_platforms=(platform,)).as_text())
    assert len(texts) == len(found)


def test_search_takes_the_fastest_and_only_for_a_gain(monkeypatch):
    speed = {(1 << 18,): 1.0, (1 << 17,): 0.5}
    fake = lambda timed, options: {t: np.full(options.rounds, speed.get(t, 2.0)) for t in timed}
    monkeypatch.setattr(bench, "measure", fake)
    found = tile_search.search(SHAPE, 1, "w4a8", "xla", OPTIONS, least=0.03)
    assert (found.tile, found.gain) == ((1 << 17,), 2.0)
    assert next(iter(found.microseconds)) == (1 << 18,) and found.key == "xla 1x256x512 w4g512 int8"
    assert tile_search.search(SHAPE, 1, "w4a8", "xla", OPTIONS, least=1.5).tile == (1 << 18,)


def test_what_has_no_tiles_is_not_searched():
    assert tile_search.search(SHAPE, 1, "w4a8g128", "xla", OPTIONS, 0.03) is None  # goes group by group
    assert tile_search.search(SHAPE, 1, "w4a8", "cpu_ffi", OPTIONS, 0.03) is None
    assert list(tile_search.search_all([SHAPE], [1], ["w4a8g128"], OPTIONS, 0.03)) == []


def test_a_record_is_used_by_the_products_to_come(monkeypatch):
    x, packed, scale, spec = problem("xla")
    seen = []
    backend = api.BACKENDS["xla"]
    spy = lambda *a, **options: seen.append(options.get("tile")) or backend.matmul(*a, **options)
    monkeypatch.setitem(api.BACKENDS, "xla", backend._replace(matmul=spy))
    run = lambda: jax.eval_shape(
        lambda x: arbitrary_bit_matmul(x, packed, scale, bits=4, act_bits=8, implementation="xla"),
        x.astype(jnp.float32),
    )
    run()
    tiles.record({tiles.key("xla", spec, x): (1 << 16,)})
    path = tiles.record({"another": (1,)})
    run()
    tiles.record({tiles.key("xla", spec, x): (12345,)})  # no candidate
    run()
    assert seen == [None, (1 << 16,), None]
    assert json.loads(path.read_text()) == {"another": [1], tiles.key("xla", spec, x): [12345]}
    assert [p.suffix for p in path.parent.iterdir()] == [".json"]


@pytest.mark.parametrize("damage", ['{"xla 1x', "[1, 2]", '{"a": 3}'])
def test_a_damaged_record_is_named_and_ignored(damage):
    tiles.file().parent.mkdir(parents=True)
    tiles.file().write_text(damage)
    with pytest.warns(UserWarning, match=r"tiles-.*\.json: no record of tiles"):
        assert tiles.recorded() == {}
