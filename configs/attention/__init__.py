"""Settings of the sparse-attention experiments."""
