"""Warnings that point to the code that called fastlora."""

from __future__ import annotations

import sys
import warnings

# Frames of these packages are between a user's call and the code that warns.
_SKIPPED_PACKAGES = {"fastlora", "torch", "contextlib", "dataclasses", "functools", "importlib"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Emit a warning that points to the line of user code that called fastlora.

    The line is in the innermost frame that is not in fastlora, in PyTorch, or in a helper of the
    standard library. Filters that show a warning once per location therefore show it once for each
    such line.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _top_level_package_of(frame.f_globals) in _SKIPPED_PACKAGES:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=str(frame.f_globals.get("__name__") or "<unknown>"),  # None would drop the warning
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _top_level_package_of(module_globals: dict[str, object]) -> str:
    """Return the name of the top-level package of a module, given the module's globals."""
    return str(module_globals.get("__name__", "")).partition(".")[0]
