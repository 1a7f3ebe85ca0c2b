"""The autograd functions: what is saved for backward, and every gradient."""
