"""Measurements, printed without pass or fail. Run them by `make bench`."""
