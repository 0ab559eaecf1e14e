"""The algebra: leaves, rules, transforms, calibration, reconstruction, reports."""
