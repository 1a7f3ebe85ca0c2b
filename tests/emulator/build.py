"""Builds the C++ part of the emulator at its first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "machine"
# No contraction: an FMA must come from PTX's `fma` alone. Rounding modes change at run time.
FLAGS = (
    *("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-frounding-math"),
    *("-fno-math-errno", "-shared", "-fPIC"),
)


def compiler() -> str | None:
    """Returns the C++ compiler: ``$CXX``, g++, or clang++; None where there is none."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def unavailable_reason() -> str:
    """Returns why the emulator cannot run here; empty where it can, and always under ``$CI``.

    Tests skip by it:
    ``pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())``.
    """
    if os.environ.get("CI"):
        return ""  # a run without a compiler fails there
    if os.name != "posix":
        return "the emulator of compiled kernels needs Linux"
    return "" if compiler() else "the emulator of compiled kernels needs a C++20 compiler (g++)"


@functools.cache
def cache_folder() -> Path:
    """Returns the folder of what is built, in the user's cache or the temporary folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "fastlora-emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"fastlora-emulator-{os.getuid()}"
        folder.mkdir(exist_ok=True)
        return folder


def _key(command: str) -> str:
    """A hash of the sources, the compiler, its flags, and the instructions that the CPU has."""
    found = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([command, "--version"], capture_output=True, check=True).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    found.update(version + features.encode() + " ".join(FLAGS).encode())
    return found.hexdigest()[:20]


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the library, which is built unless an earlier process built it.

    Raises:
        RuntimeError: There is no compiler, or it failed.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler found: set CXX, or install g++ or clang++")
    target = cache_folder() / f"machine-{_key(command)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, "machine.so")
            arguments = [command, *FLAGS, "-o", str(made), str(SOURCES / "machine.cpp")]
            result = subprocess.run(arguments, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(arguments)} failed:\n{result.stderr}")
            os.replace(made, target)  # atomic: another process may build the same file
    loaded = ctypes.CDLL(str(target))
    for name in ("opcode_names", "type_names"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def names(kind: str) -> dict[str, int]:
    """Returns the numbers of ``"opcode"``s or ``"type"``s by name."""
    text: str = getattr(library(), f"{kind}_names")().decode()
    return {name.strip(): number for number, name in enumerate(text.strip("()").split(","))}
