"""PEFT's module names for functions of ours, so that its documentation's imports work."""
