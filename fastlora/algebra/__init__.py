"""Functions on tensors that combine low-rank updates and reduce their rank."""
