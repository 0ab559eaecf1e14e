"""What compressed-tensors cannot express is named with the reason, and what a folder claims is not believed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.leaf import map_leaves
from jaxcomp.formats import ActivationQuantizer, Grid, MaskedArray, QuantizedArray
from jaxcomp.io import compressed_tensors as ct
from jaxcomp.io.compressed_tensors_leaf import decode, layout_of, scheme_of
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.safetensors import open_sharded, save_safetensors
from jaxcomp.models.llama import Llama
from jaxcomp.models.llama_config import LlamaConfig

CONFIG = LlamaConfig(vocab_size=96, hidden_size=72, intermediate_size=72, num_layers=1, num_heads=4, max_len=64)
TIED = LlamaConfig(**{**vars(CONFIG), "tie_embeddings": True})


@functools.cache
def quantized_params(config: LlamaConfig) -> dict:
    params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    grid = Grid(4, symmetric=False, group_size=24)
    quantize = lambda path, w: QuantizedArray.quantize(w, grid, (0,)) if "kernel" in path else w
    return map_leaves(quantize, params)


def refuse(leaf_of, message: str, path: str = "blocks_0/mlp/up/kernel"):
    with pytest.raises(CheckpointError, match=message) as caught:
        scheme_of(path, leaf_of(jax.random.normal(jax.random.key(0), (64, 32))))
    assert path in str(caught.value)


def test_inexpressible_leaves_are_named_with_the_reason():
    act = lambda *args, **kw: ActivationQuantizer(Grid(8, *args), **kw)
    quantized = lambda **kw: lambda w: QuantizedArray.quantize(w, **{"grid": Grid(4), "contract_axes": (0,)} | kw)
    refuse(lambda w: MaskedArray.of(w, jnp.ones((32, 16), bool), (0,), 4), "found masked")
    refuse(quantized(contract_axes=(1,)), "a matrix of outputs by inputs")
    refuse(quantized(act=act(200)), "all 256 activation levels, found 200")
    refuse(quantized(act=act(scale=jnp.ones(3))), "one static activation scale")
    refuse(quantized(scale_dtype=jnp.float8_e4m3fn), "scales of")
    refuse(lambda w: QuantizedArray.quantize(w[None], Grid(4), (-2,)), "a matrix of outputs by inputs")


def test_failed_exports_leave_nothing_behind(tmp_path):
    params = quantized_params(TIED)
    table = QuantizedArray.quantize(params["embed"]["embedding"], Grid(4), (1,))
    params = params | {"embed": {"embedding": table}}
    with pytest.raises(CheckpointError, match="a dense tied embedding"):
        ct.save_pretrained(tmp_path / "m", TIED, params)
    with pytest.raises(CheckpointError, match="head/kernel"):
        ct.save_pretrained(tmp_path / "m", CONFIG, params)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "m"
    ct.save_pretrained(folder, CONFIG, quantized_params(CONFIG))
    return folder


Q = "model.layers.0.self_attn.q_proj"


def change_group(**changes):
    def change(config, tensors):
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["weights"] |= {
            key: value for key, value in changes.items() if key in group["weights"] or key == "actorder"
        }
        group |= {key: value for key, value in changes.items() if key in group}

    return change


def change_tensor(name: str, fn):
    return lambda config, tensors: tensors.update({f"{Q}.{name}": fn(tensors[f"{Q}.{name}"])})


def quantization(**changes):
    return lambda config, tensors: config["quantization_config"].update(changes)


WRONG = {
    "other method": quantization(quant_method="gptq"),
    "no groups": quantization(config_groups={}),
    "groups of strings": quantization(config_groups={"W4A16": ["Linear"]}),
    "exponential pattern": change_group(targets=["re:(a+)+$"]),
    "broken pattern": change_group(targets=["re:["]),
    "no target": change_group(targets=["re:nothing.*"]),
    "targets of numbers": change_group(targets=[1]),
    "float weights": change_group(type="float"),
    "blocks": change_group(strategy="block"),
    "other bits": change_group(num_bits=3),
    "bits out of range": change_group(num_bits=40),
    "bits as text": change_group(num_bits="4"),
    "other group": change_group(group_size=8),
    "group that does not divide": change_group(group_size=48),
    "no group size": change_group(group_size=None),
    "symmetric": change_group(symmetric=True),
    "dynamic weights": change_group(dynamic=True),
    "activation order": change_group(actorder="group"),
    "outputs": change_group(output_activations={"num_bits": 8}),
    "format": change_group(format="marlin-24"),
    "static inputs without a scale": change_group(input_activations={"num_bits": 8, "strategy": "tensor"}),
    "grouped inputs": change_group(input_activations={"strategy": "group", "group_size": 8, "dynamic": True}),
    "malformed inputs": change_group(input_activations=[8]),
    "dtype": lambda config, tensors: config.update(torch_dtype="int8"),
    "architecture": lambda config, tensors: config.update(model_type="mamba"),
    "more layers": lambda config, tensors: config.update(num_hidden_layers=3),
    "endless layers": lambda config, tensors: config.update(num_hidden_layers=10**9),
    "missing scale": lambda config, tensors: tensors.pop(f"{Q}.weight_scale"),
    "missing codes": lambda config, tensors: tensors.pop(f"{Q}.weight_packed"),
    "missing zero": lambda config, tensors: tensors.pop(f"{Q}.weight_zero_point"),
    "extra tensor": lambda config, tensors: tensors.update({f"{Q}.weight_g_idx": np.zeros(72, np.int32)}),
    "NaN scale": change_tensor("weight_scale", lambda x: x * np.nan),
    "codes of another dtype": change_tensor("weight_packed", lambda x: x.view(np.uint32)),
    "codes of another shape": change_tensor("weight_packed", lambda x: x[:, :-1]),
    "another stated shape": change_tensor("weight_shape", lambda x: x + 1),
    "zero of another shape": change_tensor("weight_zero_point", lambda x: x.T),
    "infinite norm": lambda config, tensors: tensors.update({"model.norm.weight": np.full(72, np.inf, np.float32)}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_are_refused(exported, tmp_path, case):
    config = json.loads((exported / "config.json").read_text())
    with open_sharded(exported) as file:
        tensors = {key: np.array(file.read(key)) for key in file.keys()}
    WRONG[case](config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"expected .*, found .*; "):
        ct.load_pretrained(tmp_path)


def test_patterns_and_defaults_of_other_tools(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())
    with open_sharded(exported) as file:
        tensors = {key: np.array(file.read(key)) for key in file.keys()}
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"] |= {"observer": "mse", "observer_kwargs": {}, "actorder": "static", "block_structure": None}
    attention = group | {"targets": [r"re:.*self_attn\.(q|k|v|o)_proj$"]}
    config["quantization_config"]["config_groups"] = {"a": attention, "b": group}
    config["dtype"] = config.pop("torch_dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_safetensors(tmp_path / "model.safetensors", tensors)
    jax.tree.map(np.testing.assert_array_equal, ct.load_pretrained(tmp_path)[1], ct.load_pretrained(exported)[1])


def test_integer_codes_out_of_range_are_refused():
    scheme = {"format": "int-quantized", "grid": Grid(4), "act": None}
    tensors = {"weight_scale": np.ones((32, 1), np.float32), "weight": np.full((32, 64), 100, np.int8)}
    with pytest.raises(ValueError, match="outside the 4-bit range"):
        decode(lambda key, *_: tensors[key], scheme, layout_of("a/kernel", (64, 32)), "float32")
