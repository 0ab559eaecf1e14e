"""Shared test set-up: eight CPU devices, strict promotion, real data by `JAXCOMP_DATA`."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"  # most tests compile more than they compute
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(config, items):
    """Deselects `slow` tests unless the user asked for a marker expression."""
    if config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Folder of real data; the test is skipped where it is absent."""
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("JAXCOMP_DATA", sibling))
    if not folder.is_dir():
        pytest.skip("no real data: set JAXCOMP_DATA to a folder laid out like shared/data")
    return folder
