"""Routing of a mixed batch: which row uses which adapter."""
