"""The order of imports inside the package, and what it registers; ceilings that may only fall.

A floor is one more than the highest floor of what is imported. The files and folders directly in
the package have floors, and the files of a folder among themselves. Imports inside functions count,
those under TYPE_CHECKING do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

from tests.support.conformance_operators import import_everything, registered

ROOT = Path(__file__).parent.parent
FLOORS = 9  # as in `ORDER`
FLOORS_IN_A_FOLDER = 15  # of model/: parameters are selected below plans; 13 of layers/
OPERATORS = 21  # four for stacks of weights, with rows that a graph cannot read
AUTOGRAD_FUNCTIONS = 7  # two of them for stacks of weights
# The routing in force, the batch-invariant mode, and the recording of launches.
THREAD_LOCALS = 3
# Classes of the forward path that only hold values. A record that two steps can share is one. No
# forward pass reads three of them: `FusionStatus`, and two of `kernels/precompile.py`.
# Two are for products of one adapter, two for packed factors, two for the batches of an engine, and
# one is for stacks.
RECORDS = 60
FORWARD_PATH = ("layers", "autograd", "routing", "ops", "kernels")
# Lines of code by folder, without docstrings, comments, and blanks. A folder may have 3 % more.
CODE_LINES = {
    "algebra": 113,
    "autograd": 840,  # batched gradients
    "commands": 1850,  # vLLM in doctor, closed pipes, and names with dots in chat
    "init": 879,
    "integrations": 1800,  # 700 for vLLM, and mixed batches without a PeftModel
    "layers": 7045,  # replaced forwards, hooks of adapted parameters, and inputs of copies
    "model": 7570,  # ties of files, wrapped modules, and adapters that changed the base
    "ops": 4310,  # packed factors of several slices, stacks, and seeds of each call
    "optimizers": 272,  # copies of LoRA-FA optimizers, and checks of groups
    "pool": 1780,  # parameters, and stacks of them, as targets; longer names
    "routing": 1770,  # blocks of other asyncio tasks, and dropout of each call of a layer
    "serve": 2070,  # paths of invalid fields
    "train": 3720,  # checks of prompts, merge keys in YAML, and limits of settings
    "kernels": 4320,
}
# Folders and files of the package from the ground up; an import may not go up.
ORDER: tuple[tuple[str, ...], ...] = (
    (
        "deprecation",
        "env",
        "validation",
        "patterns",
        "weights_version",
        "sharding",
        "quantized_tensor",
        "user_warnings",
        "kernels",
    ),
    ("ops", "init", "command_line"),
    ("algebra", "routing", "autograd", "testing"),
    ("functional", "layers"),
    ("model",),
    ("pool", "integrations", "optimizers", "utils"),
    ("train", "serve"),
    ("__init__",),
    ("commands", "bench", "__main__"),
)
# What counts as one: the ground floor is kernels with the two files that they see, which see
# nothing of ours; old names of errors belong to the errors; ``python -m fastlora`` is one call of a
# command.
TOGETHER = {
    "fastlora.env": "fastlora.kernels",
    "fastlora.quantized_tensor": "fastlora.kernels",
    "fastlora.deprecation": "fastlora.validation",
    "fastlora.user_warnings": "fastlora.validation",
    "fastlora.__main__": "fastlora.commands",
}


def modules() -> dict[str, Path]:
    """Every module by its name; those in ``kernels/`` are installed as ``fastlora.kernels``."""
    found = {}
    for folder, package in (("fastlora", "fastlora"), ("kernels", "fastlora.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = path
    return found


class _Imports(ast.NodeVisitor):
    """Collects names of modules, and names imported from modules, on request for annotations."""

    def __init__(self, package: str, annotations: bool = False) -> None:
        self.package, self.annotations, self.found = package, annotations, set[str]()

    def visit_If(self, node: ast.If) -> None:
        if self.annotations:
            self.generic_visit(node)
            return
        name = node.test.attr if isinstance(node.test, ast.Attribute) else ""
        name = node.test.id if isinstance(node.test, ast.Name) else name
        for child in node.orelse if name == "TYPE_CHECKING" else [node.test, *node.body]:
            self.visit(child)
        if name != "TYPE_CHECKING":
            for child in node.orelse:
                self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            above = self.package.split(".")[: -node.level + 1 or None]
            source = ".".join([*above, source] if source else above)
        self.found |= {f"{source}.{alias.name}" for alias in node.names}

    def visit_Call(self, node: ast.Call) -> None:
        """``importlib.import_module("...")``."""
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else ""
        if name == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
            self.found.add(str(node.args[0].value))
        self.generic_visit(node)


def imports_of(
    name: str, path: Path, known: dict[str, Path], annotations: bool = False
) -> set[str]:
    """Modules of ours that a module imports. The package itself imports what it hands on."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    visitor = _Imports(package, annotations)
    visitor.visit(ast.parse(path.read_text()))
    found = set()
    for target in visitor.found:
        while target and target not in known:
            target = target.rpartition(".")[0]
        if target and target != name:
            found.add(target)
    return found


def graph(annotations: bool = False) -> dict[str, set[str]]:
    """What each module imports; on request for its annotations too."""
    known = modules()
    return {name: imports_of(name, path, known, annotations) for name, path in known.items()}


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each module, from 1. A `CycleError` names modules that import each other."""
    found: dict[str, int] = {}
    for name in TopologicalSorter(edges).static_order():
        found[name] = 1 + max((found[target] for target in edges[name]), default=0)
    return found


def units(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same of files and folders directly in the package, those of `TOGETHER` as one."""
    found: dict[str, set[str]] = {}
    for name, targets in edges.items():
        firsts = (".".join(n.split(".")[:2]) for n in (name, *targets))
        own, *others = (TOGETHER.get(first, first) for first in firsts)
        found.setdefault(own, set()).update(set(others) - {own})
    return found


def inside(edges: dict[str, set[str]], folder: str) -> dict[str, set[str]]:
    """The same of the files of one folder."""
    own = {name for name in edges if name.startswith(f"{folder}.")}
    return {name: edges[name] & own for name in own}


def upward(edges: dict[str, set[str]]) -> Iterator[str]:
    """Imports that go up in `ORDER`."""
    rank = {part: floor for floor, parts in enumerate(ORDER) for part in parts}

    def of(name: str) -> int | None:
        return rank.get(name.split(".")[1] if "." in name else "__init__")

    for name, targets in sorted(edges.items()):
        for target in sorted(targets):
            mine, theirs = of(name), of(target)
            if mine is not None and theirs is not None and theirs > mine:
                yield f"{name} imports {target}"


def test_floors() -> None:
    edges = graph()
    found = floors(units(edges))
    highest = max(found.values())
    assert highest <= FLOORS, sorted(name for name, floor in found.items() if floor == highest)
    for folder in set(units(edges)) - {"fastlora"}:
        among = floors(inside(edges, folder)).values()
        assert max(among, default=0) <= FLOORS_IN_A_FOLDER, folder


def test_nothing_imports_itself_in_a_circle() -> None:
    edges = graph()
    assert floors(edges).keys() == edges.keys() and floors(units(edges))


def test_annotations_make_no_circle_in_layers() -> None:
    """A layer's type is in the lowest files, so that those that a forward calls can name it."""
    edges = inside(graph(annotations=True), "fastlora.layers")
    assert edges["fastlora.layers.call"] and floors(edges)


def test_imports_go_down() -> None:
    assert not list(upward(graph()))


def test_what_counts_as_one() -> None:
    edges = graph()
    files = {"fastlora.env", "fastlora.quantized_tensor"}
    seen = {t for name in edges if name.startswith("fastlora.kernels.") for t in edges[name]}
    assert {name for name in seen if not name.startswith("fastlora.kernels.")} == files
    assert not any(edges[name] for name in files)
    assert edges["fastlora.__main__"] == {"fastlora.commands.cli"}


def test_reading_of_imports() -> None:
    """Inside functions, relative, of names and of modules; not those for type checkers."""
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from p import a
else:
    import p.c
def f():
    from p.b import thing
    from . import d
"""
    visitor = _Imports("p.q")
    visitor.visit(ast.parse(text))
    assert visitor.found == {"typing.TYPE_CHECKING", "p.c", "p.b.thing", "p.q.d"}
    edges = {"p": {"p.a"}, "p.a": {"p.b", "p.c"}, "p.b": {"p.c"}, "p.c": set()}
    assert floors(edges) == {"p.c": 1, "p.b": 2, "p.a": 3, "p": 4}
    with pytest.raises(CycleError, match="p.b"):
        floors({**edges, "p.c": {"p.b"}})
    edges = {"p.q.d": {"p.a"}, "p.q.e": {"p.q.d"}, "p.a": set()}
    assert units(edges) == {"p.q": {"p.a"}, "p.a": set()}
    assert floors(inside(edges, "p.q")) == {"p.q.d": 1, "p.q.e": 2}


def test_registered_operators() -> None:
    found = registered()
    assert 0 < len(found) <= OPERATORS, sorted(found)


def test_autograd_functions() -> None:
    """What the package derives from `torch.autograd.Function` itself."""
    import_everything()
    made = torch.autograd.Function.__subclasses__()
    ours = [
        f for f in made if f.__module__.startswith("fastlora.") and ".bench." not in f.__module__
    ]
    found = {f"{f.__module__}.{f.__name__}" for f in ours}
    assert 0 < len(found) <= AUTOGRAD_FUNCTIONS, ", ".join(sorted(found))


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass, a named tuple or a typed dictionary."""
    made_by = [ast.unparse(each) for each in (*node.bases, *node.decorator_list)]
    return any(
        kind in text for text in made_by for kind in ("NamedTuple", "TypedDict", "dataclass")
    )


def test_records_of_the_forward_path() -> None:
    found = [
        f"{name}.{node.name}"
        for name, path in modules().items()
        if name.partition(".")[2].split(".")[0] in FORWARD_PATH
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and is_record(node)
    ]
    assert 0 < len(found) <= RECORDS, sorted(found)


def test_thread_locals() -> None:
    """What a thread computes for later calls is kept on what it was computed for."""
    found = [
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base) in ("threading.local", "local") for base in node.bases)
    ]
    assert 0 < len(found) <= THREAD_LOCALS, found


def code_lines(text: str) -> int:
    """Counts the lines of a module that are neither blank, nor comments, nor docstrings."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            documented.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in documented
        for number, line in enumerate(text.splitlines(), 1)
    )


def test_what_counts_as_code() -> None:
    """A docstring, a comment, and a blank line do not; a string that is assigned does."""
    assert code_lines('"""Doc.\n\nMore.\n"""\n\n# note\nx = """a\nb"""\n') == 2


@pytest.mark.parametrize("folder", CODE_LINES)
def test_code_lines(folder: str) -> None:
    """A folder that needs more lines raises its number in the commit that adds them."""
    root = ROOT / folder if folder == "kernels" else ROOT / "fastlora" / folder
    found = sum(code_lines(path.read_text(encoding="utf-8")) for path in root.rglob("*.py"))
    assert 0 < found <= 1.03 * CODE_LINES[folder]
