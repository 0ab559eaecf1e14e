"""The baseline card: intervals, claims from numbers, and a small run that goes on after an interruption."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.lm import baselines
from experiments import lm_baselines
from experiments.cards import Card
from experiments.lm_baselines import FP, OUTLIERS, PLAIN, card, claims, interval, run_all
from experiments.stages import Stages


def record(nats, **changes):
    return {
        "nats": {"embedded": list(nats)},
        "bits_per_weight": 4.0,
        "bytes": 10,
        "seconds": 1.0,
        "elapsed": 6.0,
    } | changes


def test_interval_of_the_perplexity_and_of_the_ratio():
    rng = np.random.default_rng(0)
    base = 3 + rng.normal(size=200)
    seeds = [record(base + 0.1 + 0.01 * s) for s in (-1, 0, 1)]
    value, low, high = interval(seeds, None, "embedded")
    assert value == pytest.approx(np.exp(base.mean() + 0.1)) and low < value < high
    assert high / low == pytest.approx(np.exp(2 * 1.96 * base.std() / 200**0.5), rel=0.1)
    value, low, high = interval(seeds, record(base), "embedded")
    assert value == pytest.approx(np.exp(0.1))
    assert (low, high) == pytest.approx((np.exp(0.09), np.exp(0.11)))  # the windows' spread cancels, the seeds' stays
    assert interval([record(base)], record(base), "embedded") == [1, 1, 1]


def test_claims_follow_the_numbers():
    results = {(PLAIN, scheme, m): [record([x])] for scheme, m, x in (("W4A16", "GPTQ", 1.0), ("W4A16", "RTN", 2.0))}
    results |= {(PLAIN, scheme, m): [record([x])] for scheme, m, x in (("W3A16", "GPTQ", 3.0), ("W3A16", "RTN", 2.0))}
    text = "GPTQ below RTN, plain model, embedded text: holds at W4A16 (2.72 against 7.39); fails at W3A16 (20.09 against 7.39)."
    assert claims(results) == [text]


def tiny(*schemes: str, seeds=(0,)) -> ConfigDict:
    config = baselines.get_config()
    chosen = {name: config.schemes[name].to_dict() for name in schemes}
    small = dict(context=32, evaluation_windows=8, calibration_windows=8, batch_size=8, seeds=seeds, schemes=chosen)
    return ConfigDict(config.to_dict() | small)


def test_every_table_of_a_small_card_has_full_precision_and_bytes(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXCOMP_DATA", raising=False)
    config = tiny("W4A4")
    made = card(config, run_all(config, Stages(tmp_path, {}, log=lambda line: None)))
    settings = {row.setting for row in made.rows}
    assert settings == {"W4A4, plain model", "W4A4, outliers injected"}
    for setting in settings:
        rows = {(row.method, row.metric): row for row in made.rows if row.setting == setting}
        assert rows[FP, "ratio to FP32, embedded text"].value == 1
        assert rows["RTN", "whole model"].value < rows[FP, "whole model"].value
        assert rows["SmoothQuant", "ratio to FP32, embedded text"].value < 1.5
    outliers = {row.method: row.value for row in made.rows if row.setting.endswith(OUTLIERS) and "ratio" in row.metric}
    assert outliers["RTN"] > 3 * outliers["SmoothQuant"]
    assert Card.from_json(made.to_json()) == made


def test_an_interrupted_experiment_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXCOMP_DATA", raising=False)
    calls, config = [], tiny("W4A4", "W3A16", seeds=(0, 1))

    def counted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return record([1.0])

    monkeypatch.setattr(lm_baselines, "one_run", counted)
    with pytest.raises(KeyboardInterrupt):
        run_all(config, Stages(tmp_path, {}, log=lambda line: None))
    results = run_all(config, Stages(tmp_path, {}, log=lambda line: None))
    runs = sum(map(len, results.values()))
    assert len(calls) == runs + 1 and runs == 2 * (1 + 7 + 5)
    assert len(results[OUTLIERS, "W4A4", "RTN"]) == 1
