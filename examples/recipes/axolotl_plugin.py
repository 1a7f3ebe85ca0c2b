"""A plugin of Axolotl that patches the model that PEFT made for it.

NOT RUN in Axolotl itself: tests/test_recipes.py calls the plugin as Axolotl's loader does, in its
order. Lay this file where Python finds it, and in the run's YAML say:

    plugins:
      - axolotl_plugin.FastLoraPlugin
    adapter: lora            # or qlora
    lora_target_linear: true
    lora_mlp_kernel: false   # Axolotl's own LoRA kernels replace the same forwards as ours
    lora_qkv_kernel: false
    lora_o_kernel: false

Liger's plugin of Axolotl may stand beside it: it patches classes before the model is made.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

import fastlora

_OWN_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class FastLoraPlugin(BasePlugin):
    """Patches LoRA layers once the adapters are on the model."""

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses two sets of kernels for the same layers, before a weight is read."""
        both = [name for name in _OWN_KERNELS if getattr(cfg, name, None)]
        if both:
            raise ValueError(f"{', '.join(both)}: set to false, fastlora computes these layers")

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Called with PEFT's model, after its adapters are loaded."""
        print(fastlora.patch(model))
