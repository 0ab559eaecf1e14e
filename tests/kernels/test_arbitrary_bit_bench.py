"""The benchmark on a tiny shape, through its command line."""

import json
import os
import subprocess
import sys

import pytest

from pallas_kernels.arbitrary_bit_matmul import bench


def test_command_line_writes_paired_results(tmp_path):
    out = tmp_path / "bench.json"
    flags = ["--shapes=64x128", "--schemes=w4a8,w2a16", "--rounds=2", "--working_set=65536", f"--out={out}"]
    module = "pallas_kernels.arbitrary_bit_matmul.bench"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-m", module, *flags], check=True, env=environment, timeout=300, capture_output=True
    )
    report = json.loads(out.read_text())
    rows = {(r["scheme"], r["implementation"]): r for r in report["results"]}
    assert report["stream_bytes_per_second"] > 0
    assert rows["dense", "float32"]["speedup_over_float32"] == 1
    packed = lambda bits: 64 * 128 * bits // 8 + 64 * 4 + 128 * 4 + 64 * 4  # weight, scale, activations, result
    assert (rows["w4a8", "xla"]["bytes"], rows["w2a16", "xla"]["bytes"]) == (packed(4), packed(2))
    assert all(r["microseconds"] > 0 and r["speedup_over_bfloat16"] > 0 for r in rows.values())


def test_schemes_and_shapes():
    assert bench.parse_scheme("w3l5a8g128") == (3, 5, 8, 128)
    assert bench.parse_scheme("w4a16") == (4, 0, None, 0)
    assert bench.parse_shape("llama7b/down")[1:] == (4096, 11008)
    with pytest.raises(ValueError, match="w4a8g128"):
        bench.parse_scheme("4bit")
    with pytest.raises(ValueError, match="expected NxK"):
        bench.parse_shape("big")
