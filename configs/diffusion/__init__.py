"""Configs of diffusion experiments."""
