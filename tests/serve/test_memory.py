"""What adapters leave goes back to the system: the program's settings of glibc's allocator."""

from __future__ import annotations

import os
import platform

import pytest

from fastlora.commands import serve
from tests.support.programs import run

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")

# Frees a block of an adapter's size, after which glibc alone would put the next ones into heaps.
PROGRAM = """
import ctypes
from fastlora.commands import serve
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

class Info(ctypes.Structure):
    _fields_ = [(f"n{i}", ctypes.c_size_t) for i in range(10)]

libc.mallinfo2.restype = Info

def mapped():
    libc.free(libc.malloc(24 << 20))
    before = libc.mallinfo2().n4  # bytes of blocks that are mapped alone
    blocks = [libc.malloc(8 << 20) for _ in range(4)]
    return (libc.mallinfo2().n4 - before) >> 20

print(mapped())
serve._make_malloc_return_memory()
print(mapped())
"""


@glibc
def test_adapters_are_mapped_alone_whatever_was_freed_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    done = run("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "32"]


@glibc
def test_a_users_own_settings_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")

    def load(name: None) -> None:
        raise AssertionError("looks for mallopt")

    monkeypatch.setattr(serve.ctypes, "CDLL", load)
    serve._make_malloc_return_memory()
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    with pytest.raises(AssertionError, match="mallopt"):
        serve._make_malloc_return_memory()
