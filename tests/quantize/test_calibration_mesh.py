"""Statistics of batches that are sharded over a data mesh are those of one device."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import leaves_with_paths
from jaxcomp.core.transform import compress
from jaxcomp.formats.observed import STATISTICS
from jaxcomp.quantize import gptq


def sharded(model):
    """The calibration data of a model, tokens split over eight devices."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    assert mesh.size == 8
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    return Calibration(model.apply, [place(x) for x in model.data.batches])


@pytest.mark.parametrize("name", ["toy", "scanned_toy"])
def test_statistics_merge_over_a_data_mesh(name, request):
    model = request.getfixturevalue(name)
    want, found = (data(model.params, STATISTICS) for data in (model.data, sharded(model)))
    assert found.keys() == want.keys() and len(found) == (15 if name == "toy" else 8)
    for path, stats in want.items():
        assert set(stats) == set(STATISTICS)
        for statistic, value in stats.items():
            scale = float(np.abs(value).max())
            np.testing.assert_allclose(found[path][statistic], value, atol=1e-5 * scale, err_msg=f"{path} {statistic}")


def test_gptq_on_a_mesh_gives_the_codes_of_one_device(toy):
    pipeline = gptq(4, sequential=False)
    want = leaves_with_paths(compress(pipeline, toy.params, toy.data)[0])
    found = leaves_with_paths(compress(pipeline, toy.params, sharded(toy))[0])
    same = [np.mean(found[p].codes() == want[p].codes()) for p in want if p.endswith("kernel")]
    assert len(same) == 15 and min(same) > 0.98
