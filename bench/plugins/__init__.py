"""Samples of the bench for pytest-benchmark."""
