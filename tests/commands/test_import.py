"""`import fastlora`: what it takes, what it leaves out, and which names the package has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastlora.ops.execution_mode import constant_when_compiled
from tests.support.programs import python, run

ROOT = Path(__file__).resolve().parents[2]
MAX_RATIO = 1.4
RUNS = 5


def test_the_import_takes_little_longer_than_that_of_torch(tmp_path: Path) -> None:
    """Processor time of both, in the same processes: other programs' work does not count."""
    code = """
import time
start = time.process_time()
import torch
between = time.process_time()
import fastlora
print(between - start, time.process_time() - start)
"""
    runs = [python(code, tmp_path, PYTHONPATH=str(ROOT)).split() for _ in range(RUNS)]
    alone, both = (min(map(float, times)) for times in zip(*runs, strict=True))
    assert both <= MAX_RATIO * alone, f"{both:.2f} s, {both / alone:.2f} of torch's {alone:.2f} s"


def test_the_import_prints_nothing(tmp_path: Path) -> None:
    """Not even the warnings that Python hides by default, apart from those of torch."""
    flags = ("-W", "default", "-W", "ignore:::torch")
    done = run(*flags, "-c", "import torch, fastlora", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_import_after_other_libraries_prints_nothing(tmp_path: Path) -> None:
    """Those libraries may print when they are imported."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    code = """
import sys
import peft, transformers
print("before", file=sys.stderr)
import fastlora
print("after", file=sys.stderr)
"""
    done = run("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "before\nafter\n" in done.stderr and "fastlora" not in done.stderr


def test_the_import_leaves_out_what_only_some_need(tmp_path: Path) -> None:
    """The compiler comes with the first `torch.compile`, other libraries with their models."""
    code = """
import sys, fastlora
heavy = ("torch._dynamo", "torch._inductor", "peft", "transformers", "matplotlib",
    "fastlora.integrations.peft", "fastlora.integrations.peft_layers")
own = ("fastlora.kernels.", "fastlora.bench.", "fastlora.commands")
print([name for name in sys.modules if name.startswith(own) or name in heavy])
"""
    measured = str(tmp_path)  # its table would be read at the first launch
    (tmp_path / "interpreter.json").write_text("no table")
    environment = {"FASTLORA_MEASURED": measured, "TRITON_INTERPRET": "1"}
    assert python(code, tmp_path, PYTHONPATH=str(ROOT), **environment) == "[]\n"


def test_the_package_holds_its_own_folder_and_two_beside_it(tmp_path: Path) -> None:
    """In a checkout neither tests nor setup.py are its modules, and a walk through it ends.

    Kernels and benchmarks are found by every form of an import, before and after one of theirs.
    """
    code = """
import importlib, importlib.util, pkgutil, fastlora
print(*fastlora.__path__, sep="|")
names = [module.name for module in pkgutil.walk_packages(fastlora.__path__, "fastlora.")]
assert len(names) == len(set(names)), names
assert "fastlora.layers.linear" in names and not {"fastlora.kernels", "fastlora.bench"} & set(names)
for name in ("tests", "setup", "examples", "docs", "fastlora"):
    try:
        importlib.import_module(f"fastlora.{name}")
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
for folder, module in (("kernels", "philox"), ("bench", "summary")):
    spec = importlib.util.find_spec(f"fastlora.{folder}")
    package = importlib.import_module(f"fastlora.{folder}")
    assert list(spec.submodule_search_locations) == list(package.__path__)
    assert package is getattr(fastlora, folder)
    exec(f"from fastlora.{folder} import {module} as found")
    name = f"fastlora.{folder}.{module}"
    assert getattr(package, module) is found is importlib.import_module(name)
    print(*(found.name for found in pkgutil.iter_modules(package.__path__)))
"""
    for cwd in (ROOT, tmp_path):
        path, *folders = python(code, cwd, PYTHONPATH=str(ROOT)).splitlines()
        assert path == f"{ROOT / 'fastlora'}"
        for folder, names in zip(("kernels", "bench"), folders, strict=True):
            assert names.split() == sorted(path.stem for path in ROOT.glob(f"{folder}/*.py"))


def test_constants_are_marked_as_torch_marks_them() -> None:
    """The mark is private to torch; a torch that changes it fails here."""

    def ours() -> None: ...
    def theirs() -> None: ...

    assert constant_when_compiled(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_a_constant_is_computed_while_tracing() -> None:
    """Its body, which no graph can hold, runs once for two calls of the graph."""
    calls: list[str] = []

    @constant_when_compiled
    def constant() -> int:
        calls.append(os.urandom(4).hex())
        return len(calls)

    @torch.compile(backend="eager", fullgraph=True)
    def graph(x: torch.Tensor) -> torch.Tensor:
        return x + constant()

    x = torch.zeros(2)
    assert graph(x).tolist() == graph(x).tolist() == [1.0, 1.0]
    assert len(calls) == 1
