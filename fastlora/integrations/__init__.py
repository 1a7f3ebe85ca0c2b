"""Integrations with other libraries. All of these libraries are optional."""
