"""The public names and their signatures, as recorded in ``public_api.txt``: a change is a diff.

``python tests/test_public_api.py`` writes the record anew.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "public_api.txt"
MODULES = (
    "fastlora",
    "fastlora.functional",
    "fastlora.integrations",
    "fastlora.layers",
    "fastlora.optimizers",
    "fastlora.pool",
    "fastlora.testing",
    "fastlora.train",
    "fastlora.validation",
)


def public_names(module: types.ModuleType) -> list[str]:
    """What ``__all__`` names, else what is defined there without an underscore.

    Of `fastlora.functional` what users call; beside it lie the seams that layers call.
    """
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    prefix = "lora_" if module.__name__ == "fastlora.functional" else ""
    return sorted(
        name
        for name, value in vars(module).items()
        if name.startswith(prefix)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    )


def signature(value: Any) -> str:
    """Parameters and what comes back, as written."""
    try:
        found = str(inspect.signature(value))
        found = re.sub(r"<function (\w+) at 0x\w+>", r"\1", found)  # defaults
        return re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"'\1'", found)  # of named tuples
    except (TypeError, ValueError):
        return "(...)"


def members(owner: type) -> Iterator[str]:
    """A class's own and inherited public methods and properties; not those of other libraries."""
    for name in sorted(dir(owner)):
        if name.startswith("_"):
            continue
        holder = next((c for c in owner.__mro__ if name in vars(c)), object)
        if not holder.__module__.startswith("fastlora"):
            continue
        value = inspect.getattr_static(owner, name)
        if isinstance(value, property):
            yield f"{name}: property"
        elif isinstance(value, (classmethod, staticmethod)):
            yield f"{name}{signature(getattr(owner, name))}  [{type(value).__name__}]"
        elif inspect.isfunction(value):
            yield f"{name}{signature(value)}"
        elif isinstance(value, enum.Enum):
            yield f"{name} = {value.value!r}"


def described(name: str, value: Any, known: dict[int, str]) -> Iterator[str]:
    """Lines for one name; one that stands above already is only named."""
    if isinstance(value, types.ModuleType):
        yield f"{name}: module"
    elif id(value) in known:
        yield f"{name}: {known[id(value)]}"
    elif inspect.isclass(value):
        if issubclass(value, BaseException):
            bases = ", ".join(base.__name__ for base in value.__bases__)
            yield f"class {name}({bases})"
            return
        yield f"class {name}{'' if issubclass(value, enum.Enum) else signature(value)}"
        yield from (f"    {line}" for line in members(value))
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def recorded() -> str:
    """The record as the code has it now."""
    lines: list[str] = []
    known: dict[int, str] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        lines.append(f"# {path}")
        for name in public_names(module):
            value = getattr(module, name)
            lines += described(name, value, known)
            if callable(value):
                known.setdefault(id(value), f"{path}.{name}")
        lines.append("")
    return "\n".join(lines)


def test_names_and_signatures() -> None:
    """As recorded; where a change is meant, record it anew and say so in the changelog."""
    assert recorded() == RECORD.read_text()


if __name__ == "__main__":
    RECORD.write_text(recorded())
    sys.exit(0)
