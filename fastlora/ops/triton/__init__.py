"""The Triton implementation of the operators: configs, tables of addresses, and launches."""
