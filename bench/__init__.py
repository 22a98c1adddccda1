"""Benchmarks. What a program measures and how to read its rows: `bench/README.md`."""

import sys

from launch.runtime.packages import foreign_packages

for sentence in foreign_packages().values():
    sys.exit(f"error: {sentence}")
