"""The registered operators, and the backends that implement them."""
