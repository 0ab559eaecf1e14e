"""The main job on a small random model: outputs, resumption, meshes, several processes, errors."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.lm import gptq_w4, rtn_w4, smoothquant_w8a8
from experiments.compress_lm import Job, compress_lm
from jaxcomp.core.apply import compressed
from jaxcomp.core.leaf import leaves_with_paths, nbytes
from jaxcomp.core.mesh import parse_mesh
from jaxcomp.core.report import Report
from jaxcomp.core.rules import Rule
from jaxcomp.data import embedded_model, embedded_text
from jaxcomp.io import compressed_tensors, huggingface, orbax
from jaxcomp.io.files import CheckpointError
from jaxcomp.models import Llama, LlamaConfig
from jaxcomp.sparsify import magnitude

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_len=32, tie_embeddings=True
)
SMALL = dict(context=32, calibration_windows=8, evaluation_windows=16, batch_size=4, decode_tokens=3, decode_rounds=1)
TOKENS = np.arange(64, dtype=np.int32).reshape(2, 32)
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small random decoder and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    params = Llama(CONFIG).init(jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)  # sharper logits than at initialisation
    huggingface.save_pretrained(folder, CONFIG, params, tokenizer=huggingface.load_tokenizer(embedded_model.FOLDER))
    return str(folder)


def small(config=rtn_w4, **changes) -> ConfigDict:
    return ConfigDict(config.get_config().to_dict() | SMALL | changes)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """(output folder, report) of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "x"
    return out, compress_lm(Job(small(), out, model))


def logits(params) -> np.ndarray:
    return np.asarray(jax.jit(compressed(Llama(CONFIG).apply))({"params": params}, TOKENS))


def test_writes_both_checkpoints_and_both_reports(done, model):
    out, result = done
    names = sorted(p.name for p in out.iterdir())
    assert names == ["checkpoint", "hf", "report.html", "report.json", "stages.json"]
    params, meta = orbax.restore(out / "checkpoint")
    config, exported = compressed_tensors.load_pretrained(out / "hf")
    assert config == CONFIG and meta["settings"]["bits"] == 4
    np.testing.assert_array_equal(logits(params), logits(exported))
    dense = huggingface.load_pretrained(model)[1]
    assert (result.bytes_before, result.bytes_after) == (nbytes(dense), nbytes(params))
    assert Report.from_json((out / "report.json").read_text()).totals() == result.totals()
    assert (out / "report.html").read_text().count("<svg") == 4


def test_reports_what_it_cost(done):
    _, result = done
    s = result.sections
    before, after = s["perplexity"]
    assert before["low"] < before["value"] < before["high"]
    ratio = s["perplexity_ratio"]
    assert ratio["value"] == pytest.approx(after["value"] / before["value"]) and ratio["windows"] == 16
    assert 1e-4 < abs(ratio["value"] - 1) < 0.1
    assert {row["name"] for row in s["decoding"]} == {"dense", "compressed"}
    products = {"primitive": "dot_general", "kernel": "decode_matmul[w4,g32]@xla", "leaves": 14}
    assert s["kernels"] == [{"of": "a window"} | products, {"of": "one token"} | products]
    assert s["checkpoints"]["hf"] == "reloaded logits are bit-equal"
    assert s["settings"]["seed"] == 0 and s["settings"]["seconds_by_step"].keys() == {"rtn"}
    sizes = {row["what"]: row["bytes"] for row in s["size"]}
    assert sizes["compressed, in memory"] < sizes["checkpoint, on disk"] < sizes["dense, in memory"]


def test_a_second_run_does_nothing_twice(done, model, capsys):
    out, first = done
    again = compress_lm(Job(small(), out, model))
    assert capsys.readouterr().out.count("done before") == 5
    assert again.to_json() == first.to_json()


def test_other_settings_in_the_same_folder_are_refused(done, model):
    out, _ = done
    before = (out / "stages.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"bits 4 there and 3 here.*--overwrite"):
        compress_lm(Job(small(bits=3), out, model))
    assert (out / "stages.json").read_bytes() == before


def test_damaged_checkpoints_are_made_anew(model, tmp_path, capsys):
    job = Job(small(), tmp_path / "x", model)
    first = compress_lm(job)
    largest = max((tmp_path / "x" / "checkpoint").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-9] + bytes(9))
    again = compress_lm(job)
    assert "compressing again" in capsys.readouterr().out
    assert again.leaves == first.leaves
    orbax.restore(tmp_path / "x" / "checkpoint")
    (tmp_path / "x" / "hf" / "config.json").unlink()
    compress_lm(job)
    assert "exporting again" in capsys.readouterr().out
    compressed_tensors.load_pretrained(tmp_path / "x" / "hf")


def test_a_scheme_that_the_formats_lack_is_said_and_the_rest_goes_on(model, tmp_path):
    def steps(config, model):
        return {"prune": magnitude(config.density, rules=[Rule("**/down")])}

    settings = ConfigDict(small().to_dict() | {"steps": steps, "density": 0.5})
    result = compress_lm(Job(settings, tmp_path / "x", model))
    assert result.sections["checkpoints"]["hf"].startswith("not written: ")
    assert "blocks_0/mlp/down/kernel" in result.sections["checkpoints"]["hf"]
    assert not (tmp_path / "x" / "hf").exists() and (tmp_path / "x" / "report.html").exists()


def test_rescaled_weights_are_compared_after_rescaling(model, tmp_path):
    settings = small(smoothquant_w8a8, outlier_channels=2, evaluation_windows=4)
    result = compress_lm(Job(settings, tmp_path / "x", model))
    rows = {leaf.path: leaf for leaf in result.leaves}
    assert rows["blocks_0/attn_norm/scale"].kind == "array"
    assert max(leaf.relative_error for leaf in result.leaves) < 0.02


@pytest.mark.parametrize("config", [rtn_w4, gptq_w4])
def test_a_mesh_of_eight_devices_gives_the_same_result(model, tmp_path, config):
    one = compress_lm(Job(small(config), tmp_path / "one", model))
    many = compress_lm(Job(small(config), tmp_path / "many", model, mesh=parse_mesh("data:2,model:4")))
    assert_same_quality(one, many)
    trees = [orbax.restore(tmp_path / name / "checkpoint")[0] for name in ("one", "many")]
    assert differing_codes(*trees) == 0 if config is rtn_w4 else differing_codes(*trees) < 1e-3


def assert_same_quality(a: Report, b: Report):
    for name in ("perplexity", "size"):
        for row_a, row_b in zip(a.sections[name], b.sections[name], strict=True):
            keys = ("value", "low", "high") if name == "perplexity" else ()
            for key in keys:
                assert row_b[key] == pytest.approx(row_a[key], rel=1e-5)
    assert a.bytes_after == b.bytes_after


def differing_codes(a, b) -> float:
    """Share of codes that differ between two quantized trees."""
    pairs = zip(leaves_with_paths(a).values(), leaves_with_paths(b).values(), strict=True)
    different = [np.asarray(x.codes() != y.codes()).ravel() for x, y in pairs if hasattr(x, "codes")]
    return float(np.concatenate(different).mean())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "/nowhere"}, "/nowhere: expected a folder with config.json"),
        ({"text": "/nowhere.txt"}, "/nowhere.txt: expected a text file, found nothing"),
        ({"text": "short.txt"}, "evaluation text: the text has . tokens, fewer than one window of 32"),
        ({"calibration_text": "short.txt"}, "calibration text: the text has . tokens"),
    ],
)
def test_errors_name_the_remedy_and_leave_nothing(model, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("short.txt").write_text("too short")
    with pytest.raises((ValueError, OSError), match=words):
        compress_lm(Job(small(), tmp_path / "x", **{"model": model, **change}))
    assert not (tmp_path / "x").exists()


def test_weights_that_overflow_are_an_error_of_the_score(model, tmp_path):
    settings = small(dtype="float16", outlier_channels=2, outlier_factor=1e30)
    with pytest.raises((FloatingPointError, ValueError), match=r"NaN|not finite"):
        compress_lm(Job(settings, tmp_path / "x", model))
    assert not list((tmp_path / "x").iterdir())  # so that the next run may have other settings


KILLED = """
    import os, pathlib, signal, sys
    sys.path.insert(0, {root!r})
    from tests.experiments import test_compress_lm as t
    from experiments import compress_lm as job
    from jaxcomp.core.calibrate import Calibration
    from jaxcomp.io import compressed_tensors, manifest, safetensors

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if {where!r} == "calibration":
        Calibration._step = property(lambda self: die)
    elif {where!r} == "checkpoint":
        manifest.write = die  # arrays are written, the manifest is not
    elif {where!r} == "export":
        compressed_tensors.write_json = die  # tensors are written, the index is not
    elif {where!r} == "report":
        job.lm_report.write = die
    job.compress_lm(job.Job(t.small(t.gptq_w4), pathlib.Path({out!r}), {model!r}))
"""


@pytest.mark.parametrize(
    ("where", "finished"),
    [
        pytest.param("calibration", 0, marks=pytest.mark.slow),
        ("checkpoint", 0),
        pytest.param("export", 1, marks=pytest.mark.slow),
        pytest.param("report", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_then_run_again(model, tmp_path, where, finished, capsys):
    out = tmp_path / "x"
    script = textwrap.dedent(KILLED).format(root=str(ROOT), where=where, out=str(out), model=model)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr
    record = out / "stages.json"
    assert (len(json.loads(record.read_text())["stages"]) if record.exists() else 0) == finished
    if finished == 0:
        with pytest.raises(CheckpointError):
            orbax.restore(out / "checkpoint")
    assert (out / "hf").exists() == (finished > 1)
    again = compress_lm(Job(small(gptq_w4), out, model))
    assert capsys.readouterr().out.count("done before") == finished
    assert not list(out.glob(".*"))
    whole = compress_lm(Job(small(gptq_w4), tmp_path / "whole", model))
    assert again.leaves == whole.leaves
    assert again.sections["perplexity"] == whole.sections["perplexity"]


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.compress_lm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False)


def test_command_line_says_what_is_wrong():
    found = run_cli("--config.bitz=3")
    assert found.returncode == 1
    assert found.stderr.strip() == 'compress_lm: unknown setting \'bitz\' Did you mean "bits" instead of "bitz"?'


SMALL_FLAGS = [f"--config.{name}={value}" for name, value in SMALL.items()]


@pytest.mark.slow
def test_two_processes_give_the_same_result(model, tmp_path):
    one = compress_lm(Job(small(gptq_w4), tmp_path / "one", model))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--model={model}", f"--config={ROOT}/configs/lm/gptq_w4.py", f"--out={tmp_path}/two", *SMALL_FLAGS]
    flags += ["--mesh=data:2,model:4", f"--coordinator=localhost:{port}", "--num_processes=2"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.compress_lm", *flags]
    runs = [
        subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    two = Report.from_json((tmp_path / "two" / "report.json").read_text())
    assert_same_quality(one, two)
    trees = [orbax.restore(tmp_path / name / "checkpoint")[0] for name in ("one", "two")]
    assert differing_codes(*trees) < 1e-3
    assert (tmp_path / "two" / "hf" / "config.json").exists()


@pytest.mark.slow
def test_wikitext_by_the_convention_of_the_papers(data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCOMP_DATA", str(data_dir))
    result = compress_lm(Job(small(context=256), tmp_path / "x", text="wikitext2"))
    assert result.sections["settings"]["text"] == "wikitext2"
    assert 1 < result.sections["perplexity_ratio"]["value"] < 1.2
    assert embedded_text("validation")[:50] not in (tmp_path / "x" / "report.html").read_text()
