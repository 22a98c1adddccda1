"""Plugins of pytest for GPU tests, and samples for pytest-benchmark."""
