"""Routing of mixed batches: the assignment of an adapter, or none, to each row."""
