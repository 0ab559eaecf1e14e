"""ABQ-LLM, OmniQuant and AffineQuant on tiny decoders: what they start from, what they gain, what they leave behind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcomp.core import progress
from jaxcomp.core.apply import compressed
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import is_compressed, leaves_with_paths
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import chain, compress
from jaxcomp.formats import Grid
from jaxcomp.formats.grid import encode
from jaxcomp.models import Llama, LlamaConfig, layer_table, stack_layers
from jaxcomp.models.outliers import inject_outliers
from jaxcomp.quantize import (
    LINEAR,
    LLAMA,
    Rates,
    Scheme,
    abq,
    affinequant,
    omniquant,
    quantized_attention,
    rtn,
    smoothquant,
)
from jaxcomp.quantize.affinequant import Affine
from jaxcomp.quantize.learned import BLOCKS
from jaxcomp.quantize.let import NAMES, Rescaling
from jaxcomp.quantize.losses import Objective
from jaxcomp.quantize.student import DOWN, Recipe, Student

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
CONFIG = LlamaConfig(**SIZES)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 12)), jnp.int32)
SMALL = LlamaConfig(**SIZES | dict(num_layers=1))
LEARN = dict(epochs=20, batch_size=2, rates=Rates(1.5e-2, 3e-2, 3e-2))


@functools.cache
def params_of(config):
    """Random params with two outlier channels in every norm."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), TOKENS)["params"]
    gain = 0.0 if config.traits.gemma else 1.0
    draw = lambda s: rng.normal(gain, 0.1, s.shape) if len(s.shape) == 1 else rng.normal(0.0, 0.3, s.shape)
    params = jax.tree.map(lambda s: jnp.asarray(draw(s), jnp.float32), shapes)
    return inject_outliers(config, params, jax.random.key(1), factor=8.0)


def calibration(config, tokens=TOKENS, **options):
    model = Llama(config, **options)
    return Calibration(lambda params, tokens: model.apply({"params": params}, tokens), [tokens[:2], tokens[2:]])


@functools.partial(jax.jit, static_argnums=(0, 2))
def logits(config, params, kv_bits=16):
    model = Llama(config, quantized_attention(kv_bits))
    return compressed(lambda params: model.apply({"params": params}, TOKENS))(params)


def error(config, params, kv_bits=16):
    """Relative error of the logits."""
    want = logits(config, params_of(config))
    return float(jnp.linalg.norm(logits(config, params, kv_bits) - want) / jnp.linalg.norm(want))


@functools.cache
def result(make, config, *bits, **options):
    return compress(make(*bits, model=Llama(config), **options), params_of(config), calibration(config))[:2]


@functools.cache
def learned_abq():
    """(params, state, traces of the loss) of a run on both blocks."""
    traces, loss = [], Student.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "__call__", lambda *args: traces.append(1) or loss(*args))
        return *result(abq, CONFIG, 3, 6, **LEARN), len(traces)


codes = lambda params: {p: leaf.codes() for p, leaf in leaves_with_paths(params).items() if is_compressed(leaf)}


def test_at_the_start_it_is_smoothquant_and_round_to_nearest():
    config = LlamaConfig(**SIZES | dict(num_kv_heads=4, num_layers=1))
    found = leaves_with_paths(result(abq, config, 3, 8, epochs=0, clip_init=30.0)[0])  # sigmoid(30) is one
    grids = rtn(3, rules=BLOCKS, act_bits=8, symmetric=False, act_symmetric=False)
    data, params = calibration(config), params_of(config)
    want = leaves_with_paths(compress(chain(smoothquant(pairs=LLAMA + LINEAR), grids), params, data)[0])
    for path, leaf in want.items():
        if not is_compressed(leaf):
            np.testing.assert_allclose(found[path], leaf, rtol=1e-5)
            continue
        assert (found[path].grid, found[path].act.grid) == (leaf.grid, leaf.act.grid)
        assert float(jnp.mean(found[path].codes() == leaf.codes())) > 0.995, path
        np.testing.assert_allclose(found[path].scale, leaf.scale, rtol=1e-4)


def test_learning_beats_its_start_and_round_to_nearest():
    params, state, _ = learned_abq()
    assert [loss.shape for loss in state.losses.values()] == [(20,), (20,)]
    assert all(loss[-5:].mean() < 0.95 * loss[0] for loss in state.losses.values())
    grids = rtn(3, rules=BLOCKS, act_bits=6, symmetric=False, act_symmetric=False)
    rounded = compress(grids, params_of(CONFIG), calibration(CONFIG))[0]
    assert error(CONFIG, params, 6) < 0.7 * error(CONFIG, rounded, 6)


def test_equal_blocks_share_one_compilation():
    assert learned_abq()[2] == 1


def student_of(config, w_bits, a_bits, equivalence=Rescaling(), **options):
    """A block as the transforms see it, built by hand."""
    recipe = Recipe("by hand", Objective(), equivalence, kv_bits=a_bits, epochs=0, **options)
    scheme = Scheme(w_bits, symmetric=False, act_bits=a_bits, act_symmetric=False)
    kernels = [path for path in flatten_dict(params_of(config)["blocks_0"], sep="/") if path.endswith("kernel")]
    return Student(config, recipe, tuple((path, scheme) for path in sorted(kernels)))


def fake_logits(student, config, theta):
    """Logits of the float model whose blocks are rounded in floating point."""
    params = params_of(config)
    x = Llama(config).apply({"params": params}, TOKENS, method="embed_tokens")
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), layer_table(config))
        x = run_fake(student, params[f"blocks_{i}"], theta[f"blocks_{i}"], layer, x)
    return Llama(config).apply({"params": params}, x, method="logits")


@functools.partial(jax.jit, static_argnums=0)
def run_fake(student, block, theta, layer, x):
    return student.runner()(student.fake(block, theta), x, layer)[0]


def agreement(config, params, want, kv_bits):
    found = logits(config, params, kv_bits)
    return float(jnp.abs(found - want).max() / jnp.abs(want).max())


def test_everything_that_can_be_learned_is_learned():
    theta = learned_abq()[1].theta["blocks_0"]
    stats = calibration(CONFIG)(params_of(CONFIG), {"max_abs"})
    stats = {path.removeprefix("blocks_0/"): value for path, value in stats.items()}
    start = student_of(CONFIG, 3, 6).init(params_of(CONFIG)["blocks_0"], stats, compensate=True)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), theta, start)
    assert set(moved) == {"let", "clip", "compensation"} and set(moved["let"]) == set(NAMES)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_compensation_changes_nothing_at_first_and_ends_in_the_codes():
    student, block = student_of(CONFIG, 3, 6), params_of(CONFIG)["blocks_0"]
    theta = dict(learned_abq()[1].theta["blocks_0"])
    rank_one = theta.pop("compensation")
    start = {"a": jnp.zeros_like(rank_one["a"]), "b": jnp.ones_like(rank_one["b"])}

    @jax.jit
    def down(theta):
        matrix, scale, zero = student.rounding(block, theta)[1][DOWN]
        return encode(matrix, scale, zero, Grid(3, symmetric=False))

    plain, first, learned = (down(theta | more) for more in ({}, {"compensation": start}, {"compensation": rank_one}))
    np.testing.assert_array_equal(plain, first)
    assert (plain != learned).any()
    np.testing.assert_array_equal(learned, codes(learned_abq()[0])[f"blocks_0/{DOWN}"])


def test_packed_model_computes_what_was_learned():
    params, state, _ = learned_abq()
    want = fake_logits(student_of(CONFIG, 3, 6), CONFIG, state.theta)
    assert agreement(CONFIG, params, want, 6) < 1e-3


def test_rounding_offsets_stay_within_half_a_step_and_fit_better_than_nearest():
    rates = Rates(1.5e-2, 3e-2, 3e-2, rounding=2e-2)
    params, state = result(abq, CONFIG, 3, 6, learn_rounding=True, **LEARN | dict(rates=rates))
    nearest = learned_abq()[1].losses
    for name, loss in state.losses.items():
        assert loss[-1] < 0.9 * nearest[name][-1]
    student = student_of(CONFIG, 3, 6, rounding=True)
    assert agreement(CONFIG, params, fake_logits(student, CONFIG, state.theta), 6) < 1e-3
    theta, block = dict(state.theta["blocks_0"]), params_of(CONFIG)["blocks_0"]
    moved, scale, _ = student.rounding(block, theta)[1][DOWN]
    offsets = theta.pop("rounding")["mlp"]["down"]["kernel"]
    steps = (moved - student.rounding(block, theta)[1][DOWN][0]) / scale
    np.testing.assert_allclose(steps, jnp.clip(offsets, -0.5, 0.5), atol=1e-4)
    assert float(jnp.abs(steps).max()) > 0.1


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_other_families(family):
    """Biases, norms of q and k, gains of 1 + scale; five levels, packed, compute what they stand for."""
    config = LlamaConfig(**SIZES | dict(num_layers=1), family=family)
    params, state = result(abq, config, 2, 8, bit_balance=True, epochs=0)
    student = student_of(config, 2, 8, bit_balance=True)
    assert agreement(config, params, fake_logits(student, config, state.theta), 8) < 1e-3


def test_five_levels_never_set_the_third_plane_with_another():
    config = LlamaConfig(**SIZES | dict(num_layers=1), family="qwen2")
    params = result(abq, config, 2, 8, bit_balance=True, epochs=0)[0]
    found = [np.asarray(c) for c in codes(params).values()]
    assert len(found) == 7
    for c in found:
        assert set(np.unique(c)) == {0, 1, 2, 3, 4}
        assert not ((c & 4) != 0)[(c & 3) != 0].any()
    leaf = leaves_with_paths(params)["blocks_0/mlp/up/kernel"]
    assert (leaf.grid.bits, leaf.grid.levels, leaf.act.grid.bits) == (3, 5, 8)


def test_scanned_layers_give_what_unrolled_layers_give():
    model = Llama(CONFIG, scan_layers=True)
    data, params = calibration(CONFIG, scan_layers=True), stack_layers(params_of(CONFIG))
    found = compress(abq(3, 6, model=model, **LEARN), params, data)[0]
    want = stack_layers(learned_abq()[0])
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert all(float(jnp.mean(c == codes(want)[path])) > 0.99 for path, c in codes(found).items())


def test_killed_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    mse = Objective(mse_aug=0, cosine=0, cosine_aug=0, kl=0, kl_reverse=0)
    options = LEARN | dict(epochs=2, transforms=("out",), objective=mse)  # little to compile
    transform = abq(3, 6, model=Llama(CONFIG), checkpoint_dir=tmp_path, **options)
    run = lambda: compress(transform, params_of(CONFIG), calibration(CONFIG))[:2]
    track = progress.track

    def killed_in_second_block(items, stage):
        for i, item in enumerate(track(items, stage)):
            if "blocks_1" in stage and i == 1:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress, "track", killed_in_second_block)
        run()
    steps = []
    monkeypatch.setattr(
        progress, "track", lambda items, stage: steps.append((stage, len(items))) or track(items, stage)
    )
    resumed = run()
    assert [n for stage, n in steps if stage.startswith("reconstruct")] == [0, 1], "only what was lost is done again"
    jax.tree.map(np.testing.assert_array_equal, resumed, result(abq, CONFIG, 3, 6, **options))


def test_folder_of_another_run_is_refused(tmp_path):
    run = lambda params=params_of(CONFIG), **o: compress(
        abq(3, 4, model=Llama(CONFIG), checkpoint_dir=tmp_path, epochs=0, **o), params, calibration(CONFIG)
    )
    run()
    with pytest.raises(ValueError, match=r"run.json: another run, its recipe differ; use another checkpoint_dir"):
        run(alpha=0.7)
    with pytest.raises(ValueError, match="its schemes differ"):
        run(group_size=8)
    with pytest.raises(ValueError, match="its model_and_data differ"):
        run(jax.tree.map(lambda leaf: 2 * leaf, params_of(CONFIG)))


def test_omniquant_is_abq_with_fewer_ingredients():
    params, state = result(omniquant, CONFIG, 3, 6, **LEARN)
    theta = state.theta["blocks_0"]
    assert set(theta) == {"let", "clip"} and set(theta["let"]) == {"qkv", "fc1", "out", "qkt"}
    assert state.losses["blocks_0"][-5:].mean() < state.losses["blocks_0"][0]
    assert agreement(CONFIG, params, fake_logits(student_of(CONFIG, 3, 6), CONFIG, state.theta), 6) < 1e-3
    weights_only = result(omniquant, SMALL, 3, 16, epochs=0)
    assert set(weights_only[1].theta["blocks_0"]) == {"clip"}
    assert all(leaf.act is None for leaf in leaves_with_paths(weights_only[0]).values() if is_compressed(leaf))


def test_affinequant_learns_matrices_that_stay_invertible():
    params, state = result(affinequant, CONFIG, 3, 6, **LEARN)
    theta = state.theta["blocks_0"]
    assert abs(float(theta["clock"]) - 20) < 1e-4
    off = theta["let"]["out"] - jax.vmap(jnp.diag)(jnp.diagonal(theta["let"]["out"], axis1=1, axis2=2))
    assert float(jnp.abs(off).max()) > 1e-3 and float(jnp.abs(theta["let"]["qkt"][:, 1]).max()) > 1e-3
    assert state.losses["blocks_0"][-5:].mean() < state.losses["blocks_0"][0]
    want = fake_logits(student_of(CONFIG, 3, 6, Affine(epochs=20)), CONFIG, state.theta)
    assert agreement(CONFIG, params, want, 6) < 1e-3


def test_rules_options_and_dtypes_of_single_leaves():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(CONFIG))
    rules = (Rule("blocks_1/mlp/down", skip=True), Rule("blocks_0/attn/v", bits=6, group_size=8), *BLOCKS)
    transform = abq(2, 4, model=Llama(CONFIG), epochs=0, rules=rules, scale_dtype="float16")
    params = leaves_with_paths(compress(transform, half, calibration(CONFIG, dtype=jnp.bfloat16))[0])
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert not is_compressed(params[f"blocks_1/{DOWN}"])
    v, up = params["blocks_0/attn/v/kernel"], params["blocks_0/mlp/up/kernel"]
    assert (v.grid.bits, v.grid.group_size, v.scale.shape) == (6, 8, (16, 2))
    assert (up.grid.bits, up.grid.count, up.scale.dtype, up.grid.symmetric) == (2, 4, jnp.float16, False)


def test_bad_input_is_an_error_that_says_where():
    run = lambda params=params_of(CONFIG), data=calibration(CONFIG), **o: compress(
        abq(3, 4, model=Llama(CONFIG), epochs=0, **o), params, data
    )
    with pytest.raises(ValueError, match=r"abq needs calibration data"):
        run(data=None)
    with pytest.raises(ValueError, match="batch_size 3 does not divide the 4 calibration sequences"):
        run(batch_size=3)
    with pytest.raises(ValueError, match=r"integer tokens \[B, T\] of one shape"):
        run(data=Calibration(lambda params, x: x, [jnp.ones((2, 4))]))
    with pytest.raises(ValueError, match="the model has blocks_0 to blocks_1, but the tree holds"):
        run({name: leaf for name, leaf in params_of(CONFIG).items() if name != "blocks_1"})
    with pytest.raises(ValueError, match=r"blocks_0/attn/k/kernel: expected a dense array, found QuantizedArray"):
        run(learned_abq()[0])
    with pytest.raises(ValueError, match="head/kernel: only kernels of blocks are learned"):
        run(rules=(Rule("head"), *BLOCKS))
    with pytest.raises(ValueError, match="blocks_0/attn/o/kernel: the calibration's apply does not use it"):
        run(
            data=Calibration(
                lambda params, tokens: params["embed"]["embedding"][tokens] @ params["head"]["kernel"], [TOKENS]
            )
        )
