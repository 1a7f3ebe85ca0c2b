"""The registered operators, and the backends that call or implement them."""
