"""Implementation of linear layers with adapters in plain PyTorch."""
