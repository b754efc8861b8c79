"""Metadata is in pyproject.toml; compiled extensions are declared here once there are sources in csrc/."""

from setuptools import setup

setup()
