"""Autograd functions of adapters: the tensors that they save, and every gradient."""
