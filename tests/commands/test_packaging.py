"""What is installed: the kernels under `fastlora.kernels`, and nothing that confuses anybody."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.programs import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sources alone, without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fastlora", "kernels", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "kernels" / "measured").mkdir(exist_ok=True)
    (source / "kernels" / "measured" / "sm_90.json").write_text('{"rows": []}')
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "-w", str(out), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.glob("fastlora_triton-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked where nothing else is."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """Every file of fastlora/ and kernels/, tables, measured ones, the type marker, no tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"fastlora/{p.relative_to(ROOT / 'fastlora')}" for p in ROOT.glob("fastlora/**/*.py")
    }
    for folder in ("kernels", "bench"):
        sources |= {f"fastlora/{folder}/{p.name}" for p in ROOT.glob(f"{folder}/*.py")}
    sources |= {f"fastlora/kernels/candidates/{p.name}" for p in ROOT.glob("kernels/candidates/*")}
    data = {"fastlora/py.typed", "fastlora/kernels/measured/sm_90.json"}
    assert sources | data <= names
    assert not [n for n in names if not n.startswith(("fastlora/", "fastlora_triton-"))]


def test_wheel_is_one_package(installed: Path, tmp_path: Path) -> None:
    """From anywhere it is its own files; a walk through it ends; strangers beside are not of it."""
    for name in ("kernels", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    shutil.copytree(installed / "fastlora", tmp_path / "fastlora")
    code = """
import importlib.util, pkgutil, fastlora, fastlora.kernels.lora_linear as kernel
names = [module.name for module in pkgutil.walk_packages(fastlora.__path__, "fastlora.")]
assert len(names) == len(set(names)) and "fastlora.layers.linear" in names
assert importlib.util.find_spec("fastlora.tests") is None
print(*fastlora.__path__, *fastlora.kernels.__path__, kernel.__file__, sep="\\n")
"""
    own = tmp_path / "fastlora"
    printed = python(code, installed.parent, PYTHONPATH=str(tmp_path)).splitlines()
    assert printed == [*map(str, (own, own / "kernels", own / "kernels" / "lora_linear.py"))]


def test_wheel_runs_its_commands(wheel: Path, installed: Path, tmp_path: Path) -> None:
    """The entry point names what is there, and help and a benchmark are the wheel's own."""
    with zipfile.ZipFile(wheel) as archive:
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "fastlora = fastlora.commands.cli:main" in archive.read(points).decode()
    code = """
import runpy, sys
from fastlora.commands import cli
commands = ("bench mixed --help", "bench kernels --help", "demo --help", "train --help")
for arguments in (*commands, "--version"):
    try:
        cli.main(arguments.split())
    except SystemExit as done:
        assert done.code == 0, arguments
sys.argv[1:] = "--out r.csv --tests pass --device cpu --dry-run --max-points 0".split()
sys.argv += "--dtype float32 --impl eager".split()
try:
    runpy.run_module("fastlora.bench.linear", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
from fastlora.bench import experts, machine, mixed, mixed_bench, sanitize, soak, train_step
from fastlora.commands import demo
print(machine.commit(machine.ROOT), machine.results_folder(), sep="\\n")
print(cli.__file__, demo.__file__, mixed_bench.__file__, sep="\\n")
"""
    printed = python(code, tmp_path, PYTHONPATH=str(installed)).splitlines()
    digest, folder, *files = printed[-5:]
    assert all(Path(file).is_relative_to(installed) for file in files), files
    assert digest.startswith("source-") and folder == "."
    assert f",{digest}," in (tmp_path / "r.csv").read_text()  # rows carry its sources' digest


def test_in_a_checkout_its_own_files_come_first(installed: Path, tmp_path: Path) -> None:
    """In the repository root ./fastlora has its kernels beside it; `kernels` is another package."""
    code = """
import sys, kernels
from fastlora.kernels import philox
print(sys.path[0] or "root first", kernels.__file__, philox.__file__)
"""
    other = tmp_path / "kernels" / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    printed = python(code, ROOT, PYTHONPATH=f"{installed}{os.pathsep}{tmp_path}")
    assert printed == f"root first {other} {ROOT / 'kernels' / 'philox.py'}\n"


def test_editable_install_imports_its_kernels(tmp_path: Path) -> None:
    """The install that the Makefile makes, from a folder that has nothing to do with it."""
    import importlib.metadata

    try:
        importlib.metadata.distribution("fastlora-triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastlora-triton is not installed")
    code = "import fastlora.kernels.lora_linear as kernel; print(kernel.__file__)"
    assert python(code, tmp_path).endswith("lora_linear.py\n")


def test_without_triton_it_is_eager_only(installed: Path, tmp_path: Path) -> None:
    """Where triton is missing the import works, auto is eager, and asking for triton says why."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("triton", "fastlora", "__editable__")):
            (packages / entry.name).symlink_to(entry)
    code = """
import importlib.util, torch, fastlora
from fastlora.functional import lora_linear
assert importlib.util.find_spec("triton") is None
x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
assert lora_linear(x, w, a, b, 0.5).tolist() == [[6.0] * 3] * 2
try:
    lora_linear(x, w, a, b, 0.5, impl="triton")
except fastlora.FastLoraError as error:
    print(error)
"""
    path = f"{installed}{os.pathsep}{packages}"
    printed = python(code, tmp_path, "-S", PYTHONPATH=path)
    assert printed == "impl='triton' cannot be used: triton is not installed\n"


def test_missing_kernels_raise(installed: Path, tmp_path: Path) -> None:
    """A broken install is an error, never a silent eager path."""
    broken = tmp_path / "broken"
    shutil.copytree(installed, broken)
    shutil.rmtree(broken / "fastlora" / "kernels")
    code = """
import torch, fastlora.functional as f
try:
    f.lora_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1), 1.0,
                  impl="triton")
except ModuleNotFoundError as error:
    print(error)
"""
    pytest.importorskip("triton", reason="the kernels need it")
    printed = python(code, tmp_path, PYTHONPATH=str(broken), TRITON_INTERPRET="1")
    assert printed == "No module named 'fastlora.kernels'\n"
