"""What a fault is, and where in the code it lies."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """One fault: what goes wrong, the replacement that plants it, and the tests that notice.

    Args:
        sentence: What is wrong then, in one sentence.
        kind: The kind of fault. Two faults in one function differ in it.
        source: The commit that fixed this fault, or the item of a review that it comes from.
        path: The file, relative to the project's root.
        before: Text that occurs once in the file.
        after: What replaces it.
        tests: Pytest's names of the tests that fail with the fault. A name without a parameter
            stands for all cases of a test; one of them has to fail.
    """

    sentence: str
    kind: str
    source: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    def planted(self, root: Path = ROOT) -> str:
        """Returns the file's text with the fault.

        Raises:
            ValueError: If the text to replace does not occur exactly once.
        """
        text = (root / self.path).read_text(encoding="utf-8")
        found = text.count(self.before)
        if found != 1:
            raise ValueError(f"{self.path}: found {found} times: {self.before!r}")
        return text.replace(self.before, self.after)

    def function(self, root: Path = ROOT) -> str:
        """Returns the qualified name of the innermost function or class around the fault."""
        text = (root / self.path).read_text(encoding="utf-8")
        line = text[: text.index(self.before)].count("\n") + 1
        names: list[str] = []
        body: list[ast.stmt] = ast.parse(text).body
        while body:
            around = next((node for node in body if _spans(node, line)), None)
            if isinstance(around, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.append(around.name)
            body = [] if around is None else _statements(around)
        return ".".join(names)


def _spans(node: ast.stmt, line: int) -> bool:
    """Whether a statement, with its decorators, covers a line."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return first <= line <= (node.end_lineno or node.lineno)


def _statements(node: ast.stmt) -> list[ast.stmt]:
    """Returns the statements inside a statement."""
    found: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            found.append(child)
        elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
            found += child.body
    return found


def all_faults() -> tuple[Fault, ...]:
    """Returns the faults of all modules ``in_*`` of this package, in the order of their names."""
    import tests.faults as package

    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    modules = [
        importlib.import_module(f"{package.__name__}.{name}")
        for name in names
        if name.startswith("in_")
    ]
    return tuple(fault for module in modules for fault in module.FAULTS)
