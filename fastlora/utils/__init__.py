"""Modules with PEFT's names, so that imports in code written for PEFT work with fastlora."""
