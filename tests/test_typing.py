"""Parameters without a type: in these folders every function says what it takes.

``Any``, alone or within another type but a callable's, and a missing annotation count. What torch
hands to an autograd function as ``ctx``, and arguments that are passed on as ``*args`` or
``**kwargs``, do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastlora"


def holds_any(kind: ast.AST) -> bool:
    """Whether a type is ``Any``, or has it within."""
    if isinstance(kind, ast.Name):
        return kind.id == "Any"
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Callable":
        return False
    return any(holds_any(part) for part in ast.iter_child_nodes(kind))


def untyped(source: str) -> Iterator[str]:
    """Yields the function and name of each parameter that may be anything."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = function.args
        for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs):
            if parameter.arg in ("self", "cls", "ctx"):
                continue
            if parameter.annotation is None or holds_any(parameter.annotation):
                yield f"{function.name}({parameter.arg})"


@pytest.mark.parametrize("folder", ["ops", "autograd", "routing", "layers"])
def test_parameters_have_types(folder: str) -> None:
    found = [
        f"{path.name}: {parameter}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for parameter in untyped(path.read_text())
    ]
    assert found == []


def test_reading_of_parameters() -> None:
    text = """
def f(a: int, b, c: list[Any], *args: Any, d: Any | None = None, **kwargs: Any) -> Any:
    def g(self, x: Any) -> None: ...
class C:
    def forward(ctx: Any, x: Callable[..., int]) -> Any: ...
"""
    assert list(untyped(text)) == ["f(b)", "f(c)", "f(d)", "g(x)"]
