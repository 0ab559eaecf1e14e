"""Exported checkpoints mean the same to compressed-tensors and transformers, and come back bit for bit."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.leaf import is_compressed, leaves_with_paths, map_leaves
from jaxcomp.formats import ActivationQuantizer, Grid, QuantizedArray
from jaxcomp.io import compressed_tensors as ct
from jaxcomp.io.compressed_tensors_leaf import decode, encode, parse_scheme, scheme_of
from jaxcomp.io.huggingface import hf_name
from jaxcomp.io.safetensors import open_sharded
from jaxcomp.models.llama import Llama, stack_layers
from jaxcomp.models.llama_config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=72, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, max_len=64
)
SQUARE = LlamaConfig(**{**vars(CONFIG), "intermediate_size": 72, "num_kv_heads": 4, "num_layers": 1})  # compiles fast
TIED = LlamaConfig(**{**vars(CONFIG), "tie_embeddings": True})


@functools.cache
def dense_params(config: LlamaConfig = CONFIG, dtype=jnp.float32) -> dict:
    return Llama(config, param_dtype=dtype).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def quantize(params: dict, rule) -> dict:
    """Quantizes kernels by `rule(path) -> QuantizedArray.quantize keywords, or None for dense`."""

    def leaf(path, w):
        options = rule(path) if path.endswith(("/kernel", "/embedding")) else None
        return w if options is None else QuantizedArray.quantize(w, contract_axes=(-2,), **options)

    return map_leaves(leaf, params)


def uniform(grid: Grid, **options):
    return lambda path: None if path.startswith(("head", "embed")) else {"grid": grid, **options}


def mixed(path: str):
    """A scheme per module: dense, 2 bits by groups, 4 bits with 8-bit tokens, 8 bits with static tensors."""
    static = ActivationQuantizer(Grid(8, symmetric=False), jnp.float32(0.25), jnp.float32(7))
    return {
        "q": {"grid": Grid(2, symmetric=False, group_size=24)},
        "k": {"grid": Grid(4), "act": ActivationQuantizer(Grid(8))},
        "v": {"grid": Grid(8), "act": ActivationQuantizer(Grid(8, symmetric=False))},
        "gate": {"grid": Grid(8, symmetric=False), "act": static},
        "down": {"grid": Grid(3, group_size=-1)},
    }.get(path.split("/")[-2])


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(leaves_with_paths(found).items(), leaves_with_paths(expected).values(), strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.dtype == y.dtype, path
            np.testing.assert_array_equal(x, y, path)


GRIDS = [Grid(b, symmetric=s, group_size=g) for b in (2, 3, 4, 8) for g in (0, 24) for s in (True, False)]
MORE = [Grid(1, symmetric=False), Grid(5), Grid(6, symmetric=False, group_size=8), Grid(4, group_size=-1)]
MORE += [Grid(8, symmetric=False, group_size=-1)]
name = lambda grid: f"w{grid.bits}{'s' if grid.symmetric else 'a'}g{grid.group_size}"


@pytest.fixture(scope="module", params=GRIDS + MORE, ids=name)
def uniformly(request, tmp_path_factory):
    """(folder, params) with one scheme for all blocks."""
    params = quantize(dense_params(SQUARE), uniform(request.param))
    folder = tmp_path_factory.mktemp("uniform") / "m"
    ct.save_pretrained(folder, SQUARE, params)
    return folder, params


def test_round_trip_is_bit_exact(uniformly):
    config, back = ct.load_pretrained(uniformly[0])
    assert config == SQUARE
    assert_same(back, uniformly[1])


def test_transformers_sees_our_weights_bit_for_bit(uniformly):
    assert_weights(load_with_transformers(uniformly[0], dequantize=True), SQUARE, uniformly[1])


@pytest.mark.parametrize("grid", [Grid(3, group_size=24), Grid(8)], ids=name)
def test_transformers_keeps_symmetric_weights_compressed(tmp_path, grid):
    """Asymmetric ones it refuses to keep compressed, also those that compressed-tensors 0.20 itself has written."""
    params = quantize(dense_params(SQUARE), uniform(grid))
    ct.save_pretrained(tmp_path / "m", SQUARE, params)
    assert_weights(load_with_transformers(tmp_path / "m", dequantize=False), SQUARE, params)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_mixed_schemes_round_trip_through_shards(tmp_path, config):
    params = quantize(dense_params(config), mixed)
    ct.save_pretrained(tmp_path / "m", config, params, shard_bytes=40_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert_same(ct.load_pretrained(tmp_path / "m")[1], params)


def test_scanned_layers_are_written_one_by_one(tmp_path):
    params = quantize(dense_params(), uniform(Grid(3, group_size=24)))
    scanned = stack_layers(params)
    assert scanned["blocks"]["mlp"]["up"]["kernel"].packed.ndim == 3
    ct.save_pretrained(tmp_path / "m", CONFIG, scanned)
    assert_same(ct.load_pretrained(tmp_path / "m")[1], params)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "levels"), [(3, 5), (3, 6), (4, 11), (8, 200)])
def test_fewer_levels_keep_their_values(bits, levels, symmetric):
    w = jax.random.normal(jax.random.key(0), (64, 48))
    leaf = QuantizedArray.quantize(w, Grid(bits, levels, symmetric, 32), (0,))
    scheme = parse_scheme(scheme_of("a/kernel", leaf) | {"targets": ["Linear"]}, "pack-quantized")
    tensors = encode(leaf, "pack-quantized")
    back = decode(lambda key, *_: tensors[key], scheme, leaf.layout, "float32")
    assert back.grid.count == 2**bits
    np.testing.assert_array_equal(back.materialise(), leaf.materialise())


# What compressed-tensors and transformers make of the same bytes.


@pytest.mark.parametrize(("bits", "symmetric"), [(1, False), *itertools.product(range(2, 9), (True, False))])
def test_packing_is_that_of_the_reference_library(bits, symmetric):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    leaf = QuantizedArray.quantize(
        jax.random.normal(jax.random.key(bits), (96, 37)), Grid(bits, 0, symmetric, 32), (0,)
    )
    tensors = encode(leaf, "pack-quantized")
    signed = torch.from_numpy(np.asarray(leaf.codes()).astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    np.testing.assert_array_equal(tensors["weight_packed"], helpers.pack_to_int32(signed, bits).numpy())
    if not symmetric:
        zero = torch.from_numpy(np.asarray(leaf.zero_point).astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
        np.testing.assert_array_equal(
            tensors["weight_zero_point"], helpers.pack_to_int32(zero, bits, packed_dim=0).numpy()
        )


def load_with_transformers(folder, dequantize: bool):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    if not dequantize:
        model.hf_quantizer.compressor.decompress_model(model)
    return model


def assert_weights(model, config: LlamaConfig, params: dict):
    state = model.state_dict()
    for path, leaf in leaves_with_paths(params).items():
        dense = np.asarray((leaf.materialise() if is_compressed(leaf) else leaf).astype(jnp.float32))
        found = state[hf_name(path, config)].float().numpy()
        np.testing.assert_array_equal(found, dense.T if path.endswith("/kernel") else dense, path)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_transformers_reads_mixed_schemes(tmp_path, config):
    params = quantize(dense_params(config), lambda path: mixed(path) if "/q/" not in path else {"grid": Grid(2)})
    ct.save_pretrained(tmp_path / "m", config, params)
    model = load_with_transformers(tmp_path / "m", dequantize=False)
    assert_weights(model, config, params)
    gate = model.model.layers[0].mlp.gate_proj
    assert float(gate.input_scale) == 0.25 and int(gate.input_zero_point) == 7 - 128
    assert not gate.quantization_scheme.input_activations.dynamic
    value = model.model.layers[0].self_attn.v_proj.quantization_scheme.input_activations
    assert value.dynamic and value.strategy == "token" and not value.symmetric


def test_the_reference_library_decompresses_mixed_schemes_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors")
    params = quantize(dense_params(), mixed)
    ct.save_pretrained(tmp_path / "m", CONFIG, params)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    groups = library.quantization.QuantizationConfig.model_validate(config).config_groups
    schemes = {f"{target}.weight": scheme for scheme in groups.values() for target in scheme.targets}
    leaves = {hf_name(path, CONFIG): leaf for path, leaf in leaves_with_paths(params).items() if is_compressed(leaf)}
    assert schemes.keys() == leaves.keys() and len(groups) == 5
    with open_sharded(tmp_path / "m") as file:
        for key, scheme in schemes.items():
            prefix = key.removesuffix("weight")
            names = [name for name in file.keys() if name.startswith(prefix) and "input" not in name]
            state = {name.removeprefix(prefix): torch.from_numpy(np.array(file.read(name))) for name in names}
            compressor = library.compressors.BaseCompressor.get_value_from_registry(scheme.format)
            weight = compressor.decompress(state, scheme)["weight"]
            np.testing.assert_array_equal(weight.numpy(), leaves[key].materialise().T)


def test_transformers_sees_bfloat16_weights_bit_for_bit(tmp_path):
    params = quantize(dense_params(dtype=jnp.bfloat16), uniform(Grid(4, group_size=24), scale_dtype=jnp.bfloat16))
    ct.save_pretrained(tmp_path / "m", CONFIG, params)
    assert_same(ct.load_pretrained(tmp_path / "m")[1], params)
    assert_weights(load_with_transformers(tmp_path / "m", dequantize=True), CONFIG, params)


def test_a_quantized_embedding(tmp_path):
    w = dense_params()["embed"]["embedding"]
    params = quantize(dense_params(), uniform(Grid(4)))
    params["embed"] = {"embedding": QuantizedArray.quantize(w, Grid(4), (1,))}
    ct.save_pretrained(tmp_path / "m", CONFIG, params)
    assert_same(ct.load_pretrained(tmp_path / "m")[1], params)
    assert_weights(load_with_transformers(tmp_path / "m", dequantize=True), CONFIG, params)


def test_logits_agree_with_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from jaxcomp.core.leaf import materialise_tree

    params = quantize(dense_params(), uniform(Grid(4, symmetric=False, group_size=24)))
    ct.save_pretrained(tmp_path / "m", CONFIG, params)
    tokens = np.arange(12)[None] * 7 % 96
    theirs = load_with_transformers(tmp_path / "m", dequantize=True)(torch.from_numpy(tokens)).logits.detach().numpy()
    ours = Llama(CONFIG).apply({"params": materialise_tree(params)}, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
