"""What `LoraModel` answers under PEFT's names, beside its own calls and files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.model.config import LoraConfig
from fastlora.model.config_checks import PeftType
from fastlora.model.hub import push_to_hub, write_card

if TYPE_CHECKING:
    from fastlora.model.tuner import LoraTuner


class PeftNames:
    """Attributes and methods of `peft.PeftModel` that need only the tuner and the configs.

    Attributes:
        peft_type: PEFT's name for the method.
    """

    base_model: LoraTuner
    peft_type = PeftType.LORA
    _is_prompt_learning = False

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name to config."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """Name of the first adapter that acts."""
        return next(iter(self.active_adapters), "")

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts on some layer."""
        return bool(self.active_adapters) and not self.base_model.disabled

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """See `LoraTuner.set_requires_grad`."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Writes ``README.md`` into a folder, or adds to the one there.

        It has PEFT's keys: the library, the base model, tags. Where huggingface_hub is not
        installed nothing is written.
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
        pipeline = "text-generation" if self.active_peft_config.task_type == "CAUSAL_LM" else None
        write_card(Path(output_dir), config.get("_name_or_path"), tags, pipeline)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Uploads what `save_pretrained` writes; see `fastlora.model.hub.push_to_hub`."""
        save: Any = self.save_pretrained  # type: ignore[attr-defined]  # LoraModel has it
        return push_to_hub(save, repo_id, **options)
