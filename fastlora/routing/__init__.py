"""Which row of a batch uses which adapter."""
