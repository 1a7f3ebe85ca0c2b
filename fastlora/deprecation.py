"""Deprecated names, which still work and give a `FutureWarning`.

`docs/dev/renamed.md` lists all old and new names.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Issue a `FutureWarning` that ``old`` was renamed to ``new``."""
    warnings.warn(
        f"{old} is deprecated and will be removed; use {new}", FutureWarning, stacklevel=stacklevel
    )


def renamed_attributes(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that accepts the old names of renamed attributes.

    Args:
        module: The module's ``__name__``.
        names: Maps each old name to the new name.
    """

    def __getattr__(name: str) -> Any:
        import sys

        if name in names:
            warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
            return getattr(sys.modules[module], names[name])
        raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)

    return __getattr__


class RenamedAttribute:
    """Descriptor for the old name of a renamed method or property.

    Args:
        new: The new name.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner.__name__, name

    def __get__(self, instance: Any, owner: type) -> Any:
        warn_renamed(f"{self.owner}.{self.name}", f"{self.owner}.{self.new}")
        return getattr(owner if instance is None else instance, self.new)


def renamed_arguments(**names: str) -> Callable[[_Function], _Function]:
    """Decorator that accepts the old names of a function's keyword arguments.

    Args:
        **names: Maps each old name to the new name.

    Raises:
        TypeError: A call gives both an old and a new name.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if kwargs.keys() & names.keys():
                for old in kwargs.keys() & names.keys():
                    new = names[old]
                    if new in kwargs:
                        raise TypeError(
                            f"{function.__name__}() got both {new!r} and its old name {old!r}"
                        )
                    warn_renamed(f"the argument {old!r} of {function.__name__}()", repr(new))
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate
