"""Benchmarks. What a program measures and how to read its rows: `bench/README.md`."""
