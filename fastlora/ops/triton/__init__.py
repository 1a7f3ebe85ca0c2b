"""Triton kernels behind the operators: configs, tables of addresses, launches."""
