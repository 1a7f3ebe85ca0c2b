"""Deprecated names, which still work but issue a `FutureWarning`.

`docs/dev/renamed.md` lists all old and new names.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from fastlora.user_warnings import warn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def warn_renamed(old: str, new: str) -> None:
    """Issue a deprecation warning for ``old``, which was renamed to ``new``.

    The category of the warning is `FutureWarning`.
    """
    warn(f"{old} is deprecated and will be removed; use {new}", FutureWarning)


def renamed_attributes(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that accepts the old names of renamed attributes.

    Accessing an old name issues a deprecation warning.

    Args:
        module: The module's ``__name__``.
        names: Maps each old name to the new name.
    """

    def __getattr__(name: str) -> Any:
        if name in names:
            warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
            return getattr(sys.modules[module], names[name])
        raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)

    return __getattr__


class RenamedAttribute:
    """Descriptor for the old name of a renamed attribute.

    The attribute is a method or property of a class. Reading the attribute from the class returns
    this object, so that tools that read all attributes of a class do not cause warnings.

    Args:
        new: The new name.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        self._warn(instance)
        return getattr(instance, self.new)

    def __set__(self, instance: Any, value: object) -> None:
        raise AttributeError(
            f"{self.name!r} is a deprecated name and cannot be set; use {self.new!r} instead"
        )

    def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method on an instance, as in ``Class.old_name(instance, ...)``."""
        self._warn(instance)
        return getattr(instance, self.new)(*args, **kwargs)

    def _warn(self, instance: object) -> None:
        owner = type(instance).__name__
        warn_renamed(f"{owner}.{self.name}", f"{owner}.{self.new}")


def without_old_names(instance: object, attribute_names: Iterable[str]) -> list[str]:
    """Return an instance's attribute names, excluding the deprecated ones.

    ``attribute_names`` are the names to filter, such as those that ``__dir__`` returns. A name is
    left out if it is the old name of a renamed attribute of the instance's class.
    """
    owner = type(instance)
    return [
        name
        for name in attribute_names
        if type(inspect.getattr_static(owner, name, None)) is not RenamedAttribute
    ]


def renamed_arguments(**names: str) -> Callable[[_Function], _Function]:
    """Return a decorator that accepts the old names of a function's renamed keyword arguments.

    The decorated function issues a deprecation warning if it is called with an old name.

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
