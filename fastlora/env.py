"""All environment variables that fastlora reads."""

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
    """Return whether ``TRITON_INTERPRET=1`` runs Triton kernels on the CPU (for tests only)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def batch_invariant() -> bool:
    """Return whether ``FASTLORA_BATCH_INVARIANT=1`` enables batch-invariant mode at startup."""
    return os.environ.get("FASTLORA_BATCH_INVARIANT", "0").lower() in ("1", "true", "on", "yes")


def plan() -> str:
    """Return the default plan from ``FASTLORA_PLAN``, or ``"auto"`` if it is not set.

    The default applies to calls that do not specify a plan.
    """
    return os.environ.get("FASTLORA_PLAN", "auto").lower() or "auto"


def measured_folder() -> Path | None:
    """Return the folder of measured tables from ``FASTLORA_MEASURED``, or None if it is not set."""
    named = os.environ.get("FASTLORA_MEASURED")
    return Path(named) if named else None


def in_use() -> dict[str, str]:
    """Return the name and value of each variable that is set. The values of secrets are hidden."""
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {name: "(set)" if name in _SECRETS else value for name, value in found.items()}


def cache_dir() -> Path:
    """Return the folder for files that can be regenerated: ``$XDG_CACHE_HOME/fastlora``.

    If ``XDG_CACHE_HOME`` is not set, the folder is ``~/.cache/fastlora``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastlora"


def api_key() -> str | None:
    """Return the key that clients of ``fastlora serve`` must send, or None if it is not set.

    The key may be an empty string.
    """
    return os.environ.get("FASTLORA_API_KEY")


def admin_key() -> str | None:
    """Return the key for changing the adapters of ``fastlora serve``, or None if it is not set."""
    return os.environ.get("FASTLORA_ADMIN_KEY")


def sets_allocator() -> bool:
    """Return whether the user has configured glibc's memory allocator."""
    names = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_")
    return any(name in os.environ for name in (*names, "MALLOC_TRIM_THRESHOLD_"))


def prepare_demo_process() -> None:
    """Set the variables that the demo needs before its imports: no network, no banners on stderr.

    The demo's model is on disk, so nothing needs to contact the Hugging Face Hub. Without the log
    level, Kineto (`torch.profiler`) would print two lines for each memory measurement.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def hide_library_progress_bars() -> None:
    """Hide the progress bars of other libraries. Call this before those libraries are imported.

    A variable that the user has set stays as it is.
    """
    for library in ("HF_HUB", "HF_DATASETS"):  # transformers follows the first
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def quiet_imports() -> None:
    """Silence warnings that dependencies of transformers and PEFT emit when they are imported.

    The commands call this before their imports. The user of a command did not ask for these
    libraries and cannot act on warnings about files that they are missing.
    """
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
