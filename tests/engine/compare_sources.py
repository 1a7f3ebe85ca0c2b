"""Compare the sources of a version of vLLM with the functions that fastlora relies on.

    python tests/engine/compare_sources.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

The argument is a wheel, or a folder that contains `vllm`. Sources are parsed, not imported, so
neither vLLM nor its dependencies are needed. The exit code is 1 if there are differences.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fastlora.integrations.vllm import register

_BASE = "BaseLayerWithLoRA"


def source_reader(path: Path) -> Callable[[str], str | None]:
    """Return a function that returns the source of a module, or None."""
    if path.is_dir():

        def read(module: str) -> str | None:
            file = path / f"{module.replace('.', '/')}.py"
            return file.read_text() if file.is_file() else None

        return read
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())

    def read_member(module: str) -> str | None:
        name = f"{module.replace('.', '/')}.py"
        return archive.read(name).decode() if name in names else None

    return read_member


def functions_of(source: str | None, owner: str) -> dict[str, ast.FunctionDef]:
    """Return the functions of a class, or of a module if ``owner`` is empty."""
    if source is None:
        return {}
    body: list[ast.stmt] = ast.parse(source).body
    if owner:
        found = [each for each in body if isinstance(each, ast.ClassDef) and each.name == owner]
        body = found[0].body if found else []
    functions = [each for each in body if isinstance(each, ast.FunctionDef)]
    return {
        each.name: each
        for each in functions
        if not any(ast.unparse(mark) == "overload" for mark in each.decorator_list)
    }


def parameter_names(function: ast.FunctionDef) -> tuple[str, ...]:
    """Return the names of the parameters, with asterisks before variadic ones."""
    own = function.args
    names = [each.arg for each in (*own.posonlyargs, *own.args)]
    names += [f"*{own.vararg.arg}"] if own.vararg else []
    names += [each.arg for each in own.kwonlyargs]
    return tuple(names + ([f"**{own.kwarg.arg}"] if own.kwarg else []))


def differences(read: Callable[[str], str | None]) -> Iterator[str]:
    """Yield the differences, one line each."""
    for owner, name, expected in register.RELIED_ON:
        module, _, cls = owner.partition(":")
        function = functions_of(read(module), cls).get(name)
        if function is None:
            yield f"{owner}.{name} is missing"
        elif parameter_names(function) != expected:
            yield f"{owner}.{name} has parameters {', '.join(parameter_names(function))}"
    module, _, cls = register._ABSTRACT.partition(":")
    for name, function in functions_of(read(module), cls).items():
        marks = {ast.unparse(mark) for mark in function.decorator_list}
        if "abstractmethod" in marks and name not in register._WRAPPER_METHODS:
            yield f"{module}.{cls}.{name} is new"
    yield from _new_definitions(read)


def _new_definitions(read: Callable[[str], str | None]) -> Iterator[str]:
    """Yield the layer classes that define a method themselves and are not in the table."""
    package = read("vllm.lora.layers.__init__")
    known = {(owner, name) for owner, names in register._LAYER_CLASSES.items() for name in names}
    for statement in ast.parse(package or "").body:
        if not isinstance(statement, ast.ImportFrom) or statement.module is None:
            continue
        source = read(statement.module) or ""
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef) or node.name == _BASE:
                continue
            if node.name in register._MOE_CLASSES:
                continue
            for name in set(functions_of(source, node.name)) & set(register._LAYER_METHODS):
                if (f"{statement.module}:{node.name}", name) not in known:
                    yield f"{statement.module}:{node.name}.{name} is new"


def main() -> int:
    """Print the differences, and return the exit code."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: {sys.argv[0]} WHEEL_OR_FOLDER\n")
        return 2
    found = list(differences(source_reader(Path(sys.argv[1]))))
    for line in found:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{len(found)} differences from {', '.join(register.KNOWN_VERSIONS)}\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
