"""Exact rewrites for the machine that a network runs on."""

from jaxcomp.deploy.convolutions import cpu_convolutions

__all__ = ["cpu_convolutions"]
