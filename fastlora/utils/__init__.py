"""PEFT's module names for fastlora's functions, so that imports from PEFT's docs work."""
