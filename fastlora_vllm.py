"""The entry point that vLLM loads to use fastlora as its LoRA backend.

It is a module of its own because ``import fastlora`` takes time, which ``FASTLORA_VLLM=0`` avoids.
"""

from __future__ import annotations

import logging
import os


def register() -> None:
    """Make fastlora the LoRA backend of vLLM in this process, unless ``FASTLORA_VLLM`` is 0.

    No exception is raised, because vLLM does not catch it. A warning is logged instead.
    """
    if os.environ.get("FASTLORA_VLLM") == "0":
        return
    try:
        from fastlora.integrations.vllm.register import register as register_backend

        register_backend()
    except Exception:  # noqa: BLE001  vLLM runs without the plugin.
        message = "fastlora is not used for LoRA: it cannot be imported"
        logging.getLogger("vllm").warning(message, exc_info=True)
