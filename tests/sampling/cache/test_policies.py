"""One table of properties for every cache policy, and each one against a restatement of its rule."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_sampler as toy

from jaxcomp.sampling.cache import adacache, magcache, pab, taylorseer, teacache
from jaxcomp.sampling.cache.adacache import AdaCacheConfig
from jaxcomp.sampling.cache.dbcache import DBCacheConfig, first_block_cache
from jaxcomp.sampling.cache.deepcache import DeepCacheConfig, power_spaced
from jaxcomp.sampling.cache.delta_dit import DeltaDiTConfig
from jaxcomp.sampling.cache.fastercache import FasterCacheConfig, FasterGuidanceConfig, split_frequencies
from jaxcomp.sampling.cache.fora import FORAConfig
from jaxcomp.sampling.cache.magcache import MagCacheConfig
from jaxcomp.sampling.cache.pab import PyramidAttentionBroadcastConfig
from jaxcomp.sampling.cache.search import HitRate, tune
from jaxcomp.sampling.cache.sencache import SenCacheConfig
from jaxcomp.sampling.cache.taylorseer import Forecast, TaylorSeerCacheConfig
from jaxcomp.sampling.cache.teacache import TeaCacheConfig
from jaxcomp.sampling.cache.uniform import UniformCacheConfig, every, spread
from jaxcomp.sampling.denoiser import guided, whole
from jaxcomp.sampling.pipeline import Pipeline, freeze_plan, with_cache

STEPS = 10
PARAMS = toy.init()
PIPELINE = Pipeline(toy.denoiser, toy.flow(STEPS))
IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)
ALL = tuple((i, 1) for i in (0.5, 1.0))  # a codebook that always computes the next step

# name: (computes always, computes as rarely as its rules allow, steps that are then computed)
TABLE = {
    "uniform": (UniformCacheConfig(1), UniformCacheConfig(99), [0]),
    "fora": (FORAConfig(1), FORAConfig(99), [0]),
    "deepcache": (DeepCacheConfig(1, "blocks_[1-3]"), DeepCacheConfig(99, "blocks_[1-3]"), [0]),
    "delta_dit": (DeltaDiTConfig(1), DeltaDiTConfig(99), [0]),
    "taylorseer": (TaylorSeerCacheConfig(1), TaylorSeerCacheConfig(99), [0, 1, 2]),
    "magcache": (MagCacheConfig((1.1,) * 10, 0.0), MagCacheConfig((1.1,) * 10, 1e9, 99), [0, 1]),
    "teacache": (TeaCacheConfig(0.0, IDENTITY), TeaCacheConfig(1e9, IDENTITY), [0, 9]),
    "dbcache": (DBCacheConfig(1, 1, -1.0, 0), DBCacheConfig(1, 1, 1e9, 2), [0, 1]),
    "sencache": (SenCacheConfig(threshold=-1.0), SenCacheConfig(threshold=1e9, max_skipped=99), [0, 1, 2, 9]),
    "adacache": (AdaCacheConfig(codebook=ALL), AdaCacheConfig(codebook=((1e9, 99),)), [0, 1, 8, 9]),
}


@functools.cache
def run(config=None, executor=None):
    pipeline = PIPELINE if config is None else with_cache(PIPELINE, config)
    fn = lambda p, x, y: pipeline(p, x, y, **({} if executor is None else {"executor": executor}))
    x, trace = (fn if executor == "python" else jax.jit(fn))(PARAMS, toy.noise(), toy.LABELS)
    return np.asarray(x), np.asarray(trace.mask)


@pytest.mark.parametrize("name", TABLE)
def test_computing_always_is_the_uncached_sampler(name):
    config = TABLE[name][0]
    x, mask = run(config)
    assert mask.all()
    assert x == pytest.approx(run()[0], abs=2e-6)


@pytest.mark.parametrize("name", TABLE)
def test_computing_rarely_computes_the_forced_steps_only(name):
    _, config, forced = TABLE[name]
    x, mask = run(config)
    assert np.flatnonzero(mask).tolist() == forced
    assert np.isfinite(x).all() and not np.allclose(x, run()[0], atol=1e-4)


@pytest.mark.parametrize("name", ["delta_dit", "taylorseer", "adacache", "dbcache", "pab", "fastercache"])
def test_executors_agree(name):
    others = {"pab": PyramidAttentionBroadcastConfig(), "fastercache": FasterCacheConfig()}
    config = others.get(name) or TABLE[name][1]
    want, mask = run(config)
    for executor in ("cond", "python"):
        got, same = run(config, executor)
        assert got == pytest.approx(want, abs=2e-6) and np.array_equal(mask, same)


def test_a_pipeline_takes_one_cache_and_stays_as_it_is():
    cached = with_cache(PIPELINE, FORAConfig(2))
    assert PIPELINE.policy is None
    with pytest.raises(ValueError, match="has a cache already"):
        with_cache(cached, FORAConfig(2))
    with pytest.raises(ValueError, match="no cache"):
        freeze_plan(PIPELINE, PARAMS, toy.noise(), toy.LABELS)


def test_freeze_plan_records_decisions():
    dynamic = with_cache(PIPELINE, TeaCacheConfig(0.3, IDENTITY))
    frozen = freeze_plan(dynamic, PARAMS, toy.noise(), toy.LABELS)
    want, mask = run(TeaCacheConfig(0.3, IDENTITY))
    got, trace = jax.jit(frozen)(PARAMS, toy.noise(), toy.LABELS)
    assert 2 < mask.sum() < STEPS and np.array_equal(trace.mask, mask) and got == pytest.approx(want, abs=2e-6)


def test_uniform_masks():
    assert every(7, 3).tolist() == [1, 0, 0, 1, 0, 0, 1] and every(5, 9, warmup=2).tolist() == [1, 1, 0, 0, 0]
    for n in range(1, 31):
        mask = spread(30, n)
        assert mask.sum() == n and mask[0] and (n == 1 or mask[-1])
        assert np.ptp(np.diff(np.flatnonzero(mask))) <= 1 if n > 2 else True
    with pytest.raises(ValueError, match=r"computed must lie in 1\.\.5"):
        spread(5, 6)


def test_deepcache_plan_is_denser_around_its_center():
    mask = power_spaced(50, 10, 15.0)
    assert mask.sum() == 10 and mask[0]
    chosen = np.flatnonzero(mask)
    assert np.diff(chosen)[np.abs(chosen[:-1] - 15) < 10].mean() < np.diff(chosen).mean()


def test_magcache_plan_is_its_rule():
    rng = np.random.default_rng(0)
    curve = tuple(1 + 0.05 * rng.standard_normal(40))
    mask, rho, error, run = [], 1.0, 0.0, 0
    for i, g in enumerate(curve):
        if i < 8:
            mask.append(True)
            continue
        rho, run = rho * g, run + 1
        error += abs(1 - rho)
        mask.append(not (error <= 0.12 and run <= 2))
        if mask[-1]:
            rho, error, run = 1.0, 0.0, 0
    got = magcache.plan(curve, 0.12, 2, 0.2)
    assert got.tolist() == mask and 8 < got.sum() < 40
    with pytest.raises(ValueError, match="positive finite"):
        magcache.plan((1.0, np.nan), 0.1, 2, 0.2)


def test_magcache_calibration_measures_the_ratio_of_residuals():
    growth = lambda params, h, c, around: h * (1 + c[:, None] / 1000)  # residual = h t / 1000
    denoiser = whole(lambda *_: None)._replace(
        embed=lambda p, x, t, y: (x, t), trunk=growth, head=lambda p, h, c: 0 * h
    )
    curve = magcache.calibrate(Pipeline(denoiser, toy.flow(6)), (), toy.noise())
    t = np.asarray(toy.flow(6).t)
    assert curve == pytest.approx([1, *(t[1:] / t[:-1])], rel=1e-5)
    assert (
        magcache.interpolate((1.0, 2.0, 3.0), 5) == (1.0, 1.0, 2.0, 3.0, 3.0)
        or len(magcache.interpolate(curve, 5)) == 5
    )


def recorded_metric():
    """Input of block 0's attention along the run of a config that computes always, by hand."""
    x, metric, solver = np.asarray(toy.noise()), [], toy.flow(STEPS)
    for i in range(STEPS):
        h, c = toy.denoiser.embed(PARAMS, jnp.asarray(x), jnp.full(4, solver.t[i]), toy.LABELS)
        metric.append(np.asarray(h + c))
        out = toy.denoiser.head(PARAMS, toy.denoiser.trunk(PARAMS, h, c, lambda n, f, v: f(v)), c)
        x = x + solver.b[i, 0] * np.asarray(out)
    return metric


def test_teacache_accumulates_as_its_rule_says():
    metric = recorded_metric()
    rel = [np.abs(b - a).mean() / np.abs(a).mean() for a, b in itertools.pairwise(metric)]
    threshold, total, want = 1.5 * max(rel), 0.0, [True]
    for i, r in enumerate(rel, 1):
        total += r
        want.append(total >= threshold or i == STEPS - 1)
        total = 0.0 if want[-1] else total
    decision = teacache.teacache(threshold, IDENTITY, STEPS)
    state, got = jax.tree.map(jnp.zeros_like, decision.init(jnp.asarray(metric[0]), None)), []
    for i, m in enumerate(metric):
        flag, state = decision.decide(state, jnp.asarray(m), None, i)
        got.append(bool(flag))
    assert got == want and 2 < sum(want) < STEPS


def test_teacache_fit_and_search():
    x = np.linspace(0, 1, 30)
    fit = teacache.fit_polynomial(x, 1 - 2 * x + 3 * x**4)
    assert fit.coefficients == pytest.approx((3, 0, 0, -2, 1), abs=1e-8) and fit.r_squared == pytest.approx(1)
    with pytest.raises(ValueError, match="more than 4 finite pairs"):
        teacache.fit_polynomial(x[:4], x[:4])
    config, fit = teacache.calibrated(PIPELINE, PARAMS, toy.noise(), toy.LABELS, degree=1)
    rel = [np.abs(b - a).mean() / np.abs(a).mean() for a, b in itertools.pairwise(recorded_metric())]
    assert fit.metric == pytest.approx(rel, rel=1e-3) and 0 <= fit.r_squared <= 1
    tuned, hits = tune(PIPELINE, config, PARAMS, toy.noise(), toy.LABELS, computed=5)
    assert abs(hits.computed - 5) <= 1
    assert np.array_equal(run(dataclasses.replace(tuned))[1], hits.mask)
    with pytest.raises(ValueError, match="known beforehand"):
        tune(PIPELINE, FORAConfig(2), PARAMS, toy.noise(), toy.LABELS, computed=5)
    with pytest.raises(ValueError, match="computed must lie"):
        tune(PIPELINE, config, PARAMS, toy.noise(), toy.LABELS, computed=11)


def test_hit_rate_report():
    hits = HitRate(np.array([1, 0, 0, 1, 0], bool))
    assert (hits.computed, hits.rate, hits.longest) == (2, pytest.approx(0.6), 2)
    assert str(hits).startswith("#..#.  2 of 5 steps computed, hit rate 60%")


@pytest.mark.parametrize(
    "form, order, degree", [("taylor", 1, 1), ("newton", 1, 1), ("newton", 2, 2), ("newton", 3, 3)]
)
def test_taylorseer_is_exact_on_polynomials(form, order, degree):
    f = lambda i: jnp.float32(sum((j + 1.0) * (i / 10) ** j for j in range(degree + 1)))
    state = Forecast((jnp.float32(0),) * (order + 1), jnp.zeros(order + 1, jnp.int32), jnp.int32(0))
    for i in (0, 1, 3, 7, 10)[: order + 1]:  # uneven distances
        state = taylorseer.update(state, f(i), jnp.int32(i), form)
    for ahead in (1, 3):
        assert float(taylorseer.predict(state, state.at[0] + ahead, form)) == pytest.approx(
            float(f(int(state.at[0]) + ahead)), rel=1e-4
        )


def test_taylorseer_knows_only_what_it_has_seen():
    state = Forecast((jnp.float32(9),) * 3, jnp.zeros(3, jnp.int32), jnp.int32(0))
    state = taylorseer.update(state, jnp.float32(5), jnp.int32(0), "taylor")
    assert float(taylorseer.predict(state, jnp.int32(4), "taylor")) == 5


def test_pab_tables_are_their_rule():
    t = np.array([950, 850, 700, 600, 500, 400, 300, 90, 50])
    want = [not 100 < s < 800 or i % 2 == 0 for i, s in enumerate(t)]
    assert pab.due(t, 2, (100, 800)).tolist() == want
    assert pab.due(t, 1, (100, 800)).all()
    plain = run(PyramidAttentionBroadcastConfig(intervals=((r"blocks_\d+/attn", 1),)))[0]
    assert plain == pytest.approx(run()[0], abs=2e-6)
    assert not np.allclose(run(PyramidAttentionBroadcastConfig())[0], run()[0], atol=1e-4)


def test_fastercache_attention_extrapolates():
    wide, never = FasterCacheConfig(0.0, 0.0), FasterCacheConfig(0.5, 1e9)
    assert run(wide)[0] == pytest.approx(run()[0], abs=2e-6)
    assert not np.allclose(run(never)[0], run()[0], atol=1e-4)
    half, zero = (run(FasterCacheConfig(w, 1e9))[0] for w in (0.5, 0.0))
    assert not np.allclose(half, zero, atol=1e-6)


def picture_network(params, x, t, cond):
    return jnp.tanh(x * params + cond[:, None, None, None] + t[:, None, None, None] / 1000)


def test_fastercache_guidance_with_unit_weights_adds_the_stored_difference():
    solver, x = toy.flow(6), jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    cond, params = jnp.array([0.5, -0.5]), jnp.float32(0.7)
    pipeline = Pipeline(whole(picture_network), solver)
    unit = FasterGuidanceConfig(2.0, 0.0, interval=99, start=3, early=(1.0, 1.0), late=(1.0, 1.0))
    got, trace = jax.jit(with_cache(pipeline, unit))(params, x, cond)
    want = x
    for i in range(6):
        c = picture_network(params, want, jnp.full(2, solver.t[i]), cond)
        if i <= 3:
            stored = picture_network(params, want, jnp.full(2, solver.t[i]), jnp.zeros(2)) - c
        want = want + solver.b[i, 0] * (c + stored + 2.0 * (c - (c + stored)))
    assert trace.mask.tolist() == [1, 1, 1, 1, 0, 0]
    assert got == pytest.approx(np.asarray(want), abs=1e-5)
    always = FasterGuidanceConfig(2.0, 0.0, interval=1)
    plain = jax.jit(pipeline.replace(denoiser=guided(pipeline.denoiser, 2.0, 0.0)))(params, x, cond)[0]
    assert jax.jit(with_cache(pipeline, always))(params, x, cond)[0] == pytest.approx(np.asarray(plain), abs=1e-5)


def test_frequency_split_adds_up():
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    low, high = split_frequencies(x)
    back = jnp.fft.irfft2(low + high, s=(6, 7), axes=(-3, -2))
    assert back == pytest.approx(np.asarray(x), abs=1e-5)
    assert split_frequencies(jnp.ones((1, 8, 8, 1)))[1] == pytest.approx(np.zeros((1, 8, 5, 1)), abs=1e-4)


def test_dbcache_limits_and_first_block_form():
    assert run(DBCacheConfig(1, 0, 1e9, 0, max_continuous_cached_steps=2))[1].tolist() == [1, 0, 0] * 3 + [1]
    assert run(DBCacheConfig(1, 0, 1e9, 0, max_cached_steps=3))[1].tolist() == [1, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    first = first_block_cache(0.1)
    assert (first.first_blocks, first.last_blocks, first.threshold, first.warmup_steps) == (1, 0, 0.1, 0)
    mask = run(first_block_cache(0.2))[1]
    assert mask[0] and not mask.all()


def test_adacache_looks_up_its_codebook():
    decision = adacache.adaptive(30, "m", adacache.FAST_30, None, (4, 26))
    state = decision.init(jnp.zeros((1, 2, 1)), None)
    for i, value, distance in ((0, 1.0, 1), (1, 1.2, 4), (5, 1.3, 6), (11, 9.0, 1)):  # d = .2, .083 / 4, 5.9 / 6
        assert bool(decision.decide(state, None, None, i)[0])
        state = decision.observe(state, None, None, {"m": jnp.full((1, 2, 1), value)}, i)
        assert int(state.next) == i + distance, i
    assert not bool(decision.decide(state, None, None, 11)[0])


def test_adacache_motion_is_its_formula():
    motion = adacache.Motion(frames=2)
    r = jnp.array([[[1.0], [1.0], [3.0], [1.0]]])  # frames (1, 1) and (3, 1): m = 2 / 6
    assert float(motion.measure(r)) == pytest.approx((2 / 6 / 0.385) ** 8, rel=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        (DeltaDiTConfig(2, span=4), "span must lie in 1..3"),
        (UniformCacheConfig(0), "interval must be at least 1"),
        (AdaCacheConfig(codebook=((0.2, 2), (0.1, 1))), "rising limits"),
        (TeaCacheConfig(0.1, IDENTITY, module="layers_0"), "no module 'layers_0'"),
        (TaylorSeerCacheConfig(max_order=-1), "order >= 0"),
        (DBCacheConfig(first_blocks=4, warmup_steps=0), "leave none of 4"),
    ],
)
def test_bad_settings_are_explained(config, message):
    with pytest.raises(ValueError, match=message):
        run(config)
