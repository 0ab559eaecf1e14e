"""jaxcomp: make trained JAX models small and fast."""
