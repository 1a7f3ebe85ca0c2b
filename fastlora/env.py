"""Every environment variable that fastlora reads, in one place."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_SECRETS = ("FASTLORA_API_KEY", "FASTLORA_ADMIN_KEY")
_VARIABLES = (
    *("FASTLORA_BATCH_INVARIANT", "FASTLORA_PLAN", "FASTLORA_MEASURED"),
    *("TRITON_INTERPRET", "XDG_CACHE_HOME", *_SECRETS),
)


def triton_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` makes Triton kernels run on the CPU (for tests only)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def batch_invariant() -> bool:
    """Whether ``FASTLORA_BATCH_INVARIANT=1`` turns the batch-invariant mode on from the start."""
    return os.environ.get("FASTLORA_BATCH_INVARIANT", "0").lower() in ("1", "true", "on", "yes")


def plan() -> str:
    """Returns the plan that ``FASTLORA_PLAN`` names for calls that name none, else ``"auto"``."""
    return os.environ.get("FASTLORA_PLAN", "auto").lower() or "auto"


def measured_folder() -> Path | None:
    """Returns the folder of measured tables that ``FASTLORA_MEASURED`` names, if it names one."""
    named = os.environ.get("FASTLORA_MEASURED")
    return Path(named) if named else None


def in_use() -> dict[str, str]:
    """Returns those of the variables read here that are set, by name; no secret's value."""
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {name: "(set)" if name in _SECRETS else value for name, value in found.items()}


def cache_dir() -> Path:
    """Returns the folder for files that can be made again (``$XDG_CACHE_HOME/fastlora``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastlora"


def api_key() -> str | None:
    """Returns the key that clients of ``fastlora serve`` must send; it may be an empty string."""
    return os.environ.get("FASTLORA_API_KEY")


def admin_key() -> str | None:
    """Returns the key that changes the adapters of ``fastlora serve``, as `api_key` does."""
    return os.environ.get("FASTLORA_ADMIN_KEY")


def sets_allocator() -> bool:
    """Whether the user has settings of glibc's allocator."""
    names = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_")
    return any(name in os.environ for name in (*names, "MALLOC_TRIM_THRESHOLD_"))


def prepare_demo_process() -> None:
    """Sets what the demo needs before its imports: no network, no banners on stderr.

    The model lies on the disk, so nothing may ask the Hub; kineto (`torch.profiler`) would print
    two lines for every memory measurement.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def quiet_imports() -> None:
    """Keeps libraries that transformers and PEFT import from warning as they are imported.

    For a command of ours, before its imports: the user of the command asked for none of them, and
    can do nothing about the files that they miss.
    """
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
