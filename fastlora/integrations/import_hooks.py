"""`call_when_imported`: run code as soon as another library has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from fastlora.user_warnings import warn


def call_when_imported(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` as soon as a module has been imported.

    ``action`` is called only once. If the module is already imported, it is called immediately.
    This function does not import the module. An ImportError, AttributeError, or TypeError raised by
    ``action`` becomes a warning, because fastlora must not make the import of another library fail.

    Args:
        name: The full name of the module.
        action: The function to call.
    """
    if sys.modules.get(name) is not None:
        _call_or_warn(name, action)
    else:
        sys.meta_path.insert(0, _ImportHookFinder(name, action))


def _call_or_warn(name: str, action: Callable[[], None]) -> None:
    try:
        action()
    except (ImportError, AttributeError, TypeError) as error:
        warn(
            f"fastlora does not support this version of {name}, so the integration with it is "
            f"incomplete: {error}",
        )


class _ImportHookFinder(importlib.abc.MetaPathFinder):
    """Import finder that runs a hook after a module is imported.

    The hook is an action that the finder adds to the loader of the module. Each finder handles one
    module and one action. The finder locates the module through the other finders in
    ``sys.meta_path``.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Intercept the import of a module, and add the import hook to the module's spec.

        The other finders in ``sys.meta_path`` find the spec of the module ``name``. The result is
        this spec with the import hook added. The result is None if the hook is for another module,
        or if no finder finds the spec.
        """
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (f.find_spec(name, path, target) for f in others if hasattr(f, "find_spec"))
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ImportHookLoader(spec.loader, self)
        return spec


class _ImportHookLoader(importlib.abc.Loader):
    """A loader that delegates to a module's original loader and then runs an import hook."""

    def __init__(self, loader: importlib.abc.Loader, watcher: _ImportHookFinder) -> None:
        self.loader, self.watcher = loader, watcher

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does.

        The result is None if the wrapped loader leaves the creation of the module to Python's
        default.
        """
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and then run the import hook.

        The wrapped loader executes the module. The hook runs its action only once.
        """
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.watcher in sys.meta_path:
            sys.meta_path.remove(self.watcher)
            _call_or_warn(self.watcher.name, self.watcher.action)
