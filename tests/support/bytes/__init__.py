"""Counts the bytes that kernels move, and writes the tables of them in `docs/`."""
