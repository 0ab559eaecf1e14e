"""The benchmark on tiny heads, through its command line; the structure of its inputs."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels.sparse_attention import bench, dense, shapes


def test_command_line_writes_paired_results(tmp_path):
    out = tmp_path / "bench.json"
    flags = ["--lengths=512", "--shape=tiny", "--kinds=vertical", "--densities=0.5,1", "--segment=64", "--block_q=64"]
    flags += ["--block_k=32", "--rounds=2", "--implementations=xla", f"--out={out}"]
    command = [sys.executable, "-m", "pallas_kernels.sparse_attention.bench", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True)
    rows = {(r["method"], r["setting"]): r for r in json.loads(out.read_text())["rows"]}
    assert rows["xla", "0.5"]["density"] <= 0.5 < rows["xla", "1"]["density"] == pytest.approx(1)
    assert rows["xla", "1"]["mse"] < 1e-10 < rows["xla", "0.5"]["mse"] < 0.05
    assert {s for m, s in rows if m == "xla/phases"} == {"guide", "scores", "sort", "window", "lists"}
    assert all(r["milliseconds"] > 0 and len(r["seconds"]) == 2 for r in rows.values())
    assert rows["xla", "1"]["speedup"].keys() >= {"chunked/256", "jax.nn"}


def test_lengths_of_a_platform():
    assert bench.default_lengths("cpu") == (4096, 8192, 16384, 32768)
    assert (
        bench.default_lengths("cuda") == bench.default_lengths("tpu") == bench.LENGTHS and bench.LENGTHS[-1] == 131072
    )


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_heads_need_few_tokens(kind):
    """The regime that the method is for: most softmax mass on a small share of the tokens."""
    q, k, _ = shapes.structured_heads(np.random.default_rng(0), 1024, shapes.Shape("one", 1, 1, 64), (kind,))
    scores = np.where(np.tri(1024, dtype=bool), q[0] @ k[0].T / 8, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = -np.sort(-(p / p.sum(-1, keepdims=True)), -1)[512:]
    assert (p.cumsum(-1) < 0.95).sum(-1).mean() < 0.3 * 1024


def test_chunked_attention_is_dense_attention():
    q, k, v = shapes.structured_heads(np.random.default_rng(0), 256, shapes.SHAPES["tiny"])
    calls = dense.peers(q, k, v, 1 << 30)
    out = jax.jit(lambda *a: dense.chunked_attention(*a, block=64))(q, k, v)
    np.testing.assert_allclose(out, calls["jax.nn"]()[0].swapaxes(0, 1), atol=2e-5)
    with pytest.raises(ValueError, match="block=100 must divide N=256"):
        dense.chunked_attention(q, k, v, 100)
