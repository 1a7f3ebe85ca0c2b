"""Functions that register operators' schemas, implementations, and fake implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastlora", "DEF")


def define_operator(schema: str, tags: tuple[torch.Tag, ...] = ()) -> None:
    """Define a custom operator in fastlora's `torch.library.Library` from its schema."""
    _LIBRARY.define(schema, tags=tags)


def register_implementation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a function as an operator's implementation.

    The implementation is registered below autograd, and runs on every device.
    """
    found: Callable[..., Any] = torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")
    return found


def register_composite_implicit_autograd(
    name: str,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers an operator's ``CompositeImplicitAutograd`` implementation.

    The decorated function becomes the implementation of the operator ``name``. The implementation
    runs above autograd, whether or not a graph is traced.
    """
    found: Callable[..., Any] = torch.library.impl(_LIBRARY, name, "CompositeImplicitAutograd")
    return found


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a function as an operator's fake implementation.

    The fake implementation is used for tracing.
    """
    found: Callable[..., Any] = torch.library.register_fake(f"fastlora::{name}")
    return found
