"""Kernels for compressed networks: one folder per operation, usable on plain arrays, independent of `jaxcomp`."""
