"""Convolutions of stride 1 on maps [N, H, W, C] of any number of channels."""

from pallas_kernels.convolution.api import BACKENDS, build, convolution, is_built

__all__ = ["BACKENDS", "build", "convolution", "is_built"]
