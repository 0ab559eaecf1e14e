"""The training script: learns, resumes exactly after a kill, exports a loadable model."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.lm.train_default import get_config
from experiments import train_lm
from jaxcomp.data import text
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.huggingface import load_pretrained, load_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = dict(steps=4, warmup_steps=1, log_every=2, eval_every=4, checkpoint_every=2, vocab_size=300, context=32)
TINY_MODEL = dict(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)


def tiny():
    """Settings of a run of seconds."""
    config = get_config()
    config.update(TINY)
    config.model.update(TINY_MODEL)
    return config


@pytest.fixture(scope="module")
def corpus():
    """60 kB of text."""
    short = {split: text.embedded_text(split)[:60_000] for split in text.SPLITS}
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # optax raises floats to counts
        patch.setattr(text, "embedded_text", short.__getitem__)
        yield


@pytest.fixture
def config(corpus):
    return tiny()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """(folder, model, data, state) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, *train_lm.train(tiny(), folder)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def interrupt_at(monkeypatch, number):
    """Batch `number` raises, as a kill would end the run there."""
    batches = text.batches

    def interrupted(*args, start=0):
        for i, batch in enumerate(batches(*args, start=start), start):
            if i == number:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(text, "batches", interrupted)


def test_resumed_run_equals_uninterrupted_run(config, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)  # a step past the checkpoint of step 2
        with pytest.raises(KeyboardInterrupt):
            train_lm.train(config, tmp_path)
    capsys.readouterr()
    _, _, resumed = train_lm.train(config, tmp_path)
    assert_same(resumed.params, whole[-1].params)
    assert_same(resumed.opt_state, whole[-1].opt_state)
    assert "step 2/4" not in (out := capsys.readouterr().out) and "step 4/4 train/loss" in out
    assert resumed.seconds > 0 and resumed.step == 4


def test_finished_run_is_not_trained_again(config, whole, monkeypatch):
    interrupt_at(monkeypatch, 4)
    _, _, again = train_lm.train(config, whole[0])
    assert_same(again.params, whole[-1].params)


def test_training_learns_and_logs(config, tmp_path, capsys):
    config.steps = config.checkpoint_every = 40
    model, data, state = train_lm.train(config, tmp_path)
    start = train_lm.initial_state(config, model, train_lm.make_optimizer(config))
    before, after = (train_lm.evaluate(model, s.params, data.validation).ppl for s in (start, state))
    assert after < 0.75 * before
    lines = capsys.readouterr().out.splitlines()
    assert sum("train/loss" in line for line in lines) == 20
    assert lines[-1].startswith("step 40/40 calibration/perplexity")
    assert b"calibration/perplexity" in next(tmp_path.glob("events.out.tfevents.*")).read_bytes()


def test_another_config_needs_another_workdir(config, tmp_path):
    train_lm.claim(tmp_path, config)
    train_lm.claim(tmp_path, config)
    config.learning_rate, config.model.num_layers = 1.0, 2
    with pytest.raises(
        ValueError, match=r"config\.json: the run in this folder has another learning_rate, model; choose"
    ):
        train_lm.claim(tmp_path, config)


def test_export_is_a_loadable_folder_with_its_record(config, whole, tmp_path):
    _, model, data, state = whole
    folder = tmp_path / "out"
    train_lm.export(config, folder, model, data, state, "the command")
    loaded, params = load_pretrained(folder, dtype=jnp.float32)
    assert loaded == model.config
    assert_same(params, jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), state.params))
    assert load_tokenizer(folder).encode("a loop").ids == data.tokenizer.encode("a loop").ids
    record = json.loads((folder / "training.json").read_text())
    ppl = train_lm.evaluate(model, params, data.validation).ppl
    np.testing.assert_allclose(record["validation_perplexity"]["value"], ppl, rtol=1e-5)
    assert record["steps"] == 4 and record["trained_tokens"] == 4 * config.batch_size * 32
    assert record["command"] == "the command" and record["config"]["vocab_size"] == 300
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        train_lm.export(config, folder, model, data, state, "again")


def test_tokenizer_has_the_size_asked_for_and_loses_nothing():
    tokenizer = train_lm.train_tokenizer("the theme of the thesis is there " * 20, 264)
    assert tokenizer.get_vocab_size() == 264
    assert len(tokenizer.encode(" the").ids) == 1
    for string in ("", " x\n\ty ", "naïve λ 🙂", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(string).ids) == string


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_parameters(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in (TINY | {"steps": 400, "checkpoint_every": 20}).items()]
    flags += [f"--config.model.{name}={value}" for name, value in TINY_MODEL.items()]
    command = [sys.executable, "-m", "experiments.train_lm", "--config=configs/lm/train_default.py", *flags]

    def start(name):
        return subprocess.Popen([*command, f"--workdir={tmp_path / name}", f"--export={tmp_path / name}_out"], cwd=ROOT)

    assert start("whole").wait() == 0
    killed = start("killed")
    while not list((tmp_path / "killed" / "checkpoints").glob("[0-9]*")):
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed_out").exists()
    assert start("killed").wait() == 0
    whole, resumed = (tmp_path / f"{name}_out" / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()
