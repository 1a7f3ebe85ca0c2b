"""Runs checks in two processes, and what those checks share."""
