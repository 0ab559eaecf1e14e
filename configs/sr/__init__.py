"""Configs of super-resolution experiments."""
