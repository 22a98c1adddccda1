"""Benchmarks. What a program measures and how to read its rows: `bench/README.md`."""

import sys

from launch.runtime.packages import strangers

for sentence in strangers().values():
    sys.exit(f"error: {sentence}")
