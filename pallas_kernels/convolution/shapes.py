"""Convolutions of real super-resolution networks on a 256 x 256 image."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A map [1, height, width, inputs] under a window x window kernel to `outputs` channels."""

    height: int
    width: int
    inputs: int
    outputs: int
    window: int = 3

    @property
    def macs(self) -> int:
        """Multiply-accumulates, taps on the border included."""
        return self.height * self.width * self.window**2 * self.inputs * self.outputs


SHAPES = {
    "rlfn": Shape(256, 256, 52, 52),
    "rlfn_fuse": Shape(256, 256, 52, 52, 1),
    "rlfn_ntire": Shape(256, 256, 46, 48),
    "imdn": Shape(256, 256, 64, 64),
    "imdn_rest": Shape(256, 256, 48, 64),
    "imdn_last": Shape(256, 256, 48, 16),
    "head": Shape(256, 256, 3, 52),
}
