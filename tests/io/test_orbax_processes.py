"""A checkpoint survives a kill at any moment of a save, and several processes write one together."""

import os
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

from jaxcomp.io import orbax
from jaxcomp.io.files import CheckpointError

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
    jax.tree.map(np.testing.assert_array_equal, params, small(meta["step"]))
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
