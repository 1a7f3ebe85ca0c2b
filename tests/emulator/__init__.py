"""Executes the PTX that Triton generates for NVIDIA GPUs on CPU tensors, and checks each access."""
