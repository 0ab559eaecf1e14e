"""Hugging Face folders: bit-exact round trips, streaming, errors that name the cure."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.formats.grid import Grid
from jaxcomp.formats.quantized import QuantizedArray
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.huggingface import load_config, load_pretrained, load_tokenizer, param_shapes, save_pretrained
from jaxcomp.io.safetensors import open_sharded, save_safetensors
from jaxcomp.models import Llama, LlamaConfig, stack_layers

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    family="gemma3_text",
    sliding_window=4,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(Llama(CONFIG, param_dtype=jnp.bfloat16).init)(jax.random.key(0), tokens)["params"]


@pytest.fixture
def folder(params, tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint16), np.asarray(y).view(np.uint16))


def rewrite(folder, change):
    """Replaces the tensors of a one-file folder by `change(tensors)`."""
    with open_sharded(folder) as tensors:
        held = {name: np.array(tensors.read(name)) for name in tensors.keys()}
    save_safetensors(folder / "model.safetensors", change(held))


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000, 1])
def test_round_trip_is_bit_exact(params, tmp_path, shard_bytes):
    save_pretrained(tmp_path / "model", CONFIG, params, shard_bytes=shard_bytes)
    config, again = load_pretrained(tmp_path / "model")
    assert config == CONFIG.from_hf(CONFIG.to_hf())
    assert_same_bits(again, params)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    expected = {10**9: 1, 1: len(jax.tree.leaves(params))}.get(shard_bytes, len(files))
    assert len(files) == expected and (files == ["model.safetensors"]) == (shard_bytes == 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_scanned_params_are_saved_alike(params, folder, tmp_path):
    save_pretrained(tmp_path / "scanned", CONFIG, stack_layers(params))
    one, other = (path / "model.safetensors" for path in (folder, tmp_path / "scanned"))
    assert one.read_bytes() == other.read_bytes()


def test_dtype_converts(params, folder):
    _, wide = load_pretrained(folder, dtype=jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), wide, params)


def test_param_shapes_are_those_of_the_model():
    params = jax.eval_shape(Llama(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    assert param_shapes(CONFIG) == shapes


def test_params_arrive_in_the_requested_sharding(params, folder):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    spec = lambda path: PartitionSpec(None, "model") if path.endswith("kernel") else PartitionSpec()
    asked = []

    def sharding(path, shape):
        asked.append((path, shape))
        return NamedSharding(mesh, spec(path))

    _, sharded = load_pretrained(folder, sharding=sharding)
    assert_same_bits(sharded, params)
    assert dict(asked) == param_shapes(CONFIG)
    kernel = sharded["blocks_1"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "model")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 12)}


MEASURE = """
import json, pathlib, sys, threading, time
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxcomp.io.huggingface import load_pretrained

def resident():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

tiny, large, sharded = sys.argv[1:]
mesh = jax.make_mesh((8,), ("model",))
split = lambda path, shape: NamedSharding(mesh, PartitionSpec("model") if path.startswith("embed") else PartitionSpec())
sharding = split if sharded == "sharded" else None
load_pretrained(tiny, sharding=sharding)
start, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
params = load_pretrained(large, sharding=sharding)[1]
done = True
thread.join()
leaves = jax.tree.leaves(params)
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(json.dumps({"peak": peak - start, "held": held, "largest": max(leaf.nbytes for leaf in leaves)}))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("whole", dict(vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_layers=8, num_heads=8)),
        (
            "sharded",
            dict(vocab_size=65_536, hidden_size=1024, intermediate_size=64, num_layers=1, num_heads=1, head_dim=8),
        ),
    ],
)
def test_host_memory_holds_the_params_and_one_slice(mode, sizes, tmp_path):
    """Loading everything first would double the memory; copying a sharded table whole would add all of it."""
    sizes = dict(tie_embeddings=True) | sizes
    for name, config in {
        "tiny": LlamaConfig(**sizes | dict(vocab_size=8, num_layers=1)),
        "large": LlamaConfig(**sizes),
    }.items():
        flat = {path: np.zeros(shape, jnp.bfloat16) for path, shape in param_shapes(config).items()}
        save_pretrained(tmp_path / name, config, jax.tree.map(jnp.asarray, unflatten(flat)), shard_bytes=2**25)
    command = [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "large", mode]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 1
    print({key: f"{value / 2**20:.0f} MiB" for key, value in found.items()})
    slack = found["largest"] // 2 if mode == "sharded" else 4 * found["largest"]
    assert slack < found["held"] / 2  # else the bound would prove nothing
    assert found["peak"] < found["held"] + slack


def unflatten(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (without(NORM), NORM, "expected the tensor to be present"),
        (lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[NORM]}, "model.layers.2.mlp.up_proj.weight", "2 layers"),
        (lambda t: t | {NORM: t[NORM][:-1]}, NORM, "expected shape (32,), found (31,)"),
        (lambda t: t | {NORM: t[NORM].astype(np.int8)}, NORM, "expected a float dtype, found int8"),
    ],
)
def test_wrong_tensors_are_named(folder, change, name, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    assert message in str(error.value) and error.value.tensor == name and str(folder) in str(error.value)


def test_redundant_tensors_are_ignored(params, folder):
    inv_freq = np.zeros(4, np.float32)
    rewrite(
        folder,
        lambda t: (
            t
            | {
                "lm_head.weight": t["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq,
            }
        ),
    )
    assert_same_bits(load_pretrained(folder)[1], params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mixtral"), "found config.json: expected a model_type of llama"),
        (dict(num_hidden_layers=10**9, layer_types=None), "expected 1000000000 layers of several tensors each"),
        (dict(num_hidden_layers=-1), "num_layers must be a positive int32"),
        (dict(hidden_size="32"), "hidden_size must be a positive int32, found '32'"),
        (dict(head_dim=10**9), "head_dim must be even and at most 65536"),
        (dict(rope_theta="big"), "config.json"),
        (dict(rope_scaling=[1]), "config.json"),
        (dict(intermediate_size=64), "expected shape (32, 64), found (32, 48)"),
    ],
)
def test_wrong_config_is_a_checkpoint_error(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    assert message in str(error.value)


def test_config_that_is_no_object_is_a_checkpoint_error(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"head": {"kernel": jnp.zeros((32, 64))}}, "expected no such param, found shape (32, 64)"),
        (lambda p: {k: v for k, v in p.items() if k != "final_norm"}, "expected shape (32,), found nothing"),
        (lambda p: p | {"final_norm": {"scale": jnp.zeros(31)}}, "expected shape (32,), found shape (31,)"),
        (
            lambda p: p | {"embed": {"embedding": QuantizedArray.quantize(p["embed"]["embedding"], Grid(4), (1,))}},
            "expected a dense array, found QuantizedArray; materialise it",
        ),
    ],
)
def test_params_that_do_not_fit_leave_no_folder(params, tmp_path, change, message):
    with pytest.raises(CheckpointError) as error:
        save_pretrained(tmp_path / "model", CONFIG, change(params))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_folder(params, tmp_path):
    unknown = jax.tree.map(lambda leaf: leaf.astype(jnp.float8_e4m3b11fnuz), params)  # no safetensors dtype
    with pytest.raises(CheckpointError, match="pack or convert it first"):
        save_pretrained(tmp_path / "model", CONFIG, unknown)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_not_overwritten(params, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="a new or empty folder"):
        save_pretrained(folder, CONFIG, params)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_tokenizer_travels_with_the_model(params, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"jax": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    save_pretrained(tmp_path / "model", CONFIG, params, tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "model").encode("jax runs jax").ids == [0, 1, 0]


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_absent_or_damaged_tokenizer_is_a_checkpoint_error(folder, text):
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(folder)
