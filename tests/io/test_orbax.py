"""Checkpoints come back bit for bit, on any mesh, and survive a kill at any moment of a save."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

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


CHILD = """
import os, signal, sys
import jax.numpy as jnp
from jaxcomp.io import manifest, orbax

folder, fatal = sys.argv[1], int(sys.argv[2])
events = 0

def count(*_):
    global events
    events += 1
    if events == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def before(module, name):
    original = getattr(module, name)
    def wrapped(*args, **kwargs):
        count()
        return original(*args, **kwargs)
    setattr(module, name, wrapped)

for name in ["fsync", "replace", "rename"]:
    before(os, name)
before(orbax, "_save_arrays")
before(orbax.shutil, "rmtree")
tree = {"a": {"kernel": jnp.full((256, 256), 2.0)}, "b": jnp.full(3, 2)}
orbax.save(folder, tree, {"step": 2}, overwrite=True)
print("events", events)
"""


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def run_child(folder, fatal: int) -> subprocess.CompletedProcess:
    args = [sys.executable, "-c", CHILD, str(folder), str(fatal)]
    return subprocess.run(args, capture_output=True, text=True, env=environment(1))


def small(value: int) -> dict:
    return {"a": {"kernel": jnp.full((256, 256), float(value))}, "b": jnp.full(3, value)}


def assert_old_or_new(folder) -> int:
    params, meta = orbax.restore(folder)
    assert_same(params, small(meta["step"]))
    return meta["step"]


def kill_at_events(tmp_path, chosen) -> list[int]:
    """The step found after a kill at each of the chosen events of a save of step 2 over step 1."""
    orbax.save(tmp_path / "probe", small(1), {"step": 1})
    total = int(run_child(tmp_path / "probe", 0).stdout.split()[-1])
    steps = []
    for fatal in chosen(total):
        folder = tmp_path / f"ck{fatal}"
        orbax.save(folder, small(1), {"step": 1})
        assert run_child(folder, fatal).returncode == -signal.SIGKILL
        steps.append(assert_old_or_new(folder))
        orbax.save(folder, small(3), {"step": 3}, overwrite=True)
        assert assert_old_or_new(folder) == 3
        assert sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")[-1] == "manifest.json"
        assert len([path for path in folder.iterdir() if path.name.startswith("arrays-")]) == 1
    return steps


def test_kill_during_a_save_leaves_old_or_new(tmp_path):
    steps = kill_at_events(tmp_path, lambda total: [1, total // 2, total - 2, total - 1, total])
    assert steps[0] == 1 and steps[-1] == 2 and steps == sorted(steps)


def test_kill_during_a_first_save_leaves_nothing_loadable_and_can_be_repeated(tmp_path):
    assert run_child(tmp_path / "ck", 2).returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="the save did not finish"):
        orbax.restore(tmp_path / "ck")
    orbax.save(tmp_path / "ck", small(1), {"step": 1})
    assert assert_old_or_new(tmp_path / "ck") == 1


@pytest.mark.slow
def test_kill_at_every_event_of_a_save(tmp_path):
    steps = kill_at_events(tmp_path, lambda total: range(1, total + 1))
    assert set(steps) == {1, 2} and steps == sorted(steps)


@pytest.mark.slow
def test_kill_at_random_times_of_endless_saves(tmp_path):
    endless = CHILD.split("folder, fatal")[0] + textwrap.dedent(
        """
        for step in range(2, 10**6):
            tree = {"a": {"kernel": jnp.full((256, 256), float(step))}, "b": jnp.full(3, step)}
            orbax.save(sys.argv[1], tree, {"step": step}, overwrite=True)
            print(step, flush=True)
        """
    )
    orbax.save(tmp_path / "ck", small(1), {"step": 1})
    rng = np.random.default_rng(0)
    for _ in range(10):
        args = [sys.executable, "-c", endless, str(tmp_path / "ck")]
        child = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=environment(1))
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        acknowledged = [int(line) for line in child.stdout.read().split()] or [2]
        assert assert_old_or_new(tmp_path / "ck") in (acknowledged[-1], acknowledged[-1] + 1)


DISTRIBUTED = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxcomp.io import orbax

mesh = Mesh(np.array(jax.devices()), "x")
whole = np.arange(32.0, dtype=np.float32).reshape(8, 4)
array = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("x")), lambda index: whole[index])
orbax.save(sys.argv[1], {"w": array}, {"processes": 2})
params, meta = orbax.restore(sys.argv[1], NamedSharding(mesh, P(None, "x")))
for shard in params["w"].addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
assert meta == {"processes": 2} and not params["w"].is_fully_addressable
"""


def test_two_processes_save_and_restore_together(tmp_path, unused_port):
    args = [sys.executable, "-c", DISTRIBUTED, str(tmp_path / "ck"), f"localhost:{unused_port}"]
    start = lambda i: subprocess.Popen([*args, str(i)], env=environment(2), stderr=subprocess.PIPE, text=True)
    children = [start(0), start(1)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    np.testing.assert_array_equal(orbax.restore(tmp_path / "ck")[0]["w"], np.arange(32.0).reshape(8, 4))


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
