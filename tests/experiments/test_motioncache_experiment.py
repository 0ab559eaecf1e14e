"""The claim of MotionCache on a small field whose denoiser is exact; the parts of its card; the training of the video model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.diffusion import motioncache as motioncache_config
from configs.diffusion import video_dit as training_config
from experiments import motioncache
from experiments.motioncache_worlds import Score, best, field_world, methods, reference, score, thresholds
from experiments.train_video_dit import draw, draw_times, train
from jaxcomp.data.embedded_video import load_video_dit, save_video_dit
from jaxcomp.data.shapes import random_scene, render
from jaxcomp.io.files import CheckpointError
from jaxcomp.models.video_dit import VideoDiTConfig, patchify


def small_field():
    config = motioncache_config.get_config()
    config.field.update(videos=4, tokens=16, shares=(0.125, 0.25, 0.375, 0.5, 0.75))
    config.update(threshold_count=8)
    return config


def test_scores_on_the_exact_field_differ_and_a_threshold_of_0_is_exact():
    """At half the tokens; who wins by how much is the card's to say."""
    config = small_field()
    world = field_world(config, 0)
    found, scores = reference(world), {}
    named = methods(config)
    for name in ("FlowCache", "MotionCache, x0 estimate, alpha 0.6", "random tokens, alpha 0.6"):
        ends, count = config.threshold_range, config.threshold_count
        tried = [
            score(world, found, named[name], "output", t) for t in thresholds(named[name], ends, count, found.table)
        ]
        scores[name] = best(tried, 0.5).psnr.mean()
    assert len(set(scores.values())) == 3 and all(np.isfinite(score) for score in scores.values())
    exact = score(world, found, named["MotionCache, x0 estimate, alpha 0.6"], "output", 0.0)
    assert exact.share == 1 and (exact.psnr > 100).all()


def test_the_best_score_stays_within_the_budget():
    scores = [Score(share, np.array([psnr])) for share, psnr in ((0.2, 20.0), (0.4, 30.0), (0.6, 40.0))]
    assert best(scores, 0.5).share == 0.4
    with pytest.raises(ValueError, match="at most 10% of the tokens"):
        best(scores, 0.1)


def records(**psnr):
    one = lambda value: {"psnr": [value, value + 1], "share": 0.4, "reuse": "output", "threshold": 0.1, "seconds": 1.0}
    return {("exact field", name, 0.5): [one(value)] * 3 for name, value in psnr.items()}


@pytest.mark.parametrize("psnr, verdict", [(40.0, "meets the bar: +8.0 dB"), (34.0, "MISSES the bar: +2.0 dB")])
def test_the_card_says_whether_the_bar_is_met(psnr, verdict):
    config = motioncache_config.get_config()
    results = records(FlowCache=32.0, TeaCache=35.0, **{"MotionCache, x0 estimate, alpha 0.6": psnr})
    card = motioncache.card(config, results, {})
    assert any(verdict in line for line in card.departures)
    gains = [row for row in card.rows if row.metric == "gain over FlowCache"]
    assert [row.value for row in gains] == [3.0, psnr - 32.0]
    assert any("over TeaCache" in line and f"{psnr - 35:+.2f} dB" in line for line in card.departures)


def test_worlds_are_chosen_by_name():
    assert motioncache.chosen_worlds(["moving", "field"]) == [motioncache.FIELD, motioncache.MOVING]
    with pytest.raises(ValueError, match="expected some of field, still, moving, found 'sea'"):
        motioncache.chosen_worlds(["sea"])


def tiny_training():
    config = training_config.get_config()
    config.model.update(frames=1, size=8, patch=4, width=16, depth=1, heads=2)
    config.update(
        chunks=2, steps=4, batch_size=2, warmup_steps=1, log_every=4, checkpoint_every=2, sheet_every=4, sheet_steps=3
    )
    return config


def test_training_resumes_to_the_same_parameters_and_draws_sheets(tmp_path):
    config = tiny_training()
    model, whole = train(config, tmp_path / "whole")
    _, done = train(config, tmp_path / "whole")
    assert int(done.step) == 4 and (tmp_path / "whole" / "samples_000004.png").exists()
    jax.tree.map(np.testing.assert_array_equal, whole.average, done.average)
    save_video_dit(tmp_path / "model", model.config, whole.average)
    loaded, params = load_video_dit(tmp_path / "model")
    assert loaded == model
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), params, whole.average)


def test_the_shipped_model_goes_on_with_a_video():
    """Its estimate of a noisy chunk after a given one is much nearer than the last given frame."""
    model, params = load_video_dit()
    size = model.config

    @jax.jit
    def errors(params):
        scene = random_scene(jax.random.key(5), 4, size.size)
        x0 = patchify(render(scene, 2 * size.frames, size.size), size)
        t = jnp.broadcast_to(jnp.array([0.0, 0.7]), (4, 2))
        wide = t[:, :, None, None]
        x = x0 + wide * (jax.random.normal(jax.random.key(6), x0.shape) - x0)
        clean = x - wide * model.apply({"params": params}, x, t, scene.kind)
        copied = jnp.tile(x0[:, 0, -size.frame_tokens :], (1, size.frames, 1))
        return [jnp.mean(jnp.square(guess - x0[:, 1])) for guess in (clean[:, 1], copied)]

    clean, copied = errors(params)
    assert clean < 0.5 * copied


def test_draws_depend_on_the_key_alone_and_prefixes_are_almost_clean():
    config = training_config.get_config()
    model = VideoDiTConfig(**config.model)
    drawn = jax.jit(lambda key: draw(config, model, key))
    one, two, other = (drawn(jax.random.key(seed)) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(one.x0, other.x0)
    t = draw_times(config, jax.random.key(0), 4000)
    clean = t < config.clean_time
    assert 0.35 < float(clean[:, 0].mean()) < 0.45 and not bool((~clean[:, 0] & clean[:, 1] & (t[:, 1] < 1e-3)).any())
    assert float(clean[:, -1].mean()) < 0.02


def test_a_folder_with_other_tensors_is_refused(tmp_path):
    small = VideoDiTConfig(frames=1, size=8, patch=4, width=16, depth=1, heads=2)
    save_video_dit(tmp_path, small, {"patch": {"kernel": jnp.zeros((3, 3))}})
    with pytest.raises(CheckpointError, match="that was written beside it"):
        load_video_dit(tmp_path)
