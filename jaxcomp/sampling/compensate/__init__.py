"""Correctors against the errors of quantized denoisers, and their calibration."""
