"""`when_imported`: run code as soon as another library has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Call ``act`` once, as soon as a module has been imported.

    If the module is already imported, ``act`` is called immediately. This function does not import
    the module. An ImportError, AttributeError, or TypeError raised by ``act`` becomes a warning,
    because fastlora must not make the import of another library fail.

    Args:
        name: The full name of the module.
        act: The function to call.
    """
    if sys.modules.get(name) is not None:
        _try(name, act)
    else:
        sys.meta_path.insert(0, _Watcher(name, act))


def _try(name: str, act: Callable[[], None]) -> None:
    try:
        act()
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(
            f"fastlora does not support this version of {name}, so the integration with it is "
            f"incomplete: {error}",
            stacklevel=2,
        )


class _Watcher(importlib.abc.MetaPathFinder):
    """An import finder that runs an action after a given module is imported.

    It finds the module through the other finders in ``sys.meta_path``.
    """

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's spec from the other finders, or None for any other module."""
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (f.find_spec(name, path, target) for f in others if hasattr(f, "find_spec"))
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that calls a module's own loader, and then runs the action of a `_Watcher`."""

    def __init__(self, loader: importlib.abc.Loader, watcher: _Watcher) -> None:
        self.loader, self.watcher = loader, watcher

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with the wrapped loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with the wrapped loader, and then run the action once."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.watcher in sys.meta_path:
            sys.meta_path.remove(self.watcher)
            _try(self.watcher.name, self.watcher.act)
