"""The S2O experiment: interpolation, needles, rows and verdicts of the card."""

import json

import numpy as np
import pytest

from configs.attention.s2o import get_config
from experiments import s2o as experiment
from experiments import s2o_operator as operator
from experiments import s2o_recall
from experiments import s2o_rows as rows
from experiments.s2o_card import Bar, card
from experiments.s2o_language import Scored, density_interval, density_within, ratios
from experiments.s2o_pictures import draw
from experiments.s2o_retrieval import needle_head, recalled
from jaxcomp.attention import dense_attention, s2o
from jaxcomp.attention.heads import KINDS

POWER = [(0.5, d, d, 0.01 / d) for d in (0.05, 0.1, 0.4)]  # error = 0.01 / density


def test_interpolation_is_exact_for_power_laws_and_stays_inside():
    np.testing.assert_allclose(operator.error_at(POWER, 0.2), 0.05, rtol=1e-9)
    np.testing.assert_allclose(operator.density_at(POWER, 0.05), 0.2, rtol=1e-9)
    assert operator.error_at(POWER, 0.5) is None and operator.density_at(POWER, 1.0) is None


def test_interval_is_geometric():
    mean, low, high = operator.interval([1.0, 4.0])
    assert mean == pytest.approx(2.0) and low * high == pytest.approx(4.0) and low < 1 < 4 < high
    assert operator.interval([1.0, None]) is None


def test_needle_is_found_by_dense_attention_at_both_ends():
    for depth in (0.0, 1.0):
        head, place = needle_head(256, depth, 8, 0)
        q, k, v = operator.arrays(head)
        out = np.asarray(operator.exact(q, k, v))[:, 0]
        assert recalled(head, place, out, 8, 0) == 1.0
        blind = np.asarray(dense_attention(q, k.at[place].set(0.0), v))[:, 0]
        assert recalled(head, place, blind, 8, 0) < 0.5
    assert needle_head(256, 0.0, 8, 0)[1] == 4 and needle_head(256, 1.0, 8, 0)[1] == 247


def pieces(factors):
    """Curves error = factor * 0.01 / density for every kind and seed."""
    curve = lambda f: [(t, d, d, f * e) for t, d, _, e in POWER]
    result = {name: curve(factor) for name, factor in factors.items()}
    return {f"{kind}/{seed}": {"result": result, "cpu_seconds": 60.0} for kind in KINDS for seed in (0, 1)}


def test_card_has_ratios_losses_and_the_paper_beside_them(tmp_path):
    config = get_config()
    config.seeds, config.error = (0, 1), 0.15
    results = {"heads": pieces({"s2o": 1.0, "s2o + sub-means": 0.8, "PBS-Attn": 4.0, "MInference": 0.9, "BLASST": 2.0})}
    made = card(config, results, "cpu", tmp_path)
    found = {(r.method, r.metric): r for r in made.rows if r.setting.startswith("mean head (")}
    ratio = found["PBS-Attn", "MSE at density 0.2 / that of s2o"]
    assert ratio.value == pytest.approx(4.0) and ratio.paper == 3.82
    assert found["s2o", "density at MSE 0.15"].value == pytest.approx(0.01 / 0.15)
    assert ("PBS-Attn", "density at MSE 0.15") in found and made.minutes == pytest.approx(12.0)
    assert any("vertical head" in d and "s2o (0.05) loses to MInference" in d for d in made.departures)
    assert not any("loses to PBS" in d for d in made.departures)
    assert any("PBS-Attn over that of s2o >= 3.8: 4: met" in d for d in made.departures)
    assert made.departures[-1].endswith("not measured here: ablations, needles, recall, language.")


def test_variants_that_win_a_kind_back_are_named(tmp_path):
    config = get_config()
    config.seeds = config.ablation_seeds = (0, 1)
    heads = pieces({"s2o": 1.0, "s2o + sub-means": 0.95, "MInference": 0.9, "oracle order": 0.1})
    variants = {"segment = tile": 0.5, "stop by the maximum gain": 0.92, "local window only": 0.99}
    made = card(config, {"heads": heads, "ablations": pieces(variants)}, "cpu", tmp_path)
    text = next(d for d in made.departures if d.startswith("slash head: s2o (0.05)"))
    assert "loses to MInference (0.045)" in text and text.endswith("segment = tile (0.025).")
    assert {r.setting for r in made.rows} >= {"one change to s2o, slash head, 8192 tokens"}


def test_verdicts_say_where_the_interval_reaches():
    row = lambda *ends: rows.Row("m", "s", "x", "", *ends)
    assert Bar("a", (), 2.0).verdict(row(3.0, 2.5, 3.5)).endswith("a >= 2: 3 [2.5, 3.5]: met.")
    assert "met, but the interval" in Bar("a", (), 2.0).verdict(row(3.0, 1.5, 3.5))
    assert Bar("a", (), 2.0, below=True).verdict(row(3.0, 3.0, 3.0)).endswith("a <= 2: 3: not met.")


def test_heads_out_of_reach_are_named(tmp_path):
    config = get_config()
    config.seeds = (0, 1)
    made = card(config, {"heads": pieces({"s2o": 1.0, "s2o + sub-means": 0.5, "BLASST": 2.0})}, "cpu", tmp_path)
    text = "does not reach MSE 0.01 on 12 of 12 heads, where it ran from"
    assert any(f"s2o {text} 0.025 to 0.2" in d for d in made.departures)
    assert not any("does not reach density" in d for d in made.departures)


def test_speed_comes_from_the_kernels_own_card(tmp_path):
    assert rows.speed_rows(tmp_path / "none.json") == []
    row = dict(method="s2o", setting="16K", unit="", value=3.0, low=2.9, high=3.1)
    body = dict(name="x", paper="p", command="c", commit="0", device="d", minutes=1.0, seeds=[0])
    both = [row | {"metric": "speedup over torch"}, row | {"metric": "time"}]
    (tmp_path / "card.json").write_text(json.dumps(body | {"rows": both}))
    assert [r.metric for r in rows.speed_rows(tmp_path / "card.json")] == ["speedup over torch"]


def test_density_within_a_ratio_of_the_dense_perplexity():
    base = Scored([1.0, 2.0], 1.0)
    results = [Scored([1.0 + x, 2.0 + x], d) for d, x in ((0.1, 0.04), (0.2, 0.02), (0.4, 0.0))]
    found = density_within(results, base, 1.01)
    assert 0.2 < found < 0.4 and density_within(results[:2], base, 1.001) is None
    assert density_within(results, base, 1.5) == pytest.approx(0.1)
    assert ratios(results[0], base)[0] == pytest.approx(np.exp(0.04))
    value, low, high = density_interval(
        [Scored([1.0 + x, 2.0 + 2 * x], d) for d, x in ((0.1, 0.04), (0.4, 0.0))], base, 1.02
    )
    assert low < value < high <= 0.4 and density_interval(results[:2], base, 1.001) is None


def of_shares(density, *shares):
    return s2o_recall.Recalled(0.1, density, {f"depth {i}": [share] * 3 for i, share in enumerate(shares)})


def test_recall_is_held_against_dense_at_the_worst_question(tmp_path):
    config = get_config()
    config.recall.lengths = (2048,)
    runs = {"dense": [of_shares(1.0, 1.0, 0.8)], "s2o": [of_shares(0.1, 0.5, 0.4), of_shares(0.3, 1.0, 0.78)]}
    made = card(
        config, {"recall": {f"2048/{n}": {"result": r, "cpu_seconds": 1.0} for n, r in runs.items()}}, "cpu", tmp_path
    )
    found = {(r.method, r.metric): r.value for r in made.rows}
    assert found["s2o", "least share of dense recall"] == pytest.approx(0.975)  # 0.3 is nearest to 0.2
    assert found["s2o", "least density that keeps 95%"] == 0.3 and found["s2o", "recall, depth 1"] == 0.78
    assert any("s2o keeps at the worst depth >= 0.95: 0.975: met" in d for d in made.departures)


@pytest.mark.slow
def test_every_method_of_the_config_gives_a_curve():
    config = get_config()
    methods = config.methods(16, 32) | config.ablations(16, 32)
    for name, points in operator.sweep(methods, "mixed", 512, 0).items():
        errors = [p.error for p in points]
        assert all(0 < p.value_density <= p.density <= 1.001 for p in points), name
        assert errors[-1] <= errors[0] and np.isfinite(errors).all(), name


def test_heat_maps_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.s2o_pictures.KINDS", {"mixed": KINDS["mixed"], "local": KINDS["local"]})
    methods = {"s2o": (lambda t: s2o(threshold=t, segment=32, block_q=16, block_k=16), (0.1, 0.02))}
    draw(methods, tmp_path / "maps.png", length=128)
    assert (tmp_path / "maps.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("part", "script"), [("language", "extend_lm"), ("recall", "train_recall")])
def test_a_decoder_that_was_not_trained_is_asked_for_before_anything_runs(tmp_path, part, script):
    config = get_config()
    config[part].model = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"none: no such folder; experiments.{script} makes it"):
        experiment.identity(config, part)
