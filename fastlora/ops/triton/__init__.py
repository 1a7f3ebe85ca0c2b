"""The Triton implementation of the operators: configs, address tables, and kernel launches."""
