"""Packaging entry point; metadata and pinned versions live in pyproject.toml."""

from setuptools import setup

setup()
