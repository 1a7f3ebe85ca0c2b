"""How operators are registered: a schema, what runs it, and what tracing sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastlora", "DEF")


def define(schema: str, tags: tuple[torch.Tag, ...] = ()) -> None:
    """Adds an operator."""
    _LIBRARY.define(schema, tags=tags)


def implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what runs below autograd, on every device."""
    found: Callable[..., Any] = torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")
    return found


def composes(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what runs above autograd: while a graph is traced, and where nothing traces."""
    found: Callable[..., Any] = torch.library.impl(_LIBRARY, name, "CompositeImplicitAutograd")
    return found


def fakes(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what tracing sees."""
    found: Callable[..., Any] = torch.library.register_fake(f"fastlora::{name}")
    return found
