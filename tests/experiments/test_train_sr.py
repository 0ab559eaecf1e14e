"""Training of super-resolution networks: patches, stages, warm starts, and runs that are killed."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.sr import budget, embedded, rlfn, rlfn_ntire, rlfn_tiny
from configs.sr.recipe import recipe, stage
from experiments import sr, sr_budget, train_sr
from jaxcomp.data.images import ImageError, Picture, write_image
from jaxcomp.io import orbax
from jaxcomp.io.super_resolution import load_super_resolver, param_shapes, save_super_resolver

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
TINY = dict(steps=4, patch=16, batch=2, learning_rate=5e-3)


def config(**stages):
    model = dict(network="rlfn", channels=4, mid=4, num_blocks=1, esa_features=4, data_range=1.0)
    settings = recipe(model, **stages)
    settings.update(dict(contrastive_features=4, eval_size=64, log_every=2, eval_every=100, checkpoint_every=2))
    return settings


def three_stages():
    return config(
        stage_1=stage(**TINY, scale=2),
        stage_2=stage(**TINY, contrastive_weight=1e-3),
        stage_3=stage(**TINY, prune_rate=0.25, prune_every=2, loss="l2", schedule="step", halve_every=2),
    )


@pytest.fixture(autouse=True)
def promotion():
    """optax raises floats to integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of two images; the evaluation images are small."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(2):
        smooth = rng.integers(0, 256, (20, 24, 3), np.uint8)
        write_image(folder / f"{i}.png", Picture(smooth.repeat(5, 0).repeat(5, 1)))
    monkeypatch.setattr(sr, "EVALUATION", ("astronaut",))
    return str(folder)


def test_patches_are_aligned_under_all_eight_symmetries():
    low = np.arange(12 * 15 * 3, dtype=np.uint16).reshape(12, 15, 3).astype(np.uint8)
    high = low.repeat(2, 0).repeat(2, 1)
    lows, highs = next(sr.patches([sr.Pair(low, high)], 2, 5, 64, seed=0))
    assert lows.shape == (64, 5, 5, 3) and highs.shape == (64, 10, 10, 3) and highs.dtype == np.float32
    np.testing.assert_array_equal(lows.repeat(2, 1).repeat(2, 2), highs)
    windows = (
        np.lib.stride_tricks.sliding_window_view(low, (5, 5), (0, 1)).transpose(0, 1, 3, 4, 2).reshape(-1, 5, 5, 3)
    )
    found = set()
    for patch in np.round(lows * 255).astype(np.uint8):
        for symmetry in range(8):
            turned = np.rot90(patch, symmetry % 4)
            turned = turned[:, ::-1] if symmetry >= 4 else turned
            found |= {symmetry} if np.any(np.all(windows == turned, axis=(1, 2, 3))) else set()
    assert found == set(range(8))


def test_batches_depend_on_seed_and_position_alone():
    pairs = [sr.Pair(RNG.integers(0, 256, (9, 8, 3), np.uint8), RNG.integers(0, 256, (18, 16, 3), np.uint8))]
    batches = sr.patches(pairs, 2, 4, 3, seed=1)
    first, second = next(batches), next(batches)
    np.testing.assert_array_equal(next(sr.patches(pairs, 2, 4, 3, seed=1, start=1))[0], second[0])
    assert np.any(first[0] != second[0])
    with pytest.raises(ValueError, match="smaller than a patch of 9 x 9"):
        next(sr.patches(pairs, 2, 9, 3, seed=1))


def test_bundled_images_need_no_download():
    images = sr.bundled_images(sr.TRAINING + sr.EVALUATION)
    assert len(images) == 11 and all(x.dtype == np.uint8 and x.shape[2] == 3 for x in images.values())
    assert sr.degrade(images["chelsea"], 4).low.shape == (75, 112, 3)
    assert sr.degrade(images["chelsea"], 4).high.shape == (300, 448, 3)


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ImageError, match="found none; check --data_dir"):
        sr.folder_images(tmp_path)


def test_warm_start_keeps_what_fits_and_restarts_the_optimizer():
    first, second, _ = train_sr.plan(three_stages())
    old = jax.tree.map(lambda x: jnp.full(x.shape, 7.0), param_shapes(first.model))
    state = train_sr.begin(second, three_stages(), old)
    assert state.params["upsample"]["kernel"].shape[-1] == 48 and not np.any(state.params["upsample"]["kernel"] == 7)
    assert np.all(state.params["blocks_0"]["conv_0"]["kernel"] == 7) and state.step == 0
    assert all(not np.any(x) for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    "module, parameters", [(rlfn, 543_740), (rlfn_ntire, 317_218), (rlfn_tiny, None), (embedded, None)]
)
def test_configs_end_in_the_networks_that_they_name(module, parameters):
    stages = train_sr.plan(module.get_config())
    ends = [stage.before + stage.settings.steps for stage in stages]
    assert [stage.before for stage in stages] == [0, *ends[:-1]]
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(stages[-1].model)))
    assert count == parameters or (parameters is None and count < 100_000)


def test_budget_is_the_same_for_arms_that_are_compared():
    stages = {arm: train_sr.plan(budget.get_config(arm)) for arm in budget.ARMS}
    steps = {arm: found[-1].before + found[-1].settings.steps for arm, found in stages.items()}
    assert (
        steps["rlfn"] == steps["imdn"] == steps["ditn"]
        and steps["one_schedule"] == steps["warm_start"] == steps["contrastive"]
    )
    counts = [sr_budget.parameters(arm) for arm in budget.ARMS]
    assert max(counts) < 1.05 * min(counts)


def test_schedules():
    stages = train_sr.plan(three_stages())
    assert [round(float(stages[0].schedule(i)), 6) for i in (0, 2, 4)] == [0.005, 0.0025, 0]
    assert [round(float(stages[2].schedule(i)), 6) for i in (0, 1, 2, 3)] == [0.005, 0.005, 0.0025, 0.0025]


def test_loss_is_the_one_of_the_stage():
    stages = train_sr.plan(three_stages())
    low = jnp.asarray(RNG.uniform(0, 1, (1, 16, 16, 3)), jnp.float32)
    high = jnp.asarray(RNG.uniform(0, 1, (1, 64, 64, 3)), jnp.float32)
    params = train_sr.begin(stages[1], three_stages(), None).params
    found = stages[1].model.apply({"params": params}, low)
    constant = lambda images: (jnp.mean(images)[None],)  # every distance is one of means
    near, far = abs(found.mean() - high.mean()), abs(found.mean() - low.mean())
    contrast = min(near / far, 10)
    np.testing.assert_allclose(
        stages[1].loss(constant)(params, low, high), np.abs(found - high).mean() + 1e-3 * contrast, rtol=1e-3
    )
    np.testing.assert_allclose(stages[2].loss(constant)(params, low, high), np.square(found - high).mean(), rtol=1e-5)


def test_training_lowers_the_loss(images, tmp_path):
    settings = config(stage_1=stage(**TINY | dict(steps=40), scale=2))
    (only,) = train_sr.plan(settings)
    pairs = [sr.degrade(image, 2) for image in sr.folder_images(images).values()]
    low, high = next(sr.patches(pairs, 2, 16, 8, seed=5))
    before = only.loss(None)(train_sr.begin(only, settings, None).params, low, high)
    *_, (state, _) = train_sr.steps(only, settings, pairs, train_sr.begin(only, settings, None))
    assert only.loss(None)(state.params, low, high) < 0.7 * before


def two_stages():
    return config(
        stage_1=stage(**TINY, scale=2, contrastive_weight=1e-3),
        stage_2=stage(**TINY, prune_rate=0.25, prune_every=2, loss="l2"),
    )


@pytest.mark.parametrize("killed_at", [7, pytest.param(4, marks=pytest.mark.slow)])  # while pruning; between stages
def test_a_killed_run_ends_with_the_same_parameters(killed_at, images, tmp_path, monkeypatch, whole_run):
    patches, served = sr.patches, 0

    def dying(*args):
        nonlocal served
        for batch in patches(*args):
            if served == killed_at:
                raise KeyboardInterrupt
            served += 1
            yield batch

    monkeypatch.setattr(sr, "patches", dying)
    with pytest.raises(KeyboardInterrupt):
        train_sr.train(two_stages(), tmp_path / "run", images)
    monkeypatch.setattr(sr, "patches", patches)
    done = train_sr.train(two_stages(), tmp_path / "run", images)
    assert jax.tree.all(jax.tree.map(np.array_equal, done.params, whole_run.params))


WHOLE = {}


@pytest.fixture
def whole_run(images, tmp_path):
    """The same run, not interrupted; once per session, its images are those of every test."""
    if not WHOLE:
        WHOLE["run"] = train_sr.train(two_stages(), tmp_path / "whole", images)
        WHOLE["events"] = list((tmp_path / "whole" / "stage_2").glob("events.out.tfevents*"))
    return WHOLE["run"]


def test_pruning_leaves_a_smaller_network_and_events(whole_run):
    assert whole_run.model.channels == 3 and whole_run.model.scale == 4
    assert jax.tree.map(jnp.shape, whole_run.params) == jax.tree.map(jnp.shape, param_shapes(whole_run.model))
    assert np.isfinite(whole_run.score.psnr) and set(whole_run.score.psnrs) == {"astronaut"}
    assert WHOLE["events"]


SHORT = """
from configs.sr import embedded
from configs.sr.recipe import stage

def get_config():
    config = embedded.get_config()
    config.update(dict(stages=dict(stage_1=stage(steps=2, patch=16, batch=1)), eval_size=64))
    del config.stages["stage_2"]
    return config
"""


def test_command_trains_scores_and_exports(images, tmp_path):
    (tmp_path / "short.py").write_text(SHORT, encoding="utf-8")
    outputs = [
        f"--export={tmp_path / 'orbax'}",
        "--save_as=rlfn_small_x4",
        f"--safetensors={tmp_path / 'w.safetensors'}",
    ]
    command = [
        sys.executable,
        "-m",
        "experiments.train_sr",
        f"--config={tmp_path / 'short.py'}",
        f"--data_dir={images}",
    ]
    command += [f"--workdir={tmp_path / 'run'}", *outputs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "bicubic" in done.stdout and "mean over 3 images" in done.stdout
    saved, meta = orbax.restore(tmp_path / "orbax")
    assert meta["config"]["seed"] == 0 and meta["psnr_y"].keys() == {"network", "bicubic"}
    model, loaded = load_super_resolver("rlfn_small_x4", tmp_path / "w.safetensors")
    assert model.channels == 24
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), loaded, dict(saved))


def test_another_run_in_the_folder_is_refused(images, tmp_path):
    settings = config(stage_1=stage(**TINY))
    train_sr.claim(tmp_path / "run", settings)
    settings.seed = 1
    with pytest.raises(ValueError, match="another seed; choose another workdir"):
        train_sr.train(settings, tmp_path / "run", images)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(loss="l3"), r"stages.stage_1.loss: expected one of l1, l2, found 'l3'"),
        (dict(schedule="linear"), r"stage_1.schedule: expected one of cosine, step, found 'linear'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        train_sr.plan(config(stage_1=stage(**changes)))


def test_params_are_saved_under_the_name_of_their_network_only(tmp_path):
    params = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), param_shapes(train_sr.plan(embedded.get_config())[-1].model)
    )
    with pytest.raises(ValueError, match=r"not those of rlfn_ntire_x4: .* differs; choose the name"):
        save_super_resolver("rlfn_ntire_x4", tmp_path / "w.safetensors", params)
    assert not list(tmp_path.iterdir())


def test_only_rlfn_is_pruned():
    settings = config(stage_1=stage(prune_rate=0.1))
    settings.model.network = "imdn"
    with pytest.raises(ValueError, match="prune_rate: network: expected one of rlfn, found 'imdn'"):
        train_sr.plan(settings)
