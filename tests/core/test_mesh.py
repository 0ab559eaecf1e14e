"""Meshes from text, and trees and batches placed on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcomp.core.apply import compressed
from jaxcomp.core.leaf import materialise_tree
from jaxcomp.core.mesh import (
    fetch,
    initialize_distributed,
    not_split,
    parse_mesh,
    placement,
    replicate_outputs,
    shard_batch,
    shard_params,
)
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.io import orbax
from jaxcomp.models import Llama, LlamaConfig
from jaxcomp.quantize import rtn

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, tie_embeddings=True
)
TOKENS = np.arange(24, dtype=np.int32).reshape(4, 6)


def apply(params, tokens):
    return Llama(CONFIG).apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def params():
    return Llama(CONFIG).init(jax.random.key(0), TOKENS)["params"]


def test_parse_mesh_names_axes_and_takes_the_first_devices():
    mesh = parse_mesh(" data:2, model:2 ")
    assert mesh.axis_names == ("data", "model") and dict(mesh.shape) == {"data": 2, "model": 2}
    assert parse_mesh("data:8").devices.size == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data", "expected axes like"),
        ("data:0", "expected axes like"),
        ("data:2,,model:2", "expected axes like"),
        ("data:-1", "expected axes like"),
        ("data:2,data:4", "an axis appears twice"),
        ("data:4,model:4", "needs 16 devices, found 8; choose sizes whose product is at most 8"),
        ("data:99", "xla_force_host_platform_device_count=99"),
    ],
)
def test_parse_mesh_says_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=words):
        parse_mesh(text)


def test_outputs_are_split_and_the_rest_is_replicated(params):
    mesh = parse_mesh("data:2,model:4")
    quantized = compress(rtn(3, group_size=16), params)[0]
    placed = shard_params(quantized, mesh)
    gate = placed["blocks_0"]["mlp"]["gate"]["kernel"]
    assert gate.packed.sharding.spec == P("model", None) and gate.scale.sharding.spec == P("model", None)
    assert placed["embed"]["embedding"].sharding.spec == P("model", None)
    assert placed["final_norm"]["scale"].sharding.is_fully_replicated
    assert shard_params(params, mesh)["blocks_0"]["attn"]["q"]["kernel"].sharding.spec == P(None, "model")
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(quantized), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_divide_is_replicated_and_named(params):
    mesh = parse_mesh("model:5")
    placed = shard_params(compress(rtn(4), params)[0], mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    reasons = not_split(placed, mesh)
    assert reasons["blocks_1/mlp/up/kernel"] == "48 outputs over 5 devices"
    assert len(reasons) == 15  # seven kernels in each of two blocks, and the embedding
    assert not not_split(placed, parse_mesh("model:4")) and not not_split(placed, parse_mesh("data:2"))


def test_rules_choose_the_axis(params):
    rules = (Rule("**/down", axis=0), Rule("embed", skip=True), Rule("**", axis=-1))
    where = placement(parse_mesh("model:2"), rules)
    assert where("blocks_0/mlp/down/kernel", "value", (48, 32)).spec == P("model", None)
    assert where("embed/embedding", "value", (64, 32)).spec == P(None, None)
    assert where("blocks_0/mlp/up/kernel", "value", (32, 48)).spec == P(None, "model")


@pytest.mark.parametrize("bits", [16, 4])
def test_sharded_logits_equal_those_of_one_device(params, bits):
    tree = compress(rtn(bits, group_size=16), params)[0]
    mesh = parse_mesh("data:2,model:4")
    single = jax.jit(compressed(apply))(tree, TOKENS)
    sharded = jax.jit(replicate_outputs(compressed(apply), mesh))(shard_params(tree, mesh), shard_batch(TOKENS, mesh))
    assert sharded.sharding.is_fully_replicated
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-6)


def test_checkpoint_restores_onto_another_mesh(params, tmp_path):
    tree = compress(rtn(3), params)[0]
    orbax.save(tmp_path / "ck", shard_params(tree, parse_mesh("data:2,model:4")))
    restored, _ = orbax.restore(tmp_path / "ck", placement(parse_mesh("data:4,model:2")))
    assert restored["embed"]["embedding"].sharding.mesh.shape["model"] == 2
    for a, b in zip(jax.tree.leaves(fetch(restored)), jax.tree.leaves(fetch(tree)), strict=True):
        np.testing.assert_array_equal(a, b)
    dense = [fetch(materialise_tree(t)) for t in (restored, tree)]
    jax.tree.map(np.testing.assert_array_equal, *dense)


def test_batches_are_split_over_data():
    mesh = parse_mesh("data:4,model:2")
    batch = shard_batch({"tokens": TOKENS}, mesh)["tokens"]
    assert batch.sharding.spec == P("data") and batch.addressable_shards[0].data.shape == (1, 6)
    np.testing.assert_array_equal(shard_batch(TOKENS, mesh, local=True), TOKENS)
    assert shard_batch(jnp.asarray(TOKENS), parse_mesh("model:2")).sharding.is_fully_replicated
    with pytest.raises(ValueError, match="a batch of 3 does not divide over 4 devices"):
        shard_batch(TOKENS[:3], mesh)


def test_distributed_needs_all_three_or_none():
    initialize_distributed(None, None, None)
    with pytest.raises(ValueError, match="give all three"):
        initialize_distributed("localhost:1", 2, None)
