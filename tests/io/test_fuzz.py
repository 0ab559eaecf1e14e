"""Hostile checkpoints: whatever the bytes, a reader returns exactly what they say or raises `CheckpointError`.

Each check draws one case. It may not end in any other exception, and its memory may not grow with forged sizes.
"""

import contextlib
import copy
import functools
import json
import math
import pathlib
import shutil
import tempfile
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcomp.core.leaf import leaves_with_paths
from jaxcomp.formats import ActivationQuantizer, Grid, QuantizedArray
from jaxcomp.io import compressed_tensors, manifest
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.huggingface import load_config, param_shapes
from jaxcomp.io.safetensors import INDEX_NAME, open_safetensors, open_sharded, save_safetensors
from jaxcomp.models.llama import Llama
from jaxcomp.models.llama_config import LlamaConfig

MEMORY = 8 << 20  # bytes; every case is a few kilobytes

DTYPES = [np.bool_, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64]
DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
SIZES = st.one_of(st.integers(-3, 20), st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**400]))
NAMES = st.sampled_from(
    ["../secret.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", "\0", "x" * 5000, "F32", "BF16"]
)
TEXT = st.text('aB0 ./\\"\0é☃😀', max_size=8)
SCALARS = st.one_of(st.none(), st.booleans(), SIZES, st.floats(allow_nan=False), NAMES, TEXT)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3))


def places(value, path=()) -> list[tuple]:
    """Paths of all nodes of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


def forge(data, value):
    """A JSON value with up to three of its nodes replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places(value)[1:] or [(None,)]))
        if last is None:
            return data.draw(VALUES)
        node = functools.reduce(lambda node, key: node[key], parents, value)
        action = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        old = node.pop(last) if isinstance(node, dict) or action == "remove" else node[last]
        if action == "replace":
            node[last] = data.draw(VALUES)
        elif action == "rename" and isinstance(node, dict):
            node[data.draw(NAMES)] = old
    return value


def corrupt(data, raw: bytes) -> bytes:
    """Bytes with a part flipped, removed, repeated or overwritten."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        stop = data.draw(st.integers(start, min(len(raw), start + 16)))
        action = data.draw(st.sampled_from(["flip", "cut", "remove", "repeat", "overwrite"]))
        if action == "flip" and raw:
            raw[start] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "cut":
            del raw[start:]
        elif action == "remove":
            del raw[start:stop]
        elif action == "repeat":
            raw[start:start] = raw[start:stop]
        elif action == "overwrite":
            raw[start:stop] = data.draw(st.binary(max_size=16))
    return bytes(raw)


def draw_tensors(data) -> dict[str, np.ndarray]:
    shapes = st.lists(st.integers(0, 5), max_size=3)
    names = data.draw(st.lists(TEXT, max_size=4, unique=True))
    tensors = {}
    for name in names:
        shape, dtype = data.draw(shapes), np.dtype(data.draw(st.sampled_from(DTYPES)))
        bits = np.frombuffer(data.draw(st.randoms()).randbytes(math.prod(shape) * dtype.itemsize), np.uint8)
        tensors[name] = (bits % 2 if dtype == np.bool_ else bits).view(dtype).reshape(shape)
    return tensors


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@contextlib.contextmanager
def bounded():
    """Fails if the block allocates more than a file of kilobytes can need."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY, f"{peak} bytes for a file of kilobytes"


def check_intact_file(data, folder: pathlib.Path):
    """An undamaged file reads back exactly, whatever the names, dtypes and shapes."""
    tensors = draw_tensors(data)
    save_safetensors(folder / "a.safetensors", tensors)
    with bounded(), open_safetensors(folder / "a.safetensors") as file:
        assert set(file.keys()) == set(tensors)
        assert all(same(file.read(name), tensor) for name, tensor in tensors.items())


def check_damaged_file(data, folder: pathlib.Path):
    """What a damaged file still yields is what the reference library finds in it."""
    path = folder / "a.safetensors"
    save_safetensors(path, draw_tensors(data), data.draw(st.none() | st.just({"note": "text"})))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if data.draw(st.booleans()):
        raw = corrupt(data, raw)
    else:
        header = json.dumps(forge(data, json.loads(raw[8 : 8 + length]))).encode()
        length = data.draw(st.one_of(st.just(len(header)), st.integers(0, 2**64 - 1)))
        raw = length.to_bytes(8, "little") + header + raw[8 + int.from_bytes(raw[:8], "little") :]
    path.write_bytes(raw)
    with bounded(), open_safetensors(path) as file:
        reference = dict(safetensors.deserialize(raw))
        assert set(file.keys()) == set(reference)
        for name, found in reference.items():
            array = file.read(name)
            assert list(array.shape) == found["shape"] and array.tobytes() == bytes(found["data"])


def check_index(data, folder: pathlib.Path):
    """A forged index never adds, loses or swaps a tensor, nor reaches a file outside the folder."""
    truth = {name: np.full(3, i) for i, name in enumerate("abcd")}
    files = {"model-1.safetensors": "ab", "model-2.safetensors": "cd"}
    model = folder / "model"
    model.mkdir()
    save_safetensors(folder / "secret.safetensors", {"a": np.full(3, 99), "b": np.full(3, 99)})
    for file, names in files.items():
        save_safetensors(model / file, {name: truth[name] for name in names})
    first = data.draw(st.just("model-1.safetensors") | NAMES)
    index = {"metadata": {}, "weight_map": {**dict.fromkeys("ab", first), **dict.fromkeys("cd", "model-2.safetensors")}}
    index = forge(data, index) if data.draw(st.booleans()) else index
    raw = json.dumps(index).encode()
    (model / INDEX_NAME).write_bytes(corrupt(data, raw) if data.draw(st.booleans()) else raw)
    victim = model / data.draw(st.sampled_from(sorted(files)))
    match data.draw(st.sampled_from(["keep", "keep", "remove", "damage", "link"])):
        case "remove":
            victim.unlink()
        case "damage":
            victim.write_bytes(corrupt(data, victim.read_bytes()))
        case "link":
            victim.unlink()
            victim.symlink_to(folder / "secret.safetensors")
    with bounded(), open_sharded(model) as shards:
        assert all(99 not in shards.read(name) for name in shards.keys())
        named = json.loads((model / INDEX_NAME).read_bytes())["weight_map"]
        assert {name: shards.file_of(name).name for name in shards.keys()} == named


@functools.cache
def sound_manifest() -> manifest.Manifest:
    w = jnp.ones((8, 32))
    act = ActivationQuantizer(Grid(8, symmetric=False), jnp.float32(1), jnp.float32(3))
    params = {
        "q": {"kernel": QuantizedArray.quantize(w, Grid(3, 5, False, 8), (1,), act)},
        "k": {"bias": jnp.ones(3, jnp.bfloat16)},
    }
    files = {"d/0a": manifest.FileSpec(100, "0" * 64), "_METADATA": manifest.FileSpec(7, "f" * 64)}
    return manifest.Manifest("arrays-1", manifest.describe(params)[0], files, {"method": "rtn", "rate": 0.5})


def check_manifest(data, folder: pathlib.Path):
    """A damaged manifest is the original or an error; a forged one with a good digest is consistent or an error."""
    manifest.write(folder, sound_manifest())
    path = folder / manifest.NAME
    forged = data.draw(st.booleans())
    if forged:
        body = forge(data, {k: v for k, v in json.loads(path.read_bytes()).items() if k != "sha256"})
        body = body if isinstance(body, dict) else {}
        path.write_text(json.dumps(body | {"sha256": manifest._digest(body)}))
    else:
        path.write_bytes(corrupt(data, path.read_bytes()))
    with bounded():
        found = manifest.read(folder)
        specs = {(p, name): spec for p, leaf in found.leaves.items() for name, spec in leaf.arrays.items()}
        structs = {key: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for key, spec in specs.items()}
        tree = manifest.assemble(found.leaves, structs, path)
    assert forged or found == sound_manifest()
    assert manifest.describe(tree)[0].keys() == found.leaves.keys()


CONFIG = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, max_len=16)


def check_config(data, folder: pathlib.Path):
    """A config.json is a usable `LlamaConfig` or an error."""
    raw = json.dumps(forge(data, CONFIG.to_hf())).encode()
    (folder / "config.json").write_bytes(corrupt(data, raw) if data.draw(st.booleans()) else raw)
    with bounded():
        config = load_config(folder)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    assert all(type(getattr(config, name)) is int and getattr(config, name) > 0 for name in sizes)


def check_finite_flag(data, folder: pathlib.Path):
    """`finite=True` refuses a tensor exactly when it holds NaN or infinity."""
    tensors = draw_tensors(data)
    save_safetensors(folder / "a.safetensors", tensors)
    with bounded(), open_safetensors(folder / "a.safetensors") as file:
        for name, tensor in tensors.items():
            wide = tensor.astype(np.float64)
            if np.isfinite(wide).all():
                assert same(file.read(name, finite=True), tensor)
            else:
                with pytest.raises(CheckpointError, match="finite numbers"):
                    file.read(name, finite=True)


@functools.cache
def sound_model() -> tuple[dict, dict]:
    """config.json and tensors of a quantized model."""
    params = Llama(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    mlp = params["blocks_0"]["mlp"]
    mlp["up"]["kernel"] = QuantizedArray.quantize(mlp["up"]["kernel"], Grid(4, group_size=16, symmetric=False), (0,))
    mlp["down"]["kernel"] = QuantizedArray.quantize(mlp["down"]["kernel"], Grid(3), (0,), ActivationQuantizer(Grid(8)))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "m"
        compressed_tensors.save_pretrained(folder, CONFIG, params)
        with open_sharded(folder) as file:
            return json.loads((folder / "config.json").read_text()), {k: np.array(file.read(k)) for k in file.keys()}


def check_model(data, folder: pathlib.Path):
    """A quantized model with forged config or tensors loads to leaves of the stated shapes, all finite, or is an error."""
    config, tensors = sound_model()
    tensors = dict(tensors)
    config = config | {"quantization_config": forge(data, config["quantization_config"])}
    name = data.draw(st.sampled_from(sorted(tensors)))
    action = data.draw(st.sampled_from(["keep", "keep", "remove", "add", "reshape", "retype", "infinite"]))
    original = tensors.pop(name)
    changed = {
        "add": lambda: {name: original, f"{name}_extra": original},
        "remove": lambda: {},
        "reshape": lambda: {name: original.reshape(-1)[:-1]},
        "retype": lambda: {name: original.astype(data.draw(st.sampled_from([np.uint8, np.float64, np.int64])))},
        "infinite": lambda: {name: np.full_like(original, np.inf) if original.dtype.kind == "f" else original},
    }
    tensors |= changed.get(action, lambda: {name: original})()
    (folder / "config.json").write_text(json.dumps(config))
    save_safetensors(folder / "model.safetensors", tensors)
    with bounded():
        found, params = compressed_tensors.load_pretrained(folder)
    assert found == CONFIG and action not in ("add", "remove", "reshape")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.float32)
    shapes = param_shapes(CONFIG)
    assert {path: leaf.shape for path, leaf in leaves_with_paths(params).items()} == shapes


CASES = {  # check: (cases of the fast suite, cases of the slow one)
    check_intact_file: (60, 1000),
    check_damaged_file: (150, 5000),
    check_index: (100, 2000),
    check_manifest: (100, 2500),
    check_config: (80, 2000),
    check_finite_flag: (30, 500),
    check_model: (20, 300),
}


def run(check, cases: int) -> dict[str, int]:
    """Runs `cases` cases; returns how many were read and how many refused."""
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(st.data())
    def one_case(data):
        folder = pathlib.Path(tempfile.mkdtemp())
        try:
            check(data, folder)
            outcomes["read"] += 1
        except CheckpointError as error:
            assert len(str(error)) < 4000
            outcomes["refused"] += 1
        finally:
            shutil.rmtree(folder)

    one_case()
    assert sum(outcomes.values()) >= cases * 0.9
    return outcomes


@pytest.mark.parametrize("check", CASES, ids=lambda check: check.__name__)
def test_fuzz(check):
    run(check, CASES[check][0])


@pytest.mark.slow
@pytest.mark.parametrize("check", CASES, ids=lambda check: check.__name__)
def test_fuzz_long(check, record_property):
    outcomes = run(check, CASES[check][1])
    record_property("outcomes", outcomes)
    print(check.__name__, outcomes)
