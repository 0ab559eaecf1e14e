"""The manifest keeps everything that Orbax drops and believes nothing it reads."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.formats.activation import ActivationQuantizer
from jaxcomp.formats.grid import Grid
from jaxcomp.formats.quantized import QuantizedArray
from jaxcomp.io import manifest
from jaxcomp.io.files import CheckpointError


def tree() -> dict:
    w = jax.random.normal(jax.random.key(0), (64, 48))
    act = ActivationQuantizer(Grid(8))
    return {
        "embed": {"embedding": jnp.ones((5, 3), jnp.bfloat16)},
        "blocks_0": {
            "q": {
                "kernel": QuantizedArray.quantize(w, Grid(3, group_size=32), (0,), act),
                "bias": jnp.zeros(48),
            },
            "k": {"kernel": QuantizedArray.quantize(w, Grid(4, levels=11, symmetric=False), (0,))},
        },
    }


@pytest.fixture
def written(tmp_path) -> tuple:
    """(folder, the manifest, its JSON)."""
    leaves, _ = manifest.describe(tree())
    files = {"d/00": manifest.FileSpec(12, "0" * 64)}
    original = manifest.Manifest("arrays-1", leaves, files, {"method": "rtn", "seed": 1, "rate": 0.1})
    manifest.write(tmp_path, original)
    return tmp_path, original, json.loads((tmp_path / manifest.NAME).read_text())


def rewrite(folder, body: dict) -> None:
    """Stores a forged body under a correct digest."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    digest = {"sha256": manifest._digest(body)}
    (folder / manifest.NAME).write_text(json.dumps(body | digest))


def test_describe_and_assemble_are_inverse():
    params = tree()
    leaves, arrays = manifest.describe(params)
    back = manifest.assemble(leaves, arrays, "manifest")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(new, old)
    assert {path: spec.kind for path, spec in leaves.items()} == {
        "embed/embedding": "array",
        "blocks_0/q/kernel": "quantized",
        "blocks_0/q/bias": "array",
        "blocks_0/k/kernel": "quantized",
    }


def test_round_trip_through_json(written):
    folder, original, body = written
    assert manifest.read(folder) == original
    assert body["leaves"]["blocks_0/q/kernel"]["statics"]["grid"]["bits"] == 3
    assert [path.name for path in folder.iterdir()] == [manifest.NAME]


def test_no_array_is_needed_to_check_a_manifest(written):
    folder, original, _ = written
    specs = {(path, name): spec for path, leaf in original.leaves.items() for name, spec in leaf.arrays.items()}
    structs = {key: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for key, spec in specs.items()}
    abstract = manifest.assemble(original.leaves, structs, folder)
    assert jax.tree.structure(abstract) == jax.tree.structure(tree())


UNSUITABLE = {
    "separator": ({"a/b": np.zeros(1)}, "keys without separators"),
    "parent": ({"..": np.zeros(1)}, "keys without separators"),
    "integer key": ({0: np.zeros(1)}, "keys without separators"),
    "empty": ({"a": {}}, "an empty dict"),
    "number": ({"a": 1.5}, "store it in `meta`"),
    "list": ({"a": [np.zeros(1)]}, "use nested dicts"),
    "dtype": ({"a": np.zeros(1, "complex128")}, "complex128"),
    "object": ({"a": np.array(["x"])}, "a dtype of"),
    "random key": ({"a": jax.random.key(0)}, "a dtype of"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_unsuitable_params(case):
    params, message = UNSUITABLE[case]
    with pytest.raises(CheckpointError, match=message):
        manifest.describe(params)


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": np.zeros(2)}, {"x": object()}])
def test_meta_must_be_json(meta):
    with pytest.raises(CheckpointError, match="values that JSON can hold"):
        manifest.plain(meta, "meta")


def test_absent(tmp_path):
    with pytest.raises(CheckpointError, match="the save did not finish"):
        manifest.read(tmp_path)


def test_every_changed_byte_is_noticed(written):
    folder, original, _ = written
    good = (folder / manifest.NAME).read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(good), 200, replace=False):
        bad = bytearray(good)
        bad[position] ^= 1 << rng.integers(8)
        (folder / manifest.NAME).write_bytes(bytes(bad))
        try:
            assert manifest.read(folder) == original  # white space for white space
        except CheckpointError:
            pass


LEAF = "blocks_0/q/kernel"
FORGED = {
    "format": lambda b: b.update(format="other"),
    "version": lambda b: b.update(version=2),
    "version type": lambda b: b.update(version=True),
    "unknown field": lambda b: b.update(more=1),
    "missing field": lambda b: b.pop("files"),
    "meta type": lambda b: b.update(meta=[]),
    "arrays outside": lambda b: b.update(arrays="../arrays-1"),
    "arrays absolute": lambda b: b.update(arrays="/etc"),
    "file outside": lambda b: b["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
    "file absolute": lambda b: b["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
    "file size": lambda b: b["files"]["d/00"].update(bytes=-1),
    "file digest": lambda b: b["files"]["d/00"].update(sha256="xyz"),
    "path outside": lambda b: b["leaves"].update({"a/../b": b["leaves"][LEAF]}),
    "path empty": lambda b: b["leaves"].update({"": b["leaves"][LEAF]}),
    "kind": lambda b: b["leaves"][LEAF].update(kind="os.system"),
    "kind of a part": lambda b: b["leaves"][LEAF].update(kind="grid"),
    "kind type": lambda b: b["leaves"][LEAF].update(kind=["quantized"]),
    "array as leaf kind": lambda b: b["leaves"][LEAF].update(kind="array"),
    "component name": lambda b: b["leaves"][LEAF]["arrays"].update({"a/b": b["leaves"][LEAF]["arrays"]["scale"]}),
    "dtype": lambda b: b["leaves"][LEAF]["arrays"]["scale"].update(dtype="object"),
    "bytes": lambda b: b["leaves"][LEAF]["arrays"]["scale"].update(bytes=1),
    "negative size": lambda b: b["leaves"][LEAF]["arrays"]["scale"].update(shape=[-1], bytes=-4),
    "huge size": lambda b: b["leaves"][LEAF]["arrays"]["scale"].update(shape=[2**62, 4], bytes=2**66),
    "huge behind zero": lambda b: b["leaves"][LEAF]["arrays"]["scale"].update(shape=[2**62, 4, 0], bytes=0),
    "float size": lambda b: b["leaves"][LEAF]["arrays"]["scale"].update(shape=[1.0], bytes=4),
    "rank": lambda b: b["leaves"][LEAF]["arrays"]["scale"].update(shape=[1] * 33, bytes=4),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_manifest(written, case):
    folder, _, body = written
    forged = copy.deepcopy(body)
    FORGED[case](forged)
    rewrite(folder, forged)
    with pytest.raises(CheckpointError):
        manifest.read(folder)


FORGED_PARTS = {
    "missing static": lambda leaf: leaf["statics"]["grid"].pop("bits"),
    "unknown static": lambda leaf: leaf["statics"].update(x=1),
    "static type": lambda leaf: leaf["statics"]["grid"].update(bits="three"),
    "bits out of range": lambda leaf: leaf["statics"]["grid"].update(bits=9),
    "other bits": lambda leaf: leaf["statics"]["grid"].update(bits=5),
    "nested kind": lambda leaf: leaf["statics"]["grid"].update(kind="layout"),
    "huge layout": lambda leaf: leaf["statics"]["layout"].update(rows=[2**70]),
    "missing component": lambda leaf: leaf["arrays"].pop("packed"),
    "unknown component": lambda leaf: leaf["arrays"].update(more=leaf["arrays"]["scale"]),
    "wrong dtype": lambda leaf: leaf["arrays"]["packed"].update(dtype="int32"),
}


@pytest.mark.parametrize("case", FORGED_PARTS)
def test_forged_parts_are_refused_before_any_array_is_read(written, case):
    folder, _, body = written
    FORGED_PARTS[case](body["leaves"][LEAF])
    rewrite(folder, body)
    found = manifest.read(folder)
    specs = {(path, name): spec for path, leaf in found.leaves.items() for name, spec in leaf.arrays.items()}
    structs = {key: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for key, spec in specs.items()}
    with pytest.raises(CheckpointError, match="parts of a quantized"):
        manifest.assemble(found.leaves, structs, folder)


def test_leaf_and_subtree_at_one_path(written):
    folder, _, body = written
    value = body["leaves"]["embed/embedding"]
    for extra in ("embed", "embed/embedding/x"):
        rewrite(folder, body | {"leaves": body["leaves"] | {extra: value}})
        found = manifest.read(folder)
        arrays = {(path, name): np.zeros(1) for path, leaf in found.leaves.items() for name in leaf.arrays}
        leaves = {path: leaf for path, leaf in found.leaves.items() if leaf.kind == "array"}
        with pytest.raises(CheckpointError, match="expected a tree"):
            manifest.assemble(leaves, arrays, folder)
