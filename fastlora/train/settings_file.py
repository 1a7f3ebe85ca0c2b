"""Read the settings of a training run from a TOML, JSON, or YAML file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastlora.validation import ConfigError

_KINDS = {".toml": "TOML", ".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}
# Floating-point numbers of YAML 1.2. PyYAML implements YAML 1.1, in which 2e-4 is a string.
_YAML_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a file with training settings into a dict.

    The format of the file is TOML, JSON, or YAML. Relative paths in the file are resolved against
    the file's folder.

    Raises:
        ConfigError: The file has an unsupported extension, cannot be read, or does not contain a
            table, or the library that reads it is not installed.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: expected a .toml, .json, or .yaml file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        data = json.loads(text) if kind == "JSON" else (_toml if kind == "TOML" else _yaml)(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid {kind} ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object, found {type(data).__name__}")
    return _resolve_paths(data, path.parent)


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ConfigError(
                "reading TOML needs Python 3.11 or `pip install tomli`; or use a .json file"
            ) from error
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            "reading YAML needs PyYAML: `pip install pyyaml`; or use a .toml or .json file"
        ) from error

    class UniqueKeyLoader(yaml.SafeLoader):
        """A YAML loader that rejects duplicate keys.

        Keys must be strings. Values are plain, as in `yaml.SafeLoader`.
        """

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for name in names:
                if not isinstance(name, str):
                    raise ValueError(f"the key {name!r} is not a string; put it in quotes")
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"the key {twice[0]!r} appears twice")
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    UniqueKeyLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float", _YAML_FLOAT, list("-+.0123456789")
    )
    try:
        return yaml.load(text, UniqueKeyLoader)  # UniqueKeyLoader is a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _resolve_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve the relative paths in a config file against the folder of the file.

    ``data`` is the dict that was read from the file, and ``folder`` is the folder of the file. The
    result is a copy of the dict with the resolved paths.
    """

    def path(value: Any) -> Any:
        if isinstance(value, list):
            return [path(entry) for entry in value]
        return str(folder / Path(value).expanduser()) if isinstance(value, str) else value

    def anchor(table: Any, *keys: str) -> Any:
        if not isinstance(table, dict):
            return table  # `read_settings` raises an error for it
        return {key: path(value) if key in keys else value for key, value in table.items()}

    of_adapter = ("data", "eval_data", "init_from")
    result: dict[str, Any] = anchor(data, "model", "out", "chat_template")
    if "defaults" in data:
        result["defaults"] = anchor(data["defaults"], *of_adapter)
    if isinstance(data.get("adapters"), dict):
        result["adapters"] = {n: anchor(t, *of_adapter) for n, t in data["adapters"].items()}
    return result
