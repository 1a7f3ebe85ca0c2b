"""Access to all environment variables that fastlora reads or sets.

There is one exception: the module ``fastlora_vllm`` reads ``FASTLORA_VLLM`` itself, so that it does
not have to import fastlora if the variable is 0.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

_SECRETS = ("FASTLORA_API_KEY", "FASTLORA_ADMIN_KEY")
_VARIABLES = (
    *("FASTLORA_BATCH_INVARIANT", "FASTLORA_PLAN", "FASTLORA_MEASURED", "FASTLORA_VLLM"),
    *("TRITON_INTERPRET", "XDG_CACHE_HOME", *_SECRETS),
)


def triton_interpreted() -> bool:
    """Return whether Triton kernels run in Triton's interpreter.

    ``TRITON_INTERPRET`` enables the interpreter. It runs Triton kernels on the CPU and is for tests
    only.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def batch_invariant() -> bool:
    """Return whether the environment enables batch-invariant mode.

    ``FASTLORA_BATCH_INVARIANT=1`` enables the mode from the start.
    """
    return os.environ.get("FASTLORA_BATCH_INVARIANT", "0").lower() in ("1", "true", "on", "yes")


def default_plan() -> str:
    """Return the default plan, as set by the environment variable ``FASTLORA_PLAN``.

    The result is the plan's name, which is ``"auto"`` if the variable is not set. A plan selects
    the kernels of a LoRA layer; see `fastlora.functional.lora_linear`. The default plan applies to
    calls that specify no plan.
    """
    return os.environ.get("FASTLORA_PLAN", "auto").lower() or "auto"


def measured_configs_folder() -> Path | None:
    """Return the folder of measured kernel configurations that an environment variable names.

    The environment variable is ``FASTLORA_MEASURED``. The result is None if the variable is empty
    or is not set. The folder contains tables of configurations that were chosen based on
    measurements, and is used instead of the default folder.
    """
    named = os.environ.get("FASTLORA_MEASURED")
    return Path(named) if named else None


def vllm_plugin_enabled(device_type: str) -> bool:
    """Return whether the environment enables fastlora's vLLM plugin on a type of device.

    ``FASTLORA_VLLM=0`` disables the plugin, and ``FASTLORA_VLLM=1`` enables it. If the variable is
    not set, the plugin is enabled only on CPUs, because its performance on GPUs has not been
    measured.
    """
    if vllm_plugin_disabled():
        return False
    return device_type == "cpu" or os.environ.get("FASTLORA_VLLM") == "1"


def vllm_plugin_disabled() -> bool:
    """Return whether an environment variable disables fastlora's vLLM plugin.

    The plugin is disabled if the variable ``FASTLORA_VLLM`` is set to 0. vLLM then uses its own
    LoRA backend.
    """
    return os.environ.get("FASTLORA_VLLM") == "0"


def variables_in_use() -> dict[str, str]:
    """Return the values of the environment variables that fastlora reads.

    The result is a dict that maps names to values. Variables that are not set are left out. The
    value of a secret is replaced by ``"(set)"``.
    """
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {name: "(set)" if name in _SECRETS else value for name, value in found.items()}


def cache_dir() -> Path:
    """Return the path of fastlora's cache folder.

    The path is ``$XDG_CACHE_HOME/fastlora``, or ``~/.cache/fastlora`` if ``XDG_CACHE_HOME`` is not
    set. The folder contains only files that can be regenerated.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastlora"


def server_api_key() -> str | None:
    """Return the server's API key.

    Clients of ``fastlora serve`` must send this key. It is set by ``FASTLORA_API_KEY``. The result
    is None if the variable is not set.
    """
    # An empty key is returned too. `resolve_key` raises an error for it.
    return os.environ.get("FASTLORA_API_KEY")


def server_admin_key() -> str | None:
    """Return the server's admin key.

    Clients of ``fastlora serve`` must send this key to change the server's adapters. It is set by
    ``FASTLORA_ADMIN_KEY``. The result is None if the variable is not set.
    """
    return os.environ.get("FASTLORA_ADMIN_KEY")


def user_configured_malloc() -> bool:
    """Return whether the user has configured malloc through environment variables.

    The function checks variables of glibc's malloc. The result is True if ``GLIBC_TUNABLES``,
    ``MALLOC_ARENA_MAX``, ``MALLOC_MMAP_THRESHOLD_``, or ``MALLOC_TRIM_THRESHOLD_`` is set.
    """
    names = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_")
    return any(name in os.environ for name in (*names, "MALLOC_TRIM_THRESHOLD_"))


def set_offline_demo_variables() -> None:
    """Set the environment variables that let the demo run without network access.

    They also suppress log output. Call this function before the demo imports other libraries. The
    demo's model is on disk, so it does not need the Hugging Face Hub. Without the log level, Kineto
    (`torch.profiler`) would print two lines for each memory measurement.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def hide_hugging_face_progress_bars() -> None:
    """Disable the progress bars of the Hugging Face libraries.

    These are huggingface_hub, transformers, and datasets. Call this function before they are
    imported. Variables that are already set are not changed.
    """
    for library in ("HF_HUB", "HF_DATASETS"):  # transformers uses the first
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def silence_import_warnings() -> None:
    """Silence the warnings that libraries log when they are imported.

    The libraries are dependencies of transformers and PEFT. Commands call this function before they
    import them. The warnings are about missing files of libraries that the user of a command has
    not chosen.
    """
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
