"""Measurements: printed, never judged. Run them by `make bench`."""
