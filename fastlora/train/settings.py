"""Settings of a training run, which are read from a file and from flags and then validated.

Each setting is a field of `TrainSettings` or `AdapterSettings`. The field also defines the
setting's valid values and its command-line flag.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora.model.config import LoraConfig
from fastlora.model.recommend import Recommendation
from fastlora.routing.ids import check_adapter_name
from fastlora.train.data.formats import FORMATS, PACKINGS, DataOptions
from fastlora.train.setting_types import (
    DIR,
    FILE,
    FILES,
    LARGEST,
    LARGEST_EPOCHS,
    LARGEST_RATE,
    PAIRS,
    SWITCH,
    TEXTS,
    as_table,
    integer_from,
    number_up_to,
    one_of,
    select_and_validate_settings,
    setting_field,
)
from fastlora.train.settings_file import read_settings_file
from fastlora.validation import (
    AdapterStateError,
    ConfigError,
    error_prefix,
    near_names,
)

# Reserved names: folders beside the adapters in the output folder, and the base model's name in
# `fastlora serve` and `fastlora chat`.
RESERVED_NAMES = ("checkpoints", "trackers", "base")
# `fastlora serve` accepts these names. It also accepts dots, which no adapter of a model may have.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")

# Short names -> field names.
ALIASES = {
    "lr": "learning_rate",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "rslora": "use_rslora",
    "dora": "use_dora",
}
# The excluded fields are set by fastlora itself, or make no sense in a training run.
_LORA_FIELDS = {f.name for f in dataclasses.fields(LoraConfig)} - {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("runtime_config", "task_type"),
}


@dataclass(frozen=True)
class AdapterSettings:
    """The training settings of one adapter, such as its LoRA config, data, and learning rate.

    `fastlora.recommend` supplies the rank, alpha, dropout, targets, and learning rate that are not
    given. If the rank is given and alpha is not, alpha is twice the rank.

    Attributes:
        name: Name of the adapter and of its folder in the output folder: up to 128 letters, digits,
            ``_``, and ``-``. The first character is not ``-``.
        data: Training files, in the formats that `fastlora.train.data.read_samples` reads.
        eval_data: Evaluation files, in the same formats.
        format: Format of the data. It is only needed if the columns match several formats.
        columns: Dict that maps column names of the format to column names in the files.
        prompts: Prompts that the adapter answers at each evaluation.
        init_from: Folder of a PEFT adapter to continue training from.
        lora: Fields of `fastlora.LoraConfig`.
        learning_rate: Learning rate of AdamW after the warm-up.
        weight_decay: Weight decay of AdamW.
        schedule: Shape of the learning-rate schedule after the warm-up.
        warmup_ratio: Fraction of the adapter's steps in which the learning rate rises.
        max_grad_norm: Maximum norm of the adapter's gradient; 0 disables clipping.
    """

    name: str
    data: tuple[Path, ...] = setting_field(FILES)
    eval_data: tuple[Path, ...] = setting_field(FILES, default=())
    format: str | None = setting_field(
        one_of(*FORMATS), "format of the data, if its columns match several formats", None
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "setting_type": PAIRS,
            "help": "names of columns that differ from the standard ones, such as "
            "prompt=question,completion=answer",
        },
    )
    prompts: tuple[str, ...] = setting_field(TEXTS, default=())
    init_from: Path | None = setting_field(DIR, default=None)
    lora: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = setting_field(
        number_up_to(LARGEST_RATE), "peak learning rate of AdamW, after the warmup", None
    )
    weight_decay: float = setting_field(number_up_to(LARGEST), "weight decay of AdamW", 0.0)
    schedule: str = setting_field(
        one_of("linear", "cosine", "constant"),
        "decay of the learning rate; linear and cosine reach 0 after the adapter's last step",
        "linear",
    )
    warmup_ratio: float = setting_field(
        number_up_to(1.0), "fraction of the adapter's steps used for learning rate warmup", 0.03
    )
    max_grad_norm: float = setting_field(
        number_up_to(LARGEST),
        "clip each adapter's gradient norm to this value; 0 disables clipping",
        1.0,
    )

    def new_adapter_config(self, advice: Recommendation) -> LoraConfig:
        """Return the `LoraConfig` for a new adapter.

        Args:
            advice: Recommended values for the fields that are not given.

        Raises:
            ConfigError: A field is invalid.
        """
        with error_prefix(f"adapter {self.name!r}"):
            return advice.config(task_type="CAUSAL_LM", **self.lora)


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run.

    The help text of each flag describes the corresponding field. `seed` determines the initial
    factors of new adapters, the order of the data, and dropout. The factors are stored in fp32 or
    wider, whatever `dtype` is. With `completion_only_loss`, prompts do not contribute to the loss.
    With `deterministic`, a run on a CUDA GPU uses bitwise reproducible kernels where PyTorch has
    them and warns where it does not.
    """

    adapters: tuple[AdapterSettings, ...]
    model: Path = setting_field(DIR, "folder of the base model")
    out: Path = setting_field(DIR, "output folder for adapters, checkpoints, and the log")
    steps: int | None = setting_field(integer_from(1), "number of optimizer steps", None)
    epochs: float = setting_field(
        number_up_to(LARGEST_EPOCHS),
        "number of passes over the data, if --steps is not given; overrides steps in the file",
        1.0,
    )
    batch_size: int = setting_field(integer_from(1), "samples per step, over all processes", 8)
    micro_batch_size: int | None = setting_field(
        integer_from(1), "samples per forward (default: all samples of a process)", None
    )
    max_length: int = setting_field(
        integer_from(2), "maximum number of tokens per sample; longer samples are truncated", 512
    )
    seed: int = setting_field(integer_from(0), "random seed", 0)
    save_every: int = setting_field(
        integer_from(0), "steps between checkpoints; 0 saves only at the end", 100
    )
    keep: int = setting_field(integer_from(1), "number of checkpoints to keep", 2)
    eval_every: int = setting_field(
        integer_from(0), "steps between evaluations; 0 evaluates only at the end", 0
    )
    dtype: str = setting_field(
        one_of("auto", "float32", "bfloat16", "float16"),
        "dtype of the base model; auto uses the model's own dtype, or bfloat16 with --load-in",
        "auto",
    )
    load_in: str | None = setting_field(
        one_of("4bit", "8bit"),
        "quantize the base model with bitsandbytes (4bit: NF4, 8bit: LLM.int8)",
        None,
    )
    chat: bool = setting_field(SWITCH, "format prompt and completion as turns of a chat", False)
    chat_template: Path | None = setting_field(
        FILE, "file with a chat template that replaces the tokenizer's", None
    )
    completion_only_loss: bool = setting_field(SWITCH, default=True)
    assistant_only_loss: bool = setting_field(
        SWITCH, "compute the loss only on the assistant's turns in chats", False
    )
    packing: str | None = setting_field(
        one_of(*PACKINGS),
        "pack samples into rows of --max-length tokens: bfd fits whole samples, longest first; "
        "bfd_split also splits longer samples; wrapped joins all samples and cuts them into rows",
        None,
    )
    track: tuple[str, ...] = setting_field(
        TEXTS, "accelerate trackers to log to, such as tensorboard or wandb", ()
    )
    sample_tokens: int = setting_field(
        integer_from(1), "maximum number of tokens in an answer to --prompt", 64
    )
    gradient_checkpointing: bool = setting_field(
        SWITCH, "recompute activations in the backward pass to save memory", False
    )
    deterministic: bool = setting_field(SWITCH, default=True)
    cpu: bool = setting_field(SWITCH, "run on the CPU even if an accelerator is available", False)

    def data_options(self, adapter: AdapterSettings) -> DataOptions:
        """Return the data options of an adapter.

        The options specify how the adapter's data is read from files and prepared. The options
        combine the adapter's own settings with the settings of the run.
        """
        return DataOptions(
            format=adapter.format,
            columns=adapter.columns,
            chat=self.chat,
            completion_only_loss=self.completion_only_loss,
            assistant_only_loss=self.assistant_only_loss,
            packing=self.packing,
        )


_TOP = {f.name for f in dataclasses.fields(TrainSettings)} - {"adapters"}
_OF_ADAPTER = {f.name for f in dataclasses.fields(AdapterSettings)} - {"name", "lora"}


def read_settings(path: Path | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Read the settings of a run from a config file, and override them with command-line flags.

    The file contains fields of `TrainSettings` and a table ``adapters.NAME`` for each adapter, with
    fields of `AdapterSettings` and `fastlora.LoraConfig`. A table ``defaults`` sets the same fields
    for all adapters. Paths in the file are relative to the file's folder.

    Args:
        path: A ``.toml``, ``.json``, or ``.yaml`` file, or None to use flags alone.
        flags: Fields of `TrainSettings`; a table ``defaults``, which overrides every adapter's own
            table; and ``data`` and ``eval_data``, dicts that map adapter names to files.

    Raises:
        ConfigError: The file cannot be read, or a key or value is invalid.
        AdapterStateError: An adapter has ``inference_mode=True``, which would freeze it.
    """
    given = {} if path is None else read_settings_file(path)
    return settings_from_dict(given, flags, str(path) if path is not None else "the flags")


def settings_from_dict(
    given: Mapping[str, Any], flags: Mapping[str, Any], source: str
) -> TrainSettings:
    """Create the settings of a run from a dict.

    The dict has the structure of a config file.

    Args:
        given: Content of a config file.
        flags: See `read_settings`.
        source: Name of the dict in error messages.

    Raises:
        ConfigError, AdapterStateError: See `read_settings`.
    """
    with error_prefix(source):
        return _settings(dict(given), dict(flags))


def _settings(given: dict[str, Any], flags: dict[str, Any]) -> TrainSettings:
    found = as_table(given.pop("adapters", {}), "adapters")
    tables = {
        name: _expand_field_aliases(table, f"adapters.{name}") for name, table in found.items()
    }
    defaults = _expand_field_aliases(given.pop("defaults", {}), "defaults")
    forced = _expand_field_aliases(flags.pop("defaults", {}), "the flags")
    for key in ("data", "eval_data"):
        for name, files in flags.pop(key, {}).items():
            tables[name] = {**tables.get(name, {}), key: files}
    if "epochs" in flags and "steps" not in flags:
        given.pop("steps", None)  # it would take precedence over epochs
    top = given | flags
    for key in top:
        if key not in _TOP:
            hint = near_names(key, _TOP)
            if key in _OF_ADAPTER | _LORA_FIELDS | set(ALIASES):
                hint = "; it belongs in [defaults] or in an adapter's table"
            raise ConfigError(f"unknown key {key!r}{hint}")
    for name in ("model", "out"):
        if name not in top:
            raise ConfigError(f"{name!r} is missing; expected a folder")
    if not tables:
        raise ConfigError("no adapters were given; expected at least one table [adapters.NAME]")
    # An adapter loaded from `init_from` has its own config, so LoRA defaults do not apply.
    of_loaded = {key: value for key, value in defaults.items() if key not in _LORA_FIELDS}
    adapters = []
    for name, table in tables.items():
        start = defaults if table.get("init_from") is None else of_loaded
        adapters.append(_adapter_settings(name, start | table | forced))
    settings = TrainSettings(
        adapters=tuple(adapters), **select_and_validate_settings(TrainSettings, top, "")
    )
    if settings.steps is None and not settings.epochs:
        raise ConfigError(f"epochs must be greater than 0, got {settings.epochs}")
    micro = settings.micro_batch_size
    if micro is not None and micro > settings.batch_size:
        raise ConfigError(
            f"micro_batch_size must be at most batch_size ({settings.batch_size}), got {micro}"
        )
    return settings


def _adapter_settings(name: str, table: dict[str, Any]) -> AdapterSettings:
    where = f"adapters.{name}"
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"{where}: invalid adapter name {name!r}; use at most 128 letters, digits, _, and -, "
            f"do not begin with -, and do not use a reserved name ({', '.join(RESERVED_NAMES)})"
        )
    with error_prefix(where):
        check_adapter_name(name)
    known = _OF_ADAPTER | _LORA_FIELDS
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{near_names(key, known)}")
    lora = {key: value for key, value in table.items() if key in _LORA_FIELDS}
    if lora.pop("inference_mode", False):
        raise AdapterStateError(
            f"{where}: inference_mode = true freezes the adapter, so it cannot be trained; remove "
            "this key"
        )
    if table.get("init_from") is not None and lora:
        raise ConfigError(
            f"{where}: the adapter in init_from already has a config; remove "
            f"{', '.join(sorted(lora))}"
        )
    if "data" not in table:
        raise ConfigError(f"{where}: data is missing; expected a file or a list of files")
    return AdapterSettings(
        name=name, lora=lora, **select_and_validate_settings(AdapterSettings, table, f"{where}.")
    )


def _expand_field_aliases(table: Any, where: str) -> dict[str, Any]:
    """Replace field aliases in a table with the full field names.

    An alias is a short name such as ``lr``. The result is a new dict. Raises `ConfigError` if
    ``table`` is not a table or contains both a field and its alias.
    """
    result: dict[str, Any] = {}
    for key, value in as_table(table, where).items():
        name = ALIASES.get(key, key)
        if name in result:
            raise ConfigError(
                f"{where}: {name!r} is set twice, under its full name and under its alias; keep "
                "only one"
            )
        result[name] = value
    return result
