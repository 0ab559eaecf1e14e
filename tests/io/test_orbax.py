"""Checkpoints come back bit for bit, on any mesh, or say what is wrong with them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.formats import ActivationQuantizer, FakeQuantizedArray, Grid, LowRankArray, MaskedArray, QuantizedArray
from jaxcomp.io import manifest, orbax
from jaxcomp.io.files import CheckpointError


def tree(seed: int = 0) -> dict:
    w = jax.random.normal(jax.random.key(seed), (64, 32))
    act = ActivationQuantizer(Grid(8), scale=jnp.float32(0.5))
    quantize = lambda grid, **kw: QuantizedArray.quantize(w, grid, (0,), **kw)
    return {
        "dense": {"kernel": w, "bias": jnp.full((32,), seed, jnp.bfloat16), "empty": jnp.zeros((0, 3))},
        "q": {"kernel": quantize(Grid(3, group_size=32), act=act)},
        "k": {"kernel": quantize(Grid(2, symmetric=False), scale_dtype=jnp.bfloat16)},
        "lora": {"kernel": LowRankArray.of(quantize(Grid(4)), 2, jax.random.key(1), alpha=0.1)},
        "masked": {"kernel": MaskedArray.of(w, jnp.ones((32, 16), bool), (0,), 4)},
        "fake": {"kernel": FakeQuantizedArray.of(w, Grid(4), (0,))},
        "float8": w.astype(jnp.float8_e4m3fn),
        "step": np.int32(7),
        "zeros": jnp.zeros((128, 128)),
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_with_statics_and_meta(tmp_path):
    meta = {"config": {"layers": 2, "names": ["a"]}, "commit": "abc", "method": "rtn"}
    orbax.save(tmp_path / "new" / "ck", tree(), meta)
    params, found = orbax.restore(tmp_path / "new" / "ck")
    assert_same(params, tree())
    assert found == meta
    assert params["q"]["kernel"].grid == Grid(3, group_size=32)
    np.testing.assert_array_equal(params["q"]["kernel"].materialise(), tree()["q"]["kernel"].materialise())


def mesh(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(shape), ("x", "y"))


def split(which: Mesh):
    """Rows over x and columns over y, wherever both divide."""

    def sharding(path, name, shape):
        divides = [size % which.shape[axis] == 0 for axis, size in zip("xy", shape, strict=False)]
        return NamedSharding(which, P(*(axis if ok else None for axis, ok in zip("xy", divides, strict=False))))

    return sharding


@pytest.mark.parametrize("target", ["4x2", "one device", "2x4", "default"])
def test_saved_on_one_mesh_restored_on_another(tmp_path, target):
    leaves, arrays = manifest.describe(tree())
    place = split(mesh(2, 4))
    arrays = {key: jax.device_put(array, place(*key, array.shape)) for key, array in arrays.items()}
    orbax.save(tmp_path / "ck", manifest.assemble(leaves, arrays, "tree"))
    one = SingleDeviceSharding(jax.devices()[3])
    sharding = {"4x2": split(mesh(4, 2)), "2x4": place, "one device": one, "default": None}[target]
    params, _ = orbax.restore(tmp_path / "ck", sharding)
    assert_same(params, tree())
    kernel = params["dense"]["kernel"]
    if target == "4x2":
        assert kernel.sharding == NamedSharding(mesh(4, 2), P("x", "y"))
        assert kernel.addressable_shards[0].data.shape == (16, 16)
    if target == "one device":
        assert kernel.devices() == {jax.devices()[3]}


def test_existing_folder_is_refused_unless_overwritten(tmp_path):
    orbax.save(tmp_path, tree(0))
    with pytest.raises(CheckpointError, match="overwrite=True"):
        orbax.save(tmp_path, tree(1))
    assert_same(orbax.restore(tmp_path)[0], tree(0))
    orbax.save(tmp_path, tree(1), overwrite=True)
    assert_same(orbax.restore(tmp_path)[0], tree(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrays-2", "manifest.json"]


def test_foreign_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "arrays-of-mine").mkdir()
    with pytest.raises(CheckpointError, match="overwrite=True"):
        orbax.save(tmp_path, tree())
    orbax.save(tmp_path, tree(), overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "arrays-of-mine").is_dir()


def test_unsuitable_params_leave_nothing_behind(tmp_path):
    with pytest.raises(CheckpointError):
        orbax.save(tmp_path / "ck", {"a": jnp.zeros(1), "b": "text"})
    assert not (tmp_path / "ck").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "ck"
    orbax.save(folder, tree())
    return folder


def damaged_copies(saved, folder):
    """Copies of a checkpoint, each with one file flipped, cut, emptied, missing or added."""
    for name in sorted(orbax._files(saved / "arrays-1")):
        for damage in ("flip", "cut", "remove"):
            shutil.copytree(saved, folder)
            path = folder / "arrays-1" / name
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data) if damage == "flip" else path.read_bytes()[:-1])
            if damage == "remove":
                path.unlink()
            yield name, damage
            shutil.rmtree(folder)


def test_damage_to_any_file_is_noticed(saved, tmp_path):
    for name, damage in damaged_copies(saved, tmp_path / "ck"):
        with pytest.raises(CheckpointError, match="restore another copy"):
            orbax.restore(tmp_path / "ck")
            pytest.fail(f"{damage} of {name} went unnoticed")


def test_unfinished_or_linked_checkpoints_are_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "ck")
    extra = tmp_path / "ck" / "arrays-1" / "extra"
    extra.symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="extra"):
        orbax.restore(tmp_path / "ck")
    extra.unlink()
    (tmp_path / "ck" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="the save did not finish"):
        orbax.restore(tmp_path / "ck")


def forge(folder, path: str, name: str, **fields) -> None:
    """Rewrites one array entry under a correct digest."""
    body = json.loads((folder / "manifest.json").read_text())
    body.pop("sha256")
    body["leaves"][path]["arrays"][name].update(fields)
    (folder / "manifest.json").write_text(json.dumps(body | {"sha256": manifest._digest(body)}))


def test_forged_sizes_are_refused_before_allocation(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "ck")
    forge(tmp_path / "ck", "zeros", "value", shape=[2**20, 2**20], bytes=2**42)
    with pytest.raises(CheckpointError, match="at most"):
        orbax.restore(tmp_path / "ck")
    forge(tmp_path / "ck", "zeros", "value", shape=[128, 127], bytes=128 * 127 * 4)
    with pytest.raises(CheckpointError, match="other arrays than the manifest lists"):
        orbax.restore(tmp_path / "ck")


def test_zeros_and_small_arrays_take_their_bytes_on_disk(tmp_path):
    """The bound on forged sizes holds because nothing is stored compressed."""
    params = {f"a{i}": np.zeros(i + 1, np.float32) for i in range(100)} | {"big": jnp.zeros((300, 300))}
    orbax.save(tmp_path / "ck", params)
    assert_same(orbax.restore(tmp_path / "ck")[0], params)


def test_wide_dtypes_need_x64(tmp_path):
    with jax.enable_x64(True):
        orbax.save(tmp_path / "ck", {"a": jnp.arange(3, dtype=jnp.int64)})
    with pytest.raises(CheckpointError, match="jax_enable_x64"):
        orbax.restore(tmp_path / "ck")
