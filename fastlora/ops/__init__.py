"""Registered operators of linear layers with adapters, and the backends that call them."""
