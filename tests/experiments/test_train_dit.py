"""The training script of the digits: learns, resumes exactly, exports a loadable model; the shipped ones draw digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.diffusion import digits_eps, digits_flow
from experiments import train_dit
from jaxcomp.data import digits
from jaxcomp.data.embedded_dit import FOLDER, load_digits_dit
from jaxcomp.io.dit import load_dit
from jaxcomp.sampling.schedules import cosine_betas

TINY = dict(steps=6, warmup_steps=2, batch_size=8, log_every=2, eval_every=6, checkpoint_every=2, samples_per_class=2)
TINY_MODEL = dict(hidden_size=16, num_layers=1, num_heads=2, mlp_size=16)


@pytest.fixture
def config():
    config = digits_flow.get_config()
    config.update(TINY | {"sample_steps": 4})
    config.model.update(TINY_MODEL)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer counts
        yield config


def interrupt_at(monkeypatch, number):
    """The run is killed before its chunk `number`."""
    advance, calls = train_dit.advance, iter(range(100))

    def interrupted(*args):
        if next(calls) == number:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(train_dit, "advance", interrupted)


def test_resumed_run_equals_uninterrupted_run_and_is_exported(config, tmp_path, monkeypatch):
    model, whole = train_dit.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train_dit.train(config, tmp_path / "killed")
    _, resumed = train_dit.train(config, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, whole.average, resumed.average)
    reference = train_dit.load_data(config, None)[1]
    train_dit.export(config, tmp_path / "out", model, whole, reference, "command")
    found, params = load_dit(tmp_path / "out")
    assert found == model.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), params, whole.average)
    config.seed = 1
    with pytest.raises(ValueError, match="another seed"):
        train_dit.train(config, tmp_path / "killed")


def test_bad_settings_are_refused(config, tmp_path):
    config.objective = "v"
    with pytest.raises(ValueError, match="objective"):
        train_dit.train(config, tmp_path)
    config.data = "mnist"
    with pytest.raises(ValueError, match="--data_dir"):
        train_dit.load_data(config, None)


def test_noisy_samples_and_targets_agree():
    x0 = jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
    flow = train_dit.add_noise("flow", x0, jax.random.key(1))
    s = (flow.t / 1000)[:, None, None, None]
    np.testing.assert_allclose(flow.x - s * flow.target, x0, atol=1e-5)
    eps = train_dit.add_noise("eps", x0, jax.random.key(1))
    abar = jnp.asarray(np.cumprod(1 - cosine_betas()), jnp.float32)[eps.t.astype(int)][:, None, None, None]
    np.testing.assert_allclose(eps.x - jnp.sqrt(1 - abar) * eps.target, jnp.sqrt(abar) * x0, atol=1e-5)


@pytest.mark.parametrize(("objective", "module"), [("flow", digits_flow), ("eps", digits_eps)])
def test_shipped_models_draw_the_digits_that_they_are_told(objective, module):
    model, params = load_digits_dit(objective)
    record = json.loads((FOLDER / objective / "training.json").read_text())
    assert (FOLDER / objective / "model.safetensors").stat().st_size <= 1_000_000
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == record["parameters"]
    assert record["config"] == json.loads(module.get_config().to_json()) and record["agreement"] > 0.9
    config = module.get_config()
    config.update(samples_per_class=4, sample_steps=20)
    latents = digits.to_latents(digits.digits("test").images)
    agreement, sheet = train_dit.evaluate(config, model, params, digits.digits("test")._replace(images=latents))
    assert agreement >= 0.8 and sheet.shape == (330, 132, 3)


def test_unknown_objective():
    with pytest.raises(ValueError, match="'flow' or 'eps'"):
        load_digits_dit("v")
