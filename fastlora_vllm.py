"""The entry point that vLLM loads to use fastlora as its LoRA backend.

It is a module of its own because ``import fastlora`` takes time, which ``FASTLORA_VLLM=0`` avoids.
"""

from __future__ import annotations

import os


def register() -> None:
    """Make fastlora the LoRA backend of vLLM in this process, unless ``FASTLORA_VLLM`` is 0."""
    if os.environ.get("FASTLORA_VLLM") == "0":
        return
    from fastlora.integrations.vllm.register import register as register_backend

    register_backend()
