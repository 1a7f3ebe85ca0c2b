"""Functions that combine low-rank updates and reduce their rank. They operate on tensors."""
