"""Functions that add and compress low-rank updates. They work on tensors, not on layers."""
