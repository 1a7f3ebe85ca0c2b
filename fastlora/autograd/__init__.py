"""Autograd functions of linear layers with adapters."""
