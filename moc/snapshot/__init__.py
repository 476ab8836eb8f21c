"""Snapshots in host memory: arena, seal records, copy."""
