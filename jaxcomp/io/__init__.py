"""Checkpoints in and out: safetensors, Orbax, Hugging Face layouts."""
