"""Read the settings of a training run from a TOML, JSON, or YAML file."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from fastlora.validation import ConfigError

_KINDS = {".toml": "TOML", ".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}
# Floating-point numbers of YAML 1.2. PyYAML implements YAML 1.1, in which 2e-4 is a string.
_YAML_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
# Integers of YAML 1.2. In YAML 1.1, 010 is 8.
_YAML_INTEGER = re.compile(r"[-+]?[0-9]+\Z")
_YAML_MERGE = "tag:yaml.org,2002:merge"  # the tag of the key <<, which YAML 1.2 no longer has


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a training settings file into a dict.

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
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the file ({error})") from error
    try:
        data = {"JSON": _json, "TOML": _toml, "YAML": _yaml}[kind](text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid {kind} ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object, found {type(data).__name__}")
    return _resolve_paths(data, path.parent)


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_no_key_twice([name for name, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _check_no_key_twice(keys_in_table: list[str]) -> None:
    """Raise `ValueError` if a key appears twice.

    ``keys_in_table`` contains the keys of one table in a settings file.
    """
    twice = [name for name, count in Counter(keys_in_table).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} appears twice; keep only one")


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

        Keys must be strings. Values are plain, as in `yaml.SafeLoader`. Integers may begin with 0.
        """

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            own = [(key, value) for key, value in node.value if key.tag != _YAML_MERGE]
            names = [self.construct_object(key, deep=True) for key, _ in own]
            for name in names:
                if not isinstance(name, str):
                    raise ValueError(f"the key {name!r} is not a string; put it in quotes")
            _check_no_key_twice(names)
            # Of the pairs with the same key, keep the mapping's own or the first merged one.
            pairs = {key.value: (key, value) for key, value in own}
            for key, value in node.value:
                if key.tag != _YAML_MERGE:
                    continue
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise ValueError(
                            "the value of the key << must be a table or a list of tables"
                        )
                    pairs = {key.value: (key, value) for key, value in source.value} | pairs
            node.value = list(pairs.values())
            return node

        def construct_yaml_int(self, node: Any) -> int:
            text = self.construct_scalar(node)
            return int(text if _YAML_INTEGER.match(text) else super().construct_yaml_int(node))

    UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", UniqueKeyLoader.construct_yaml_int)
    for kind, pattern in (("int", _YAML_INTEGER), ("float", _YAML_FLOAT)):
        UniqueKeyLoader.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", pattern, list("-+.0123456789")
        )
    try:
        return yaml.load(text, UniqueKeyLoader)  # UniqueKeyLoader is a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _resolve_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve the relative paths in a config file against the file's folder.

    ``data`` is the dict that was read from the file, and ``folder`` is the folder of the file. The
    result is a copy of the dict with the resolved paths.
    """

    def path(value: Any) -> Any:
        if isinstance(value, list):
            return [path(entry) for entry in value]
        # Empty paths are rejected later, and ~ is expanded later.
        relative = isinstance(value, str) and value and not value.startswith("~")
        return str(folder / value) if relative else value

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
