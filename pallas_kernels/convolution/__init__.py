"""Convolutions on maps [N, H, W, C] of any number of channels, and what surrounds them."""

from pallas_kernels.convolution.api import BACKENDS, build, convolution, fused_convolution, is_built
from pallas_kernels.convolution.epilogue import Epilogue, View, Window

__all__ = ["BACKENDS", "Epilogue", "View", "Window", "build", "convolution", "fused_convolution", "is_built"]
