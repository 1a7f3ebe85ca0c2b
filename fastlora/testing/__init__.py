"""Helpers for tests of fastlora and of libraries built on it."""

from fastlora.testing.launches import Launch, stubbed_launches
from fastlora.testing.tolerances import (
    assert_within_budget,
    error_budget,
    farthest,
    summed_otherwise,
)

__all__ = [
    "Launch",
    "assert_within_budget",
    "error_budget",
    "farthest",
    "stubbed_launches",
    "summed_otherwise",
]
