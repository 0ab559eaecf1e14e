"""Compressed leaf types and their rules: importing this package makes every rule known."""

from jaxcomp.formats import views as _views  # noqa: F401  (registers its rules)
from jaxcomp.formats.activation import ActivationQuantizer
from jaxcomp.formats.conv_form import ConvFormArray
from jaxcomp.formats.fake import FakeQuantizedArray
from jaxcomp.formats.grid import Grid
from jaxcomp.formats.layout import Layout
from jaxcomp.formats.low_rank import LowRankArray
from jaxcomp.formats.masked import MaskedArray
from jaxcomp.formats.observed import ObservedArray
from jaxcomp.formats.quantized import QuantizedArray
from jaxcomp.formats.smoothed import SmoothedArray

__all__ = [
    "ActivationQuantizer",
    "ConvFormArray",
    "FakeQuantizedArray",
    "Grid",
    "Layout",
    "LowRankArray",
    "MaskedArray",
    "ObservedArray",
    "QuantizedArray",
    "SmoothedArray",
]
