"""Puts this folder on the path, for `toy_sampler`."""
