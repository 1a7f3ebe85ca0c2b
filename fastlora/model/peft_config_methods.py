"""Methods of `LoraConfig` that exist for compatibility with PEFT's configs.

After PEFT is imported, ``peft.LoraConfig`` is also a base class of `LoraConfig`. It comes after
`PeftConfigMethods` in the method resolution order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastlora.model.adapter_files import read_config_file
from fastlora.model.config_checks import PEFT_VERSION
from fastlora.model.hub import push_to_hub
from fastlora.user_warnings import warn

_T = TypeVar("_T", bound="PeftConfigMethods")


class PeftConfigMethods:
    """A mixin class that provides methods of PEFT's config classes.

    `LoraConfig` inherits these methods, so that it is compatible with PEFT.

    Attributes:
        modules_to_tie, target_modules_to_tie: Attributes that PEFT sets on a config that is passed
            to it.
        _custom_modules: A mapping from module classes to LoRA layer classes. The attribute's name
            is PEFT's.
    """

    modules_to_tie: ClassVar[Any] = None
    target_modules_to_tie: ClassVar[Any] = None
    _custom_modules: Any = None

    def _peft_version_to_save(self) -> str:
        """Return the PEFT version number to store in a config.

        This is the installed version if PEFT is imported, or else the version that fastlora
        follows.
        """
        theirs: Any = getattr(super(), "_get_peft_version", None)
        return PEFT_VERSION if theirs is None else theirs()

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the config is for a prompt-learning method.

        The value is always False, because LoRA is not such a method. The Trainer reads it.
        """
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the config is for PEFT's adaption-prompt method.

        The value is always False, because fastlora supports only LoRA.
        """
        return False

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """Return a dict of the fields in an ``adapter_config.json`` file.

        Values are not checked. ``runtime_config`` is dropped with a warning.

        Args:
            path_json_file: The file.
            **_: Accepted for compatibility with PEFT and ignored.

        Raises:
            CheckpointError: If the file is missing, too large, or not a JSON object.
        """
        data = read_config_file(Path(path_json_file))
        if data.pop("runtime_config", None) is not None:
            warn("ignoring runtime_config: it is never read from a file")
        return data

    @classmethod
    def from_peft_type(cls: type[_T], **fields: Any) -> _T:
        """Create a config of a given PEFT type.

        The keyword arguments are the fields of the config. As in PEFT, the field ``peft_type``
        specifies the type. The only PEFT type that fastlora supports is ``"LORA"``, so the result
        is always an instance of this class.

        Raises:
            ConfigError: If ``peft_type`` is another type, or if another field has an invalid value.
        """
        return cls(**fields)

    @classmethod
    def check_kwargs(cls, **fields: Any) -> Mapping[str, Any]:
        """Check the keyword arguments of a new config, and return them.

        As in PEFT, this is a hook that subclasses can override to check or correct the arguments.
        This class returns all arguments unchanged and checks none of them, because invalid
        arguments are rejected when the config is created.
        """
        return fields

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the config to a repository on the Hugging Face Hub.

        The file is ``adapter_config.json``. See `fastlora.model.hub.push_to_hub` for the options
        and the result.

        Raises:
            ImplementationError: If huggingface_hub is not installed.
        """
        save: Any = self.save_pretrained  # type: ignore[attr-defined]  # defined by LoraConfig
        return push_to_hub(save, repo_id, **options)
