"""Measurements behind the figures of the documentation, run from the root: `python -m benchmarks.speed`."""
