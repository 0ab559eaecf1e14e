"""Experiment settings as plain Python: one file per setting."""
