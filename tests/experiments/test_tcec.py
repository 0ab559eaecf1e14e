"""The compensation experiments: gains on the shipped digits, overhead, cards; the noises of all purposes differ."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.diffusion import cache_quantization as matrix_config
from configs.diffusion import tcec as tcec_config
from experiments import cache_quantization, tcec
from experiments.stages import Stages
from jaxcomp.core.apply import compressed
from jaxcomp.sampling.compensate.tcec import Tcec
from jaxcomp.sampling.compensate.tcec import tcec as corrector
from jaxcomp.sampling.explain import explain_sampler
from jaxcomp.sampling.pipeline import Pipeline


@pytest.fixture
def config():
    config = tcec_config.get_config()
    config.update(seeds=(0,), calibration=32, evaluation=16)
    config.settings = {"DDIM-50 W3A4": config.settings["DDIM-50 W3A4"]}
    config.bars = {"DDIM-50 W3A4": 1.0}
    return config


def test_noises_of_all_purposes_and_seeds_differ():
    drawn = [
        tcec.draw_noises(seed, purpose, 2).x for seed in (0, 1) for purpose in ("quantize", "calibrate", "evaluate")
    ]
    flat = np.stack(drawn).reshape(6, -1)
    assert len(np.unique(flat[:, 0])) == 6


def test_all_corrections_are_scored_on_noises_that_they_have_not_seen(config, tmp_path):
    stages = Stages(tmp_path / "out", config.to_dict(), log=lambda line: None)
    results = tcec.run_all(config, stages)
    records = results["DDIM-50 W3A4"]
    mean = {method: tcec.table(records, method).mean() for method in records[0]["psnr"]}
    assert {tcec.NONE, tcec.LS2} < mean.keys() and all(10 < psnr < 40 for psnr in mean.values())
    assert mean[tcec.LS2] != mean[tcec.NONE]
    errors = records[0]["errors"]
    assert errors["first_order"][-1] < 1 < errors["without_jacobian"][-1]
    assert errors["cumulative"][0] == 0 < errors["cumulative"][-1]
    card = tcec.card(config, results)
    card.write(tmp_path)
    assert json.loads((tmp_path / "tcec.json").read_text())["rows"]
    assert any("bar +1.0 dB" in line for line in card.departures)
    assert tcec.run_all(config, stages) == results  # nothing runs twice


def test_corrector_adds_no_product_to_the_program():
    denoiser, _, params = tcec.denoiser_of("flow", 1.0)
    solver = tcec.make_solver("flow", 4)
    noises = tcec.draw_noises(0, "evaluate", 8)
    coefficients = Tcec(jnp.full((4, 2, 4), 1e-3), jnp.zeros((4, 4)))
    plain = Pipeline(denoiser, solver)
    found = [
        explain_sampler(lambda *args, p=p: compressed(lambda *a: p(*a)[0])(*args), params, *noises)
        for p in (plain, plain.replace(corrector=corrector(coefficients)))
    ]
    assert found[1].matmuls == found[0].matmuls > 0 and found[1].bodies == found[0].bodies == 4
    assert found[1].flops < 1.02 * found[0].flops


def test_one_cell_of_the_matrix():
    config = matrix_config.get_config()
    config.update(calibration=32, evaluation=8)
    record = cache_quantization.one_run(config, "W4A4", "ERTACache plan", 0)
    scores = {name: float(np.mean(found["psnr"])) for name, found in record["scores"].items()}
    assert record["computed"] == 15 and len(scores) == 5
    assert {cache_quantization.NONE, cache_quantization.BOTH} < scores.keys()
    assert all(10 < psnr < 40 for psnr in scores.values()) and len(set(scores.values())) == 5


def test_full_precision_without_cache_is_exact():
    config = matrix_config.get_config()
    config.update(calibration=4, evaluation=4)
    record = cache_quantization.one_run(config, "FP32", "no cache", 0)
    assert set(record["scores"]) == {"none"} and max(record["scores"]["none"]["relative_error"]) < 1e-6


def test_matrix_card(tmp_path):
    config = matrix_config.get_config()
    config.update(seeds=(0,), caches=("no cache", "uniform"))
    config.precisions = {"FP32": config.precisions["FP32"]}
    scores = lambda names: {name: {"psnr": [20.0, 22.0], "relative_error": [0.1, 0.2]} for name in names}
    results = {
        ("FP32", "no cache"): [{"scores": scores(["none"]), "computed": 30, "elapsed": 1.0}],
        ("FP32", "uniform"): [{"scores": scores(["none", "ls2"]), "computed": 15, "elapsed": 1.0}],
    }
    timing = {
        "speedup": {"FP32, uniform": [2.0, 1.9, 2.1]},
        "overhead": {"FP32, uniform, ls2": [1.0, 0.9, 1.1]},
        "elapsed": 1.0,
    }
    card = cache_quantization.card(config, results, timing)
    card.write(tmp_path)
    assert {row.metric for row in card.rows} == {"psnr", "relative_error", "computed_steps", "speedup", "time ratio"}
    assert any("uniform: 21.00 dB" in line for line in card.departures)


def test_models_are_pytrees_of_their_params():
    denoiser, _, params = tcec.denoiser_of("flow", 1.0)
    model = tcec.Model(denoiser, params)
    assert len(jax.tree.leaves(model)) == len(jax.tree.leaves(params))
    corrected = dataclasses.replace(model, corrector=corrector(Tcec(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1)))))
    assert jax.tree.structure(model) != jax.tree.structure(corrected)
