"""The loop: three executors, guidance, correctors, export, a mesh of devices, and what the program holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_sampler as toy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.sampling import loop, schedules, solvers
from jaxcomp.sampling.corrector import Corrector, chain
from jaxcomp.sampling.denoiser import at_output, guided, module_outputs, recut, whole
from jaxcomp.sampling.explain import explain_sampler
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.policy import Decision, cached, frozen, modules, output, planned, residual

MASK = np.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
PARAMS = toy.init()


def by_norm(threshold):
    """Computes where the batch's mean |h| passes a threshold: a decision while sampling."""
    return Decision(lambda steps: None, decide=lambda state, h, c, i: (jnp.abs(h).mean() > threshold, state))


def run(executor="static", solver=None, x=None, denoiser=toy.denoiser, jit=True, **options):
    fn = lambda params, x, cond: sample(denoiser, params, x, cond, solver or toy.flow(), executor=executor, **options)
    fn = jax.jit(fn) if jit and executor != "python" else fn
    return fn(PARAMS, toy.noise() if x is None else x, toy.LABELS)


@pytest.mark.parametrize(
    "store", [residual(), output(), modules(r"blocks_\d/attn")], ids=["residual", "output", "modules"]
)
def test_executors_agree_on_a_plan(store):
    policy = cached(planned(MASK), store)
    (a, ta), (b, tb), (c, tc) = (run(e, policy=policy) for e in ("static", "cond", "python"))
    assert a == pytest.approx(np.asarray(b), abs=2e-6) and a == pytest.approx(np.asarray(c), abs=2e-6)
    for trace in (ta, tb, tc):
        assert np.array_equal(trace.mask, MASK) and int(trace.nfe) == MASK.sum()
    assert not np.allclose(a, run()[0], atol=1e-3)


@pytest.mark.parametrize(
    "solver",
    [
        solvers.dpmpp_2m(schedules.vp_grid(schedules.linear_betas(100, 1e-3, 0.1), 8)),
        solvers.ddpm(schedules.vp_grid(schedules.linear_betas(100, 1e-3, 0.1), 8)),
        solvers.edm_heun(schedules.karras_grid(4)),
    ],
    ids=lambda s: s.name,
)
def test_executors_agree_on_every_kind_of_solver(solver):
    policy = cached(planned(lambda steps: np.arange(steps) % 2 == 0), residual())
    options = dict(solver=solver, policy=policy, key=jax.random.key(3), x=solver.initial(jax.random.key(2), (4, 5)))
    a, b, c = (np.asarray(run(e, **options)[0]) for e in ("static", "cond", "python"))
    scale = np.abs(a).max()
    assert a / scale == pytest.approx(b / scale, abs=2e-6) and a / scale == pytest.approx(c / scale, abs=2e-6)


def test_segments_of_long_plans_equal_unrolled_ones(monkeypatch):
    policy = cached(planned(MASK), residual())
    unrolled = run(policy=policy)[0]
    monkeypatch.setattr(loop, "UNROLL", 4)
    assert loop.segments(MASK, unroll=False) == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8)]
    assert run(policy=policy)[0] == pytest.approx(np.asarray(unrolled), abs=2e-6)


def test_decisions_while_sampling_are_one_per_batch_and_freeze():
    x = toy.noise()
    policy = cached(by_norm(0.6), residual())
    a, trace = run("cond", policy=policy)
    mask = np.asarray(trace.mask)
    assert mask[0] and 1 < mask.sum() < 8
    assert run("python", policy=policy)[0] == pytest.approx(np.asarray(a), abs=2e-6)
    assert run("static", policy=frozen(policy, mask))[0] == pytest.approx(np.asarray(a), abs=2e-6)
    repeated = run("cond", policy=policy, x=x.at[1:].set(x[0]))[1].mask  # other neighbours, another decision for x[0]
    assert repeated.shape == mask.shape and not np.array_equal(repeated, mask)
    with pytest.raises(ValueError, match="freeze_plan"):
        run("static", policy=policy)


def test_full_plan_is_the_uncached_sampler_exactly():
    full = run()[0]
    for store in (residual(), output(), modules(r"blocks_\d")):
        assert np.array_equal(run(policy=cached(planned(np.ones(8, bool)), store))[0], full)


def test_guidance_is_its_formula():
    x, t, cond, null = toy.noise(), jnp.full(4, 300.0), toy.LABELS, jnp.int32(toy.CLASSES)
    one = lambda d, cond: (lambda h, c: d.head(PARAMS, d.trunk(PARAMS, h, c, lambda n, f, h: f(h)), c))(
        *d.embed(PARAMS, x, t, cond)
    )
    conditional, uncond = one(toy.denoiser, cond), one(toy.denoiser, jnp.full(4, toy.CLASSES))
    want = uncond + 2.5 * (conditional - uncond)
    assert one(guided(toy.denoiser, 2.5, null), cond) == pytest.approx(np.asarray(want), abs=1e-6)
    assert one(guided(at_output(toy.denoiser), 2.5, null), cond) == pytest.approx(np.asarray(want), abs=1e-6)
    plain = run()[0]
    assert run(denoiser=guided(toy.denoiser, 1.0, null))[0] == pytest.approx(np.asarray(plain), abs=1e-5)


def test_recut_changes_nothing_but_the_cut():
    cut = recut(toy.denoiser, first=1, last=2)
    assert run(denoiser=cut)[0] == pytest.approx(np.asarray(run()[0]), abs=1e-6)
    h, c = cut.embed(PARAMS, toy.noise(), jnp.full(4, 300.0), toy.LABELS)
    _, kept = module_outputs(lambda around: cut.trunk(PARAMS, h, c, around), r".*")
    assert sorted(kept) == ["blocks_1", "blocks_1/attn", "blocks_1/mlp"]
    with pytest.raises(ValueError, match="leave none of 4"):
        run(denoiser=recut(toy.denoiser, first=2, last=2))


def test_correctors_see_every_step_and_chain():
    halve = Corrector(on_output=lambda state, out, x, i: (out / 2, state))
    count = Corrector(init=lambda x: jnp.int32(0), on_state=lambda n, x, out, i: (x + n.astype(x.dtype), n + 1))
    solver = toy.flow()
    constant = whole(lambda params, x, t, cond: jnp.full_like(x, 2.0))
    want = np.asarray(toy.noise()) - 1.0 + sum(range(8))
    for executor in ("static", "cond", "python"):
        got, _ = run(executor, solver, denoiser=constant, corrector=chain(halve, count))
        assert got == pytest.approx(want, abs=1e-5)


def test_python_executor_reports_progress():
    seen = []
    end, _ = run("python", on_step=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == list(range(8)) and np.array_equal(seen[-1][1], end)


def test_export_round_trip():
    pytest.importorskip("flatbuffers")
    solver = solvers.ddpm(schedules.vp_grid(schedules.linear_betas(100, 1e-3, 0.1), 8))
    policy = cached(by_norm(0.5), residual())

    def fn(params, x, cond, seed):
        key = jax.random.wrap_key_data(seed)
        return sample(toy.denoiser, params, x, cond, solver, policy=policy, key=key, executor="cond")

    args = (PARAMS, toy.noise(), toy.LABELS, jax.random.key_data(jax.random.key(0)))
    fn = jax.jit(fn)
    again = jax.export.deserialize(jax.export.export(fn)(*args).serialize())
    (a, ta), (b, tb) = fn(*args), again.call(*args)
    assert np.array_equal(a, b) and np.array_equal(ta.mask, tb.mask)


def test_sharding_over_a_data_mesh_changes_nothing():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = lambda v: jax.device_put(v, NamedSharding(mesh, PartitionSpec("data")))
    x, cond = toy.noise(16), jnp.tile(toy.LABELS, 4)
    solver, policy = toy.flow(), cached(by_norm(0.8), residual())
    fn = jax.jit(lambda p, x, c: sample(toy.denoiser, p, x, c, solver, policy=policy, executor="cond"))
    (a, ta), (b, tb) = fn(PARAMS, x, cond), fn(PARAMS, place(x), place(cond))
    assert len(b.sharding.device_set) == 8
    assert 1 < int(ta.nfe) < 8 and np.array_equal(ta.mask, tb.mask)
    assert a == pytest.approx(np.asarray(b), abs=2e-6)


def test_sampler_is_differentiable():
    policy = cached(planned(MASK), residual())
    loss = lambda p, e: sample(toy.denoiser, p, toy.noise(), toy.LABELS, toy.flow(), policy=policy, executor=e)[0].sum()
    a, b = (jax.jit(jax.grad(functools.partial(loss, e=e)))(PARAMS) for e in ("static", "cond"))
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u == pytest.approx(np.asarray(v), abs=1e-4) and np.abs(u).max() > 0


def test_static_program_holds_exactly_the_trunks_of_its_plan(monkeypatch):
    program = lambda mask: explain_sampler(
        lambda p, x, y: sample(toy.denoiser, p, x, y, toy.flow(), policy=cached(planned(mask), residual())),
        PARAMS,
        toy.noise(),
        toy.LABELS,
    )
    n, full, one = (program(m) for m in (MASK, np.ones(8, bool), np.arange(8) == 0))
    assert (n.bodies, n.evaluations) == (5, 5) and full.bodies == 8 and one.bodies == 1
    assert n.conditionals == full.conditionals == 0
    per_trunk = (full.matmuls - one.matmuls) / 7
    assert per_trunk >= 2 * toy.BLOCKS and n.matmuls == one.matmuls + 4 * per_trunk
    monkeypatch.setattr(loop, "UNROLL", 4)
    scanned = program(MASK)
    assert (scanned.bodies, scanned.evaluations) == (3, 5)


def test_cond_branches_and_selects_nothing_of_trunk_size():
    fn = lambda p, x, y: sample(
        toy.denoiser, p, x, y, toy.flow(), policy=cached(by_norm(0.5), residual()), executor="cond"
    )
    program = explain_sampler(fn, PARAMS, toy.noise(64), jnp.tile(toy.LABELS, 16))
    assert program.conditionals >= 1 and program.bodies == 1 and program.evaluations is None
    assert program.largest_select < 64 * toy.WIDTH


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(x=jnp.zeros((0, 5))), "leading batch axis of at least 1"),
        (dict(x=jnp.full((4, 5), jnp.nan)), "NaN or infinity"),
        (dict(solver=solvers.ddpm(schedules.vp_grid(schedules.linear_betas(10), 4))), "pass key"),
        (dict(policy=cached(planned(MASK[:5]), residual())), "each of the solver's 8 steps, found shape \\(5,\\)"),
        (dict(policy=cached(planned(~MASK), residual())), "step 0 must compute"),
        (dict(executor="fast"), "executor 'fast' is unknown"),
        (dict(on_step=print), "executor='python'"),
        (dict(policy=cached(planned(MASK), modules("layers_.*"))), "no module of the trunk matches 'layers_"),
    ],
)
def test_bad_input_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        run(jit=False, **options)


def test_guidance_without_unconditional_branch():
    with pytest.raises(ValueError, match="unconditional branch"):
        guided(toy.denoiser, 3.0, None)
    with pytest.raises(ValueError, match="needs a condition"):
        sample(guided(toy.denoiser, 3.0, jnp.int32(3)), PARAMS, toy.noise(), None, toy.flow())
