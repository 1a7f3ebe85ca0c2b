"""What PEFT's configs answer beside their fields; where PEFT is imported, its own come behind."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastlora.model.adapter_files import read_config_file
from fastlora.model.config_checks import PEFT_VERSION
from fastlora.model.hub import push_to_hub

_T = TypeVar("_T", bound="ConfigMethods")


class ConfigMethods:
    """Methods of `LoraConfig` under PEFT's names.

    Attributes:
        modules_to_tie, target_modules_to_tie: What PEFT notes on a config that is given to it.
        _custom_modules: A module class to what makes its LoRA layer, in PEFT.
    """

    modules_to_tie: ClassVar[Any] = None
    target_modules_to_tie: ClassVar[Any] = None
    _custom_modules: Any = None

    def _version_of_peft(self) -> str:
        """Returns the version of PEFT where that is imported, else that of our fields."""
        theirs: Any = getattr(super(), "_get_peft_version", None)
        return PEFT_VERSION if theirs is None else theirs()

    @property
    def is_prompt_learning(self) -> bool:
        """Always False. PEFT's configs have it, and Hugging Face's Trainer reads it."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False, as `is_prompt_learning`."""
        return False

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """Returns the fields in an ``adapter_config.json``, unchecked, as the file has them.

        Raises:
            CheckpointError: The file is missing, too large, or not a JSON object.
        """
        data = read_config_file(Path(path_json_file))
        if data.pop("runtime_config", None) is not None:
            warnings.warn("ignoring runtime_config: it is never read from a file", stacklevel=2)
        return data

    @classmethod
    def from_peft_type(cls: type[_T], **fields: Any) -> _T:
        """Returns a config with these fields; PEFT's name for it."""
        return cls(**fields)

    @classmethod
    def check_kwargs(cls, **fields: Any) -> Mapping[str, Any]:
        """Returns the fields as they are; PEFT's name for a check that ours do when made."""
        return fields

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Uploads ``adapter_config.json``; see `fastlora.model.hub.push_to_hub`."""
        save: Any = self.save_pretrained  # type: ignore[attr-defined]  # LoraConfig has it
        return push_to_hub(save, repo_id, **options)
