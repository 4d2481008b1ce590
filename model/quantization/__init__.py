"""Making INT8 checkpoints: offline transforms, calibration and rounding. Serving needs nothing of it."""
