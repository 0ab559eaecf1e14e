"""The card of the arbitrary-bit products and of decoding with them, on tiny problems."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import arbitrary_bit_matmul as experiment
from experiments import decode_speed
from experiments.cards import Row
from jaxcomp.core.leaf import nbytes
from jaxcomp.models import LlamaConfig
from pallas_kernels.arbitrary_bit_matmul.bench import Options, parse_scheme
from pallas_kernels.arbitrary_bit_matmul.shapes import Shape

TINY = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16
)


def test_errors_are_those_of_float32(monkeypatch):
    monkeypatch.setattr(experiment, "SCHEMES", ["w2a8", "w3l5a8", "w4a16g128"])
    rows = experiment.error_rows()
    assert {row.method.split(", ")[0] for row in rows} == {"w2a8", "w3l5a8", "w4a16g128"}
    assert all(0 < row.value < 1e-5 for row in rows)


def test_exact_product_follows_the_definition():
    scheme = parse_scheme("w2a16")
    codes = np.array([[0, 3, 1, 2]], np.uint8)
    found = experiment.exact_product(
        jnp.arange(4.0)[None], experiment.pack_dense(jnp.asarray(codes), 2), jnp.full((1, 1), 0.5), scheme
    )
    assert found.tolist() == [[0.5 * (1 * 1 + 2 * -1 + 3 * 0)]]


def test_bars_are_judged_from_the_rows():
    row = lambda value: Row("w4a8, xla", "4096 x 4096, 1 row, 2 cores, load 0.1", "speedup", "", value, value, value)
    assert "2 cores: 1.90x; the bar of 2.0x is missed" in experiment.departures([row(1.9)])[0]
    model = Row("w4a8g128", "embedded model, greedy, batch 1, 2 cores, load 0.1", "speedup", "", 1, 1, 1)
    assert "2 cores: 2.10x; the bar of 2.0x holds" in experiment.departures([row(2.1), model])[0]


@pytest.mark.skipif(not hasattr(experiment.os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_a_process_is_pinned_to_one_core():
    context = experiment.multiprocessing.get_context("spawn")
    with experiment.ProcessPoolExecutor(1, context, experiment.pin_to_one_core) as pool:
        assert pool.submit(experiment.usable_cores).result() == 1
    assert experiment.usable_cores() == len(experiment.os.sched_getaffinity(0))


def test_card_keeps_parts_that_are_done(monkeypatch, tmp_path):
    for name in ("SQUARE", "UP", "DOWN", "LARGE"):
        monkeypatch.setattr(experiment, name, Shape(name.lower(), 64, 128))
    monkeypatch.setattr(experiment, "SCHEMES", ["w4a8"])
    monkeypatch.setattr(experiment, "torch_peers", lambda working_set: None)
    monkeypatch.setattr(experiment, "Options", lambda rounds: Options(rounds=rounds, working_set=1 << 16))
    monkeypatch.setattr(experiment.cpu_ffi, "build", lambda: None)
    paths = dict(work=tmp_path / "work", out=tmp_path / "out")
    given = types.SimpleNamespace(parts=["errors", "decode"], rounds=1, overwrite=False, **paths)
    monkeypatch.setattr(experiment.flags, "FLAGS", given)
    monkeypatch.setattr(experiment.sys, "argv", ["", "--parts=errors,decode", "--rounds=1"])
    experiment.main([])
    monkeypatch.setattr(experiment, "measure", None)  # not called again
    experiment.main([])
    text = (tmp_path / "out" / "arbitrary_bit_matmul.md").read_text()
    assert "--parts=errors,decode --rounds=1" in text and "roofline_share" in text


def test_random_params_are_packed_and_decode(monkeypatch):
    monkeypatch.setattr(decode_speed, "BILLION", TINY)
    scheme = parse_scheme("w4a8")
    params = decode_speed.random_params(TINY, scheme)
    kernel = params["blocks_0"]["mlp"]["gate"]["kernel"]
    assert kernel.shape == (32, 64) and kernel.packed.nbytes == 32 * 64 // 2
    assert (
        params["head"]["kernel"].grid.bits == 8 and nbytes(params) < nbytes(decode_speed.random_params(TINY, None)) / 2
    )
    decoder, size = decode_speed.billion("w4a8")
    assert size == nbytes(params) and jax.block_until_ready(decoder.run()).shape[-1] >= decode_speed.STEPS


def test_timed_rows_name_every_scheme(monkeypatch):
    monkeypatch.setattr(decode_speed, "BILLION", TINY)
    built = {scheme or "float32": decode_speed.billion(scheme) for scheme in (None, "w2a8")}
    rows = decode_speed.timed_rows("tiny", built, 2)
    assert {(row.method, row.metric) for row in rows} >= {("w2a8", "speedup"), ("float32", "tokens_per_second")}
    assert next(row.value for row in rows if (row.method, row.metric) == ("float32", "speedup")) == 1


@pytest.mark.skipif(not hasattr(decode_speed.os, "sched_getaffinity"), reason="no /proc")
def test_own_peak_grows_with_what_is_held():
    before = decode_speed.own_peak()
    held = np.ones(1 << 24)
    assert decode_speed.own_peak() > min(before, held.nbytes)
