"""The Triton kernels under TRITON_INTERPRET=1 on NumPy arrays, against the reference."""

import sys

import numpy as np
from test_sparse_attention_gpu import CASES, problem, reference_outputs
from triton_numpy import Tensor

from pallas_kernels.sparse_attention import gpu_triton, triton_kernels


def main(name: str) -> None:
    x, spec = problem(CASES[name])
    first, second = gpu_triton.constants(x, spec)
    zeros = lambda *shape, dtype=np.float32: Tensor(np.zeros(shape, dtype))
    state = lambda: [zeros(*x.q.shape[:2]), zeros(*x.q.shape[:2]), zeros(*x.q.shape)]
    tensor = lambda a: Tensor(np.array(a))
    before, after = state(), state()
    q, k, v = map(tensor, (x.q, x.k, x.v))
    triton_kernels.window[spec.padded // spec.block_q, x.q.shape[0]](
        q, k, v, tensor(x.start.reshape(1)), *before, **first
    )
    lists, segments, tiles = x.rows.shape[:3]
    blocks, gain = zeros(lists, segments, tiles, dtype=np.int32), zeros(lists, segments, tiles)
    arrays = map(tensor, (x.order, x.count, x.threshold, x.rows))
    triton_kernels.visit[segments * tiles, lists](q, k, v, *arrays, *before, *after, blocks, gain, **second)
    want = reference_outputs(x, spec)
    np.testing.assert_array_equal(blocks.a, want.blocks)
    np.testing.assert_allclose(gain.a, want.gain, rtol=1e-3, atol=1e-6)
    out = after[2].a / after[1].a[..., None]
    expected = want.state.acc / want.state.norm[..., None]
    np.testing.assert_allclose(out[:, : spec.length], expected[:, : spec.length], atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1])
