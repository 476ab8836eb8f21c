"""Fault tolerance for mixture-of-experts training on DeepSpeed."""

__version__ = "0.1.0"
