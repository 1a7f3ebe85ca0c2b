"""Helpers for tests of fastlora and of libraries built on it."""

from fastlora.deprecation import renamed_attributes
from fastlora.testing.launches import Launch, stubbed_launches
from fastlora.testing.tolerances import (
    assert_within_budget,
    error_budget,
    random_summation_order,
    run_with_largest_error,
)

__all__ = [
    "Launch",
    "assert_within_budget",
    "error_budget",
    "run_with_largest_error",
    "stubbed_launches",
    "random_summation_order",
]

__getattr__ = renamed_attributes(
    __name__,
    {"farthest": "run_with_largest_error", "summed_otherwise": "random_summation_order"},
)
