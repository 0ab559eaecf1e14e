"""Settings of the language-model experiments."""
