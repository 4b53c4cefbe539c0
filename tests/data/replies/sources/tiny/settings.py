"""Editable: the constants. Two are far off."""

SMOOTHING = 40.0
BACKOFF = 0.5
SALT = "first"
SPARE = 1
