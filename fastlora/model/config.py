"""`LoraConfig`: PEFT's field names, defaults and file format, checked when it is made.

A field that fastlora leaves to PEFT is accepted at its default and refused otherwise,
in one error, so that a config never silently does less than it says.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastlora.init import Init, Settings, all_inits, find_init
from fastlora.init.configs import CordaConfig, EvaConfig, LoraGAConfig, settings_of
from fastlora.model.adapter_files import CONFIG_NAME, MAX_CONFIG_BYTES, edited_config, read_config
from fastlora.model.config_checks import PeftType, TaskType, checked_fields
from fastlora.model.config_methods import ConfigMethods
from fastlora.model.replace_files import locked, replacing
from fastlora.patterns import first_at_end
from fastlora.validation import THE_PEFT_WAY, ConfigError, error_prefix

# Field -> value that means "unset"; None stands for PEFT's default of None.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "megatron_config": (None, {}),
    "megatron_core": ("megatron.core", None),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "qalora_group_size": (16,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
}
# Without effect on an adapter whose weights exist: they belong to what another field switches on.
_IDLE_AFTER_INIT = ("megatron_core", "qalora_group_size")

# "new": the adapter is about to be initialised. "load": its weights come from a file.
# "live": it already sits in a model, so whatever its initialisation did to the base is done.
Stage = Literal["new", "load", "live"]
_T = TypeVar("_T", bound="LoraConfig")


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, never saved.

    Args:
        ephemeral_gpu_offload: Accepted for PEFT's sake. PEFT uses it for DoRA's norm only.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(ConfigMethods):
    """What an adapter adapts, and how. Fields and defaults are those of PEFT 0.21.2.

    Raises:
        ConfigError: A value is wrong, two values contradict each other, or a field is set that
            fastlora does not have. The message names field, value and what to do.

    Args:
        task_type: "CAUSAL_LM", "SEQ_CLS", ... as in PEFT, or None.
        peft_type: Always ``"LORA"``, as a `PeftType`.
        peft_version: The version of PEFT that wrote the config, or writes files like ours.
        inference_mode: True freezes the adapter.
        r: Rank, at least 1.
        target_modules: Names (equal to a module's name or to its end after a dot), a regular
            expression for whole names, ``"all-linear"``, or None for the architecture's default.
        exclude_modules: Names or a regular expression, matched alike, taken away from the targets.
        lora_alpha: The scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA.
        lora_dropout: Probability in [0, 1), applied to the input of the LoRA branch only.
        fan_in_fan_out: The base weight is stored ``[in, out]``.
        bias: Which biases of the base model train and are saved.
        use_rslora: See ``lora_alpha``.
        modules_to_save: Modules of which the adapter owns a full trained copy.
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal, B zero), False (both
            random, so the new adapter changes the output), "orthogonal", or a method that looks at
            the base weight ("pissa", "pissa_niter_4", "olora", "mica", "loftq") or at data
            ("corda", "eva", "lora_ga"); see ``docs/initialisation.md``.
        layers_to_transform: Only these layer indices; needs named ``target_modules``.
        layers_pattern: Name of the list that those indices count in.
        rank_pattern: Regular expression for the end of a module's name -> rank; first match wins.
        alpha_pattern: The same for ``lora_alpha``.
        loftq_config: Settings of "loftq"; kept as a dict.
        eva_config: Settings of "eva".
        corda_config: Settings of "corda".
        lora_ga_config: Settings of "lora_ga".
        use_dora: Gives each output a trained magnitude (DoRA, https://arxiv.org/abs/2402.09353).
        layer_replication: Ranges ``(first, behind the last)`` of the model's layers that make up a
            deeper model; copies of a layer share its weights and have adapters of their own.
        trainable_token_indices: Rows of the input embedding that train, or module name -> rows.
        ensure_weight_tying: Where the model ties its embeddings, what is tied to an adapted input
            embedding has the embedding's adapter.
        lora_bias: Gives B a bias, which is scaled with the rest of the branch; not with DoRA.
        runtime_config: Never saved.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = PeftType.LORA
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self._finish("new")

    def _finish(self, stage: Stage) -> None:
        for name, value in checked_fields(vars(self)).items():
            setattr(self, name, value)
        if self.peft_version is None and stage != "load":
            self.peft_version = self._version_of_peft()
        self.check_supported(stage)
        chosen = self.init
        for init in all_inits():
            if init.settings is not None:
                self._read_settings(init, init.settings, init is chosen, stage)
        if stage == "new" and chosen.converts:
            self._warn_of_conversion()

    def _read_settings(self, init: Init, where: Settings, chosen: bool, stage: Stage) -> None:
        """Brings the settings of an initialisation into one form; warns where they are idle."""
        made = settings_of(getattr(self, where.field) or None, where.cls)
        if made is None and chosen and where.missing == "refuse" and stage == "new":
            raise ConfigError(
                f"`{where.field}` must be specified when `init_lora_weights` is {init.name!r}."
            )
        if made is None and chosen and where.missing == "default":
            if stage == "new":
                warnings.warn(
                    f"`init_lora_weights` is {init.name!r} but `{where.field}` is not specified. "
                    f"Using default {init.title} config.",
                    stacklevel=6,
                )
            made = where.cls()
        if made is not None and not chosen and stage == "new":
            warnings.warn(
                f"`{where.field}` specified but will be ignored when `init_lora_weights` is not "
                f"{init.name!r}.",
                stacklevel=6,
            )
        if where.as_dict:
            made = {} if made is None or not chosen else dataclasses.asdict(made)
        setattr(self, where.field, made)

    def _warn_of_conversion(self) -> None:
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training "
                f"conversion of the base weights that {self.init.title} changes: save_pretrained() "
                "will refuse path_initial_model_for_weight_conversion; leave use_rslora or the "
                "patterns at their defaults if you mean to convert the adapter",
                stacklevel=5,
            )

    def check_supported(self, stage: Stage = "new") -> None:
        """Raises `ConfigError`, naming every field that fastlora does not have.

        Args:
            stage: ``"new"`` for an adapter about to be initialised, ``"load"`` for one whose
                weights come from a file, ``"live"`` for one that already sits in a model.
        """
        idle = _IDLE_AFTER_INIT if stage != "new" else ()
        unset = {
            name: getattr(self, name)
            for name, defaults in _NOT_IMPLEMENTED.items()
            if name not in idle and getattr(self, name) not in defaults
        }
        if unset:
            names = ", ".join(f"{name}={value!r}" for name, value in unset.items())
            raise ConfigError(f"fastlora does not have {names}; {THE_PEFT_WAY}")

    def check_plain(self, what: str) -> None:
        """Raises `ConfigError` where the adapter means something only on a base weight of its own.

        Args:
            what: What cannot take such an adapter.
        """
        if not self.init.changes_base:
            return
        if not self.init.must_repeat:
            warnings.warn(
                f"init_lora_weights={self.init_lora_weights!r} changed the base weights in "
                f"training; {what} adds the adapter to the base weights as they are now, as PEFT "
                "does",
                stacklevel=3,
            )
        else:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r}: this adapter was trained on base "
                f"weights that its initialisation had changed, which {what} does not repeat; save "
                "it as plain LoRA first, with save_pretrained(..., "
                "path_initial_model_for_weight_conversion=<folder of the untrained adapter>)"
            )

    @property
    def init(self) -> Init:
        """The initialisation that ``init_lora_weights`` names."""
        return find_init(self.init_lora_weights)

    @property
    def init_config(self) -> object | None:
        """Settings of that initialisation, or None where it has none."""
        where = self.init.settings
        return None if where is None else settings_of(getattr(self, where.field) or None, where.cls)

    def shapes_only(self) -> LoraConfig:
        """Returns a loaded adapter's config as that of a new one with the same shapes.

        Raises:
            ConfigError: Such an adapter cannot be loaded.
        """
        self.check_supported("load")
        default = LoraConfig()
        fields = (init.settings.field for init in all_inits() if init.settings is not None)
        idle = {name: getattr(default, name) for name in (*_IDLE_AFTER_INIT, *fields)}
        return dataclasses.replace(self, init_lora_weights=True, **idle)

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Names classes of yours as LoRA layers of modules; the name and what it does are PEFT's.

        The config is not saved with it: to load such an adapter, register again and pass
        ``config=``.

        Args:
            mapping: Class of a module to a subclass of `fastlora.layers.LoraLayer`, which is made
                with the module as its only argument.
        """
        self._custom_modules = {**self.custom_modules, **mapping}

    @property
    def custom_modules(self) -> dict[type, type]:
        """What `_register_custom_module` named; the first class that a module is of counts."""
        named: dict[type, type] | None = self.__dict__.get("_custom_modules")
        return named or {}

    def rank_for(self, name: str) -> int:
        """Returns the rank of the module called ``name``."""
        patterns = self.rank_pattern
        key = first_at_end("rank_pattern", patterns, name) if patterns else None
        return self.r if key is None else patterns[key]

    def alpha_for(self, name: str) -> int | float:
        """Returns ``lora_alpha`` of the module called ``name``."""
        patterns = self.alpha_pattern
        key = first_at_end("alpha_pattern", patterns, name) if patterns else None
        return self.lora_alpha if key is None else patterns[key]

    def scaling_for(self, name: str) -> float:
        """Returns the factor on the LoRA branch of the module called ``name``."""
        rank = self.rank_for(name)
        return self.alpha_for(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, ready for JSON: sets as sorted lists, no ``runtime_config``."""
        data = dataclasses.asdict(self)
        del data["runtime_config"]
        return {key: sorted(v) if isinstance(v, set) else v for key, v in data.items()}

    @classmethod
    def from_dict(cls: type[_T], data: Mapping[str, Any], *, for_loading: bool = False) -> _T:
        """Returns a config from the fields of an ``adapter_config.json``.

        Keys that no field has (a newer PEFT's) are dropped with one warning, as PEFT does.

        Args:
            data: Field -> value.
            for_loading: The weights come from a file: how they were initialised matters only if
                that changed the base weights, which raises `ConfigError`. The value is kept.
        """
        if for_loading and data.get("peft_type", "LORA") is None:
            raise ConfigError("peft_type is None, expected 'LORA'")
        return cls._build(data, "load" if for_loading else "new")

    @classmethod
    def from_peft(cls: type[_T], peft_config: Any, *, initialised: bool = False) -> _T:
        """Returns the config that says what a ``peft.LoraConfig`` says.

        Args:
            peft_config: PEFT's config object.
            initialised: Its adapter sits in a model already, so how it was initialised is of no
                interest.
        """
        if not callable(getattr(peft_config, "to_dict", None)):
            raise ConfigError(f"expected a LoraConfig, got {peft_config!r}")
        kind = getattr(peft_config, "peft_type", None)
        if kind is not None and kind != PeftType.LORA:
            kind = getattr(kind, "value", kind)
            raise ConfigError(f"peft_type is {kind!r}, expected 'LORA'; {THE_PEFT_WAY}")
        data = dict(peft_config.to_dict())
        config = cls._build(data, "live" if initialised else "new")
        runtime = getattr(peft_config, "runtime_config", None)
        offload = bool(getattr(runtime, "ephemeral_gpu_offload", False))
        config._register_custom_module(getattr(peft_config, "_custom_modules", None) or {})
        config.runtime_config = LoraRuntimeConfig(ephemeral_gpu_offload=offload)
        return config

    @classmethod
    def _build(cls: type[_T], data: Mapping[str, Any], stage: Stage) -> _T:
        config = object.__new__(cls)  # __init__ would check for a new adapter
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name, f in fields.items():
            if name in data and name != "runtime_config":
                value = data[name]
            elif f.default_factory is not dataclasses.MISSING:
                value = f.default_factory()
            else:
                value = f.default
            setattr(config, name, value)
        config._finish(stage)
        unknown = sorted(set(data) - set(fields))
        if unknown:
            warnings.warn(
                f"ignoring the config keys {unknown}: LoraConfig has no such fields; "
                "the file is probably from a newer PEFT",
                stacklevel=3,
            )
        if "runtime_config" in data:
            warnings.warn("ignoring runtime_config: it is never read from a file", stacklevel=3)
        return config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        auto_mapping: dict[str, Any] | None = None,
        auto_mapping_dict: dict[str, Any] | None = None,
    ) -> None:
        """Writes ``adapter_config.json`` into a folder, which is made if need be.

        Args:
            save_directory: The folder.
            auto_mapping: Class and library of a base model without a task type, as PEFT records it.
            auto_mapping_dict: The same, as PEFT's models pass it.
        """
        auto_mapping = auto_mapping if auto_mapping is not None else auto_mapping_dict
        text = self.to_json(auto_mapping=auto_mapping)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), replacing(folder / CONFIG_NAME) as partial:
            partial.write_bytes(edited_config(folder, text.encode("utf-8")))

    def to_json(self, **overrides: Any) -> str:
        """Returns the text of ``adapter_config.json``; an override of None is ignored.

        Raises `ConfigError` if the text is longer than a reader accepts.
        """
        data = self.to_dict() | {key: v for key, v in overrides.items() if v is not None}
        # Only the fields are sorted. PEFT sorts the patterns too, which can change the first match.
        text = json.dumps({key: data[key] for key in sorted(data)}, indent=2)
        if len(text) > MAX_CONFIG_BYTES:  # ASCII
            raise ConfigError(
                f"{CONFIG_NAME} would have {len(text)} bytes, expected at most {MAX_CONFIG_BYTES}"
            )
        return text

    @classmethod
    def from_pretrained(
        cls: type[_T], folder: str | os.PathLike[str], *, for_loading: bool = False
    ) -> _T:
        """Returns the config of a local folder, from ``adapter_config.json``; see `from_dict`.

        It is the config that belongs to the folder's weights: if a save was cut off after it had
        replaced the weights and before it replaced ``adapter_config.json``, the config comes from
        the weights' metadata. `from_json_file` returns the fields of the file itself.

        Raises:
            CheckpointError: The file is missing or is not a JSON object.
            ConfigError: A value in it is refused.
        """
        data = read_config(Path(folder))
        with error_prefix(Path(folder) / CONFIG_NAME):
            return cls.from_dict(data, for_loading=for_loading)
