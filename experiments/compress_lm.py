"""Compresses a language model, says what it cost, and writes checkpoints that load again bit for bit.

    python -m experiments.compress_lm
    python -m experiments.compress_lm --model=FOLDER --config=configs/lm/gptq_w4.py --config.bits=3 --out=runs/x \
        --text=FILE --mesh=data:2,model:4

Writes to `--out`: `checkpoint/` (Orbax and manifest), `hf/` (safetensors as compressed-tensors lays them out), `report.html`,
`report.json`, and `stages.json`, from which a killed run goes on.
"""

import hashlib
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console

import configs.lm
from experiments import lm as experiment
from experiments import lm_report
from experiments.lm import LanguageModel, Text
from experiments.runs import launch
from experiments.stages import Stages, discard
from jaxcomp.core.leaf import is_compressed, leaves_with_paths
from jaxcomp.core.mesh import fetch, initialize_distributed, not_split, parse_mesh, placement, shard_params
from jaxcomp.core.report import Report, report
from jaxcomp.core.transform import compress
from jaxcomp.evaluate.throughput import decoder, paired
from jaxcomp.io import compressed_tensors, orbax
from jaxcomp.io.files import CheckpointError
from pallas_kernels.arbitrary_bit_matmul import cpu_ffi

CHECKPOINT, HF, NOT_WRITTEN = "checkpoint", "hf", "not written"
DEFAULT_CONFIG = pathlib.Path(configs.lm.__file__).parent / "default.py"


class Job(NamedTuple):
    """What to do, and on what.

    Attributes:
      settings: a config of `configs/lm`.
      out: output folder.
      model: Hugging Face folder; None is the embedded model.
      text: "embedded", "wikitext2" or a file, see `experiments.lm.read_texts`.
      calibration_text: a file, or None for what belongs to `text`.
      mesh: devices; None is one device.
      overwrite: discard what a run with other settings left in `out`.
    """

    settings: ConfigDict
    out: pathlib.Path
    model: str | None = None
    text: str = "embedded"
    calibration_text: str | None = None
    mesh: Mesh | None = None
    overwrite: bool = False


def compress_lm(job: Job) -> Report:
    """The whole job: load, compress, save, reload, verify, export, score, time, report.

    Raises:
      CheckpointError: the model cannot be read, or `out` holds something else.
      ValueError: a setting or a text does not fit.
    """
    texts = experiment.read_texts(job.text, job.calibration_text)
    lm = experiment.load_model(job.model, job.settings, job.mesh)
    text = experiment.load_text(lm, job.settings, texts)
    facts = describe(job)
    identity = facts | {"model_files": experiment.fingerprint(job.model), "windows": text.digest()}
    stages = Stages(job.out, identity, (CHECKPOINT, HF, lm_report.HTML, lm_report.JSON), job.overwrite, say)

    params, made = compressed_params(stages, lm, job, text)
    hf = job.out / HF
    exported = stages.run("export", lambda: export(lm, params, text, hf), lambda said: NOT_WRITTEN in said or loads(hf))
    before = stages.run("score the dense model", lambda: score(lm, lm.params, job, text))
    after = stages.run("score the compressed model", lambda: score(lm, params, job, text))
    speed = stages.run("time decoding", lambda: time_decoding(lm, params, job.settings, text))

    folders = {"original": experiment.model_folder(job.model), CHECKPOINT: job.out / CHECKPOINT, HF: job.out / HF}
    result = Report.from_json(json.dumps(made["report"])).with_sections(
        **lm_report.quality(before, after),
        **speed,
        size=lm_report.sizes(lm.params, params, folders),
        checkpoints={CHECKPOINT: "reloaded logits are bit-equal", HF: exported},
        kernels=lm_report.kernels(lm, params, text),
        settings=facts | {"seconds_by_step": made["seconds"], "device": jax.devices()[0].device_kind},
    )
    lm_report.write(result, job.out)
    return result


def describe(job: Job) -> dict[str, Any]:
    """The settings as JSON; the chain by a digest of its source."""
    mesh = "" if job.mesh is None else ",".join(f"{name}:{size}" for name, size in job.mesh.shape.items())
    where = {"model": job.model or "embedded", "text": job.text, "mesh": mesh, "jax": jax.__version__}
    return job.settings.to_dict() | {"steps": experiment.source_digest(job.settings.steps)} | where


def score(lm: LanguageModel, params: Any, job: Job, text: Text) -> dict[str, Any]:
    """The score of every window, JSON-able."""
    result = experiment.score(lm, params, job.settings, text)
    return {
        "nll": result.nll.tolist(),
        "correct": result.correct.tolist(),
        "tokens_per_window": result.tokens_per_window,
    }


def compressed_params(stages: Stages, lm: LanguageModel, job: Job, text: Text) -> tuple[Any, dict[str, Any]]:
    """(params read back from the checkpoint and verified, what the compression recorded); made anew if it is damaged."""
    work = lambda: compress_and_save(lm, job, text)
    made = stages.run("compress", work)
    try:
        return reload(lm, job.out / CHECKPOINT, text, made["logits"]), made
    except CheckpointError as error:
        say(f"{error}; compressing again")
    stages.forget("compress")
    made = stages.run("compress", work)
    return reload(lm, job.out / CHECKPOINT, text, made["logits"]), made


def compress_and_save(lm: LanguageModel, job: Job, text: Text) -> dict[str, Any]:
    """Runs the chain and saves the checkpoint; returns the report, seconds by step, and what reloaded logits must equal."""
    calibration = experiment.calibration(lm, job.settings, text)
    params = dense = lm.params
    seconds = {}
    for name, step in job.settings.steps(job.settings, lm.config).items():
        params, _, seconds[name] = compress(step, params, calibration)
        say(f"  {name}: {seconds[name]:.1f} s")
        if not any(map(is_compressed, leaves_with_paths(params).values())):
            dense = params  # only rescaled so far: errors are those of rounding these weights
    if lm.mesh is not None:
        params = shard_params(params, lm.mesh)
        for path, reason in not_split(params, lm.mesh).items():
            say(f"  {path}: replicated, {reason}")
    logits = digest(probe(lm, params, text))
    result = report(lm.params, params, sum(seconds.values()), reference=dense)
    orbax.save(job.out / CHECKPOINT, params, {"settings": describe(job), "model": lm.config.to_hf()}, overwrite=True)
    return {"report": json.loads(result.to_json()), "seconds": seconds, "logits": logits}


def reload(lm: LanguageModel, folder: pathlib.Path, text: Text, expected: str) -> Any:
    """The params of a checkpoint. Raises CheckpointError if it is damaged or its logits are not those recorded, bit for bit."""
    params, _ = orbax.restore(folder, None if lm.mesh is None else placement(lm.mesh))
    if (found := digest(probe(lm, params, text))) != expected:
        remedy = "run on the kind of device that wrote it"
        raise CheckpointError(folder, f"logits with digest {expected[:12]}", found[:12], remedy)
    return params


def probe(lm: LanguageModel, params: Any, text: Text) -> np.ndarray:
    """Logits on two calibration windows. Raises FloatingPointError if they are not finite."""
    logits = np.ascontiguousarray(fetch(jax.jit(lm.run)(params, text.calibration[:2])))
    if not np.isfinite(logits).all():
        raise FloatingPointError(
            "logits of the compressed model are NaN or infinite; check the model, or use more bits"
        )
    return logits


def digest(logits: np.ndarray) -> str:
    """Digest of all bits of an array."""
    return hashlib.sha256(logits.tobytes()).hexdigest()


def export(lm: LanguageModel, params: Any, text: Text, folder: pathlib.Path) -> str:
    """Writes `hf/` and reads it back; where the formats cannot express a leaf, says why."""
    host, failure = fetch(params), None
    if jax.process_index() == 0:
        discard(folder)
        try:
            compressed_tensors.save_pretrained(folder, lm.config, host, tokenizer=lm.tokenizer)
        except CheckpointError as error:
            failure = str(error)
    if multihost_utils.broadcast_one_to_all(np.int32(failure is not None)):
        say(f"  not exported: {failure}")
        return f"{NOT_WRITTEN}: {failure}"
    _, again = compressed_tensors.load_pretrained(folder, dtype=lm.module.dtype)
    again = again if lm.mesh is None else shard_params(again, lm.mesh)
    before, after = probe(lm, params, text), probe(lm, again, text)
    if digest(before) == digest(after):
        return "reloaded logits are bit-equal"
    return f"reloaded logits differ by at most {np.abs(after - before).max() / np.abs(before).max():.1e} of the largest"


def loads(folder: pathlib.Path) -> bool:
    """Whether an exported folder can be read."""
    try:
        compressed_tensors.load_pretrained(folder)
    except CheckpointError as error:
        say(f"{error}; exporting again")
        return False
    return True


def time_decoding(lm: LanguageModel, params: Any, settings: ConfigDict, text: Text) -> dict[str, Any]:
    """Tokens per second of the dense and the compressed model in one paired run, and the memory of both programs."""
    if jax.process_count() > 1:
        return {"decoding": "not timed: several processes share the machine"}
    prompt = text.evaluation[:1, : settings.prompt_tokens]
    decoders = {
        name: decoder(lm.module, tree, prompt, settings.decode_tokens)
        for name, tree in {"dense": lm.params, "compressed": params}.items()
    }
    times = paired({name: d.run for name, d in decoders.items()}, settings.decode_rounds)
    rows = [
        {
            "name": name,
            "tokens_per_second": float(d.tokens / np.median(times.seconds[name])),
            "bytes_of_a_step": d.memory.peak,
            "of_which_scratch": d.memory.temporaries,
        }
        for name, d in decoders.items()
    ]
    speedup = times.speedup("compressed", "dense")
    load = f"{times.load[0]:.1f} to {times.load[1]:.1f} busy processes on {times.cores} cores"
    facts = {"speedup": speedup._asdict(), "rounds": settings.decode_rounds, "machine_load": load}
    return {"decoding": rows, "decoding_paired": facts}


def build_native_kernel() -> None:
    """Builds the C++ product for few rows where it can be used: on a CPU, with one device, with a compiler."""
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        try:
            cpu_ffi.build()
        except RuntimeError as error:
            say(f"decoding in plain XLA, which is slower: {str(error).splitlines()[0]}")


def say(line: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(line, flush=True)


def define_flags() -> None:
    """The flags of the job."""
    config_flags.DEFINE_config_file(
        "config", str(DEFAULT_CONFIG), "What to do: a file of configs/lm.", lock_config=True
    )
    flags.DEFINE_string("model", None, "Hugging Face folder of a Llama-family model; without it the embedded model.")
    flags.DEFINE_string("out", "runs/compress_lm", "Output folder.")
    flags.DEFINE_string(
        "text", "embedded", "'embedded', 'wikitext2' (from JAXCOMP_DATA) or a UTF-8 file to evaluate on."
    )
    flags.DEFINE_string("calibration_text", None, "UTF-8 file to calibrate on instead of what belongs to --text.")
    flags.DEFINE_string("mesh", None, "Devices, like data:2,model:4; without it one device.")
    flags.DEFINE_boolean(
        "native_kernel", True, "On CPU, build the C++ kernel that decodes faster, once, if g++ is there."
    )
    flags.DEFINE_boolean("overwrite", False, "Discard what a run with other settings left in --out.")
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0 of several, or 'auto' on a cluster that JAX knows."
    )
    flags.DEFINE_integer("num_processes", None, "How many processes take part.")
    flags.DEFINE_integer("process_id", None, "Number of this process.")


def main(argv) -> None:
    """Runs the job; errors of the user are one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    f = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    initialize_distributed(f.coordinator, f.num_processes, f.process_id)
    mesh = parse_mesh(f.mesh) if f.mesh else None
    if f.native_kernel:
        build_native_kernel()
    job = Job(f.config, pathlib.Path(f.out), f.model, f.text, f.calibration_text, mesh, f.overwrite)
    result = compress_lm(job)
    if jax.process_index() == 0:
        console = Console()
        console.print(result.table())
        console.print(lm_report.summary(result, job.out))


if __name__ == "__main__":
    try:
        define_flags()
    except AttributeError as error:  # ml_collections wraps a KeyError: an override names no field of the config
        cause = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error
        sys.exit(f"compress_lm: unknown setting {' '.join(str(cause).split())}")
    launch(main)
