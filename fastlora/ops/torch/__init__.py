"""The operators in plain PyTorch."""
