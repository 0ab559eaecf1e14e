"""Exact rewrites for the machine that a network runs on."""

from jaxcomp.deploy.convolutions import cpu_convolutions
from jaxcomp.deploy.fuse import fuse_convolutions, fusions
from jaxcomp.deploy.kernel_layouts import kernel_layouts

__all__ = ["cpu_convolutions", "fuse_convolutions", "fusions", "kernel_layouts"]
