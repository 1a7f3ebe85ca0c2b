"""Attributes and methods of `LoraModel` that exist for compatibility with PEFT's models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.model.config import LoraConfig
from fastlora.model.config_checks import PeftType
from fastlora.model.hub import push_to_hub, write_or_update_model_card

if TYPE_CHECKING:
    from fastlora.model.tuner import LoraTuner


class PeftModelMethods:
    """Mixin class that adds ``peft.PeftModel`` methods to `LoraModel`.

    Most of these methods use only the tuner and the configs. The class also provides attributes of
    ``peft.PeftModel``.

    Attributes:
        peft_type: The adapter method, always LoRA.
    """

    base_model: LoraTuner
    peft_type = PeftType.LORA
    _is_prompt_learning = False

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """A dict that maps adapter names to configs."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter.

        If several adapters are active, the value is the name of the first. If none is active, the
        value is an empty string.
        """
        return next(iter(self.active_adapters), "")

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the active adapter.

        If several adapters are active, it is the config of the first.
        """
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not disabled.

        All adapters of a model are disabled together. See `disable_adapter`.
        """
        return bool(self.active_adapters) and not self.base_model.disabled

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Make adapters trainable, or freeze them. See `LoraTuner.set_requires_grad`."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a model card (``README.md``) to a folder, or update the existing one.

        The metadata has the same keys as in PEFT: the library, the base model, and tags. If
        huggingface_hub is not installed, nothing is written.

        Args:
            output_dir: The folder.
        """
        model: Any = self.base_model.model
        config: Any = getattr(model, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else {}
        tags = ["lora", *(getattr(model, "model_tags", None) or ())]
        if any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
            tags.append("transformers")
        name = getattr(model, "name_or_path", None)
        if name is not None:
            tags.append(f"base_model:adapter:{name}")
        names = self.active_adapters or list(self.peft_config)
        task = self.peft_config[names[0]].task_type if names else None
        pipeline = "text-generation" if task == "CAUSAL_LM" else None
        write_or_update_model_card(Path(output_dir), config.get("_name_or_path"), tags, pipeline)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the model's adapters to a repository on the Hugging Face Hub.

        The files are those that `save_pretrained` writes. See `fastlora.model.hub.push_to_hub`.
        """
        save: Any = self.save_pretrained  # type: ignore[attr-defined]  # defined by LoraModel
        return push_to_hub(save, repo_id, **options)
