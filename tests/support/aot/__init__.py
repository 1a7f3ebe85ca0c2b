"""Compiles shipped configs ahead of time, and writes `docs/kernel_resources.csv`."""
