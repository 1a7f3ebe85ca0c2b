"""Tests, one folder a folder of `fastlora/`; `tests.support` is what they share."""
