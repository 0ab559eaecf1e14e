"""Quantizers as transforms."""

from jaxcomp.quantize.rtn import rtn
from jaxcomp.quantize.scheme import Scheme

__all__ = ["Scheme", "rtn"]
