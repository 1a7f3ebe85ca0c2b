"""What a training run is told: from a file and from flags, checked before any work."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora.model.config import LoraConfig
from fastlora.model.recommend import Recommendation
from fastlora.routing.ids import check_adapter_name
from fastlora.train.config_file import read_settings_file
from fastlora.train.data.formats import COLUMNS, FORMATS, PACKINGS, Reading
from fastlora.validation import AdapterStateError, ConfigError, error_prefix, near_names

DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")
# Bits of a base model's weights.
LOAD_IN = ("4bit", "8bit")
# What parameters are multiplied with is a float32 to PyTorch.
_LARGEST = 3.4e38
# AdamW's first step divides the rate by 1 - 0.9.
_LARGEST_RATE = 3.4e37
# What the folders beside the adapters are called, in a run's folder.
RESERVED_NAMES = ("checkpoints", "trackers")

# Short names that people use -> fields.
_ALIASES = {
    "lr": "learning_rate",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "rslora": "use_rslora",
    "dora": "use_dora",
}
# They are this program's business, or would make an adapter that does not train.
_LORA_FIELDS = {f.name for f in dataclasses.fields(LoraConfig)} - {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("runtime_config", "task_type"),
}


@dataclass(frozen=True)
class AdapterSettings:
    """How one adapter trains, and on what.

    Attributes:
        name: Letters, digits, ``_`` and ``-``; its folder in the run's folder.
        data: Its files, as `fastlora.train.data.read_samples` takes them: JSON lines, JSON, CSV,
            TSV, Parquet, folders of `datasets`, or plain text.
        eval_data: Files of the same kinds to measure the loss on.
        format: The format of both, a name in `fastlora.train.data.formats.FORMATS`; None to find
            it from the files' columns.
        columns: Our name of a column -> the files' name of it.
        prompts: What to show an answer to at evaluations.
        init_from: A PEFT adapter folder to go on from; None for a new adapter.
        lora: Fields of `fastlora.LoraConfig`; r, alpha, dropout and targets that are not given are
            `fastlora.recommend`'s.
        learning_rate: Of AdamW, after the warm-up; None for `fastlora.recommend`'s.
        weight_decay: Of AdamW.
        schedule: How the learning rate falls after the warm-up: ``"linear"`` or ``"cosine"`` to 0
            at the adapter's last step, or ``"constant"``.
        warmup_ratio: Share of the adapter's own steps in which the rate rises from 0.
        max_grad_norm: The adapter's own gradient is clipped to it; 0 for no clipping.
    """

    name: str
    data: tuple[Path, ...]
    eval_data: tuple[Path, ...] = ()
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    init_from: Path | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0

    def lora_config(self, advice: Recommendation) -> LoraConfig:
        """Returns the config of the new adapter; raises `ConfigError` where a field is wrong."""
        given = dict(self.lora)
        if "r" in given and "lora_alpha" not in given:
            given["lora_alpha"] = 2 * given["r"]  # the advice's ratio
        with error_prefix(f"adapter {self.name!r}"):
            return advice.config(task_type="CAUSAL_LM", **given)


@dataclass(frozen=True)
class TrainSettings:
    """A whole run.

    Attributes:
        model: Folder of the base model.
        out: Folder for adapters, checkpoints and the log.
        adapters: At least one.
        steps: Optimizer steps; None to go by ``epochs``.
        epochs: Passes over all data together.
        batch_size: Samples in a step, over all processes.
        micro_batch_size: Samples in a forward; None for a step's share of one process.
        max_length: Tokens that a sample is cut to.
        dtype: Of the base model; ``"auto"`` for its own, or bf16 with ``load_in``. Factors are fp32
            at least.
        load_in: Quantise the base model while it is read: ``"4bit"`` (NF4, nested) or ``"8bit"``
            (LLM.int8), by bitsandbytes; None for not.
        seed: Of the new adapters' factors, the order of the data, and dropout.
        save_every: Steps between checkpoints; 0 for one at the end only.
        keep: How many checkpoints stay.
        eval_every: Steps between evaluations; 0 for one at the end only.
        chat: Make prompt and completion two turns of a chat, in the tokenizer's chat template.
        chat_template: A file with a chat template in place of the tokenizer's.
        completion_only_loss: Whether prompts have no loss.
        assistant_only_loss: Whether only what the assistant says has a loss.
        packing: How samples are packed into rows of ``max_length`` tokens, a name in
            `fastlora.train.data.formats.PACKINGS`; None for a sample a row.
        sample_tokens: The most tokens of an answer to a prompt at evaluations.
        track: Trackers of accelerate to report to, by name.
        gradient_checkpointing: Trade time for memory.
        deterministic: On a GPU, choose only kernels that repeat bit for bit.
        cpu: Don't use an accelerator.
    """

    model: Path
    out: Path
    adapters: tuple[AdapterSettings, ...]
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    micro_batch_size: int | None = None
    max_length: int = 512
    dtype: str = "auto"
    load_in: str | None = None
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    eval_every: int = 0
    chat: bool = False
    chat_template: Path | None = None
    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    packing: str | None = None
    sample_tokens: int = 64
    track: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    deterministic: bool = True
    cpu: bool = False

    def reading(self, adapter: AdapterSettings) -> Reading:
        """Returns how an adapter's files are read."""
        return Reading(
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
    """Returns the settings in a file, with flags over them.

    A file has the fields of `TrainSettings`, a table ``adapters.NAME`` for each adapter with the
    fields of `AdapterSettings` and of `fastlora.LoraConfig`, and a table ``defaults`` of the same
    for all adapters. Its paths are relative to its folder.

    Args:
        path: A ``.toml``, ``.json`` or ``.yaml`` file; None for flags alone.
        flags: Fields of `TrainSettings`; ``defaults``, over every adapter's own; and ``data`` and
            ``eval_data``, dicts of adapter name to files.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong.
        AdapterStateError: An adapter is frozen.
    """
    given = {} if path is None else read_settings_file(path)
    return parse_settings(given, flags, str(path) if path is not None else "the flags")


def parse_settings(
    given: Mapping[str, Any], flags: Mapping[str, Any], source: str
) -> TrainSettings:
    """`read_settings` of a dict, which ``source`` names in messages."""
    with error_prefix(source):
        return _settings(dict(given), dict(flags))


def _settings(given: dict[str, Any], flags: dict[str, Any]) -> TrainSettings:
    found = _table(given.pop("adapters", {}), "adapters")
    tables = {name: _renamed(table, f"adapters.{name}") for name, table in found.items()}
    defaults = _renamed(given.pop("defaults", {}), "defaults")
    forced = _renamed(flags.pop("defaults", {}), "the flags")
    for key in ("data", "eval_data"):
        for name, files in flags.pop(key, {}).items():
            tables[name] = {**tables.get(name, {}), key: files}
    top = given | flags
    for key in top:
        if key not in _TOP:
            hint = near_names(key, _TOP)
            if key in _OF_ADAPTER | _LORA_FIELDS | set(_ALIASES):
                hint = "; it belongs in [defaults] or in an adapter's table"
            raise ConfigError(f"unknown key {key!r}{hint}")
    for name in ("model", "out"):
        if name not in top:
            raise ConfigError(f"no {name!r} is given; expected a folder")
    if not tables:
        raise ConfigError("no adapter is given; expected a table [adapters.NAME]")
    # An adapter of `init_from` comes with its own config.
    of_loaded = {key: value for key, value in defaults.items() if key not in _LORA_FIELDS}
    adapters = []
    for name, table in tables.items():
        start = defaults if table.get("init_from") is None else of_loaded
        adapters.append(_adapter_settings(name, start | table | forced))
    return _run_settings(top, tuple(adapters))


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a table, got {value!r}")
    return dict(value)


def _renamed(table: Any, where: str) -> dict[str, Any]:
    """Returns a table with its short names replaced."""
    result: dict[str, Any] = {}
    for key, value in _table(table, where).items():
        name = _ALIASES.get(key, key)
        if name in result:
            raise ConfigError(f"{where} has {key!r} beside another name of it, {name!r}")
        result[name] = value
    return result


def _adapter_settings(name: str, table: dict[str, Any]) -> AdapterSettings:
    where = f"adapters.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"{where}: an adapter cannot be called {name!r}; expected letters, digits, _ and -"
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
            f"{where}: inference_mode = true freezes the adapter, and it is asked to train; leave "
            "it out"
        )
    own: dict[str, Any] = {key: value for key, value in table.items() if key in _OF_ADAPTER}
    if own.get("init_from") is not None:
        if lora:
            raise ConfigError(
                f"{where}: init_from takes everything from that adapter's own config; leave out "
                f"{', '.join(sorted(lora))}"
            )
        own["init_from"] = _path(own["init_from"], f"{where}.init_from")
    if "data" not in own:
        raise ConfigError(f"{where}: no data is given; expected a file or a list of files")
    for key in ("data", "eval_data"):
        if key in own:
            files = own[key] if isinstance(own[key], (list, tuple)) else [own[key]]
            if not files:
                raise ConfigError(f"{where}.{key} is empty, expected a file or a list of files")
            own[key] = tuple(_path(file, f"{where}.{key}") for file in files)
    for key, high in (
        ("learning_rate", _LARGEST_RATE),
        ("weight_decay", _LARGEST),
        ("warmup_ratio", 1.0),
        ("max_grad_norm", _LARGEST),
    ):
        if own.get(key) is not None:
            own[key] = _number(own[key], f"{where}.{key}", high)
    _check_choice(own.get("schedule", SCHEDULES[0]), f"{where}.schedule", SCHEDULES)
    if own.get("format") is not None:
        _check_choice(own["format"], f"{where}.format", tuple(FORMATS))
    own["columns"] = _columns(own.get("columns", {}), f"{where}.columns")
    own["prompts"] = _texts(own.get("prompts", ()), f"{where}.prompts")
    return AdapterSettings(name=name, lora=lora, **own)


def _run_settings(top: dict[str, Any], adapters: tuple[AdapterSettings, ...]) -> TrainSettings:
    own = dict(top)
    for key, low in (
        *(("steps", 1), ("batch_size", 1), ("micro_batch_size", 1), ("max_length", 2)),
        *(("seed", 0), ("save_every", 0), ("keep", 1), ("eval_every", 0), ("sample_tokens", 1)),
    ):
        value = own.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{key} must be a whole number, got {value!r}")
        if value is not None and value < low:
            raise ConfigError(f"{key} must be at least {low}, got {value}")
    if "epochs" in own:
        own["epochs"] = _number(own["epochs"], "epochs", math.inf)
    for key in (
        *("chat", "completion_only_loss", "assistant_only_loss"),
        *("gradient_checkpointing", "deterministic", "cpu"),
    ):
        if not isinstance(own.get(key, False), bool):
            raise ConfigError(f"{key} must be true or false, got {own[key]!r}")
    _check_choice(own.get("dtype", "auto"), "dtype", DTYPES)
    if own.get("load_in") is not None:
        _check_choice(own["load_in"], "load_in", LOAD_IN)
    if own.get("packing") is not None:
        _check_choice(own["packing"], "packing", PACKINGS)
    own["track"] = _texts(own.get("track", ()), "track")
    for key in ("model", "out", "chat_template"):
        if own.get(key) is not None:
            own[key] = _path(own[key], key)
    settings = TrainSettings(adapters=adapters, **own)
    if settings.steps is None and not settings.epochs:
        raise ConfigError(f"epochs must be more than 0, got {settings.epochs}")
    micro = settings.micro_batch_size
    if micro is not None and micro > settings.batch_size:
        raise ConfigError(
            f"micro_batch_size must be at most batch_size {settings.batch_size}, got {micro}"
        )
    return settings


def _path(value: Any, where: str) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ConfigError(f"{where} must be a path, got {value!r}")
    return Path(value).expanduser()


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(t and isinstance(t, str) for t in texts):
        raise ConfigError(f"{where} must be a text or a list of texts, got {value!r}")
    return tuple(texts)


def _columns(value: Any, where: str) -> dict[str, str]:
    table = _table(value, where)
    for ours, theirs in table.items():
        if ours not in COLUMNS:
            raise ConfigError(
                f"{where}: no format has a column {ours!r}{near_names(ours, COLUMNS)}; expected "
                f"names among {', '.join(COLUMNS)}, each with the files' name of it"
            )
        if not isinstance(theirs, str) or not theirs:
            raise ConfigError(f"{where}.{ours} must be the name of a column, got {theirs!r}")
    return table


def _number(value: Any, where: str, high: float) -> float:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not 0.0 <= value <= high:
        large = real and value > high
        ends = f"from 0 to {high:g}" if high < _LARGEST_RATE or large else "at least 0"
        raise ConfigError(f"{where} must be a number {ends}, got {value!r}")
    return float(value)


def _check_choice(value: Any, where: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
