"""The Triton kernel under TRITON_INTERPRET=1 on NumPy arrays, with a NumPy model of the binary instruction."""

import sys

import numpy as np
import triton.language as tl
from test_arbitrary_bit_gpu_triton import mma_b1, problem
from triton.runtime import interpreter

from pallas_kernels.arbitrary_bit_matmul import gpu_triton
from pallas_kernels.arbitrary_bit_matmul.triton_kernels import bmma_gemv


class Storage:
    """What the interpreter asks of a tensor's memory."""

    def __init__(self, a):
        self.a = a

    def data_ptr(self):
        return self.a.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        """The buffer is shared."""


class Tensor:
    """The few tensor methods that the interpreter calls, over a NumPy array."""

    def __init__(self, a):
        self.a = np.require(a, requirements=["C", "W"])

    dtype = property(lambda self: self.a.dtype.name)
    shape = property(lambda self: self.a.shape)

    def data_ptr(self):
        return self.a.ctypes.data

    def untyped_storage(self):
        return Storage(self.a)

    def new_empty(self, *_, **__):
        return Tensor(self.a)

    def set_(self, storage, *_):
        self.a = storage.a

    def storage_offset(self):
        return 0

    def size(self):
        return self.a.shape

    def stride(self, i=None):
        strides = tuple(s // self.a.itemsize for s in self.a.strides)
        return strides if i is None else strides[i]


def create_inline_asm(self, asm, constraints, args, types, pure, pack):
    """The interpreter's hook for inline assembly: one warp's fragments."""
    assert "m16n8k256.row.col.s32.b1.b1.s32.and.popc" in asm and pack == 4
    w, x = (arg.data.reshape(32, 4).view(np.uint32) for arg in args)
    result = interpreter.TensorHandle(mma_b1(w, x[:, :2]).reshape(-1), tl.int32)
    return type("Result", (), {"get_result": lambda self, i: result})()


def main(bits: int, groups: int) -> None:
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    x, codes, scale, spec, want = problem(bits, groups)
    weight = gpu_triton.bmma.pack_weight(codes, bits)
    arrays, constants = gpu_triton.arguments(x, weight, scale, spec)
    y = np.zeros((x.shape[0], constants["N"]), np.float32)
    grid = (constants["N"] // 16, x.shape[0])
    bmma_gemv[grid](*(Tensor(np.array(a)) for a in arrays), Tensor(y), **constants)
    np.testing.assert_allclose(y[:, : spec.n], want, rtol=0, atol=3e-6 * np.abs(want).max())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
