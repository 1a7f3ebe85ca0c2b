"""Flags of `fastlora train` that are fields of an adapter's config, and what they may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastlora.commands import cli
from fastlora.serve import adapters as served
from fastlora.train import command, settings
from tests.support import train_runs

# Flags of one adapter, fields of its config, and how many keys of its file have which end.
FLAGS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "names with spaces": (
        *("--targets| q_proj, v_proj|--modules-to-save|norm , lm_head", {}),
        {"q_proj.lora_A.weight": 2, "v_proj.lora_A.weight": 2, "lora_A.weight": 4}
        | {"lm_head.weight": 1, "model.norm.weight": 1},
    ),
    "all linear": ("--targets| All-linear ", {}, {"lora_A.weight": 14}),
    "dora": (
        "--dora|--init|gaussian|--targets|q_proj|--bias|lora_only",
        {"use_dora": True, "init_lora_weights": "gaussian", "bias": "lora_only"},
        {"lora_magnitude_vector": 2, "q_proj.base_layer.bias": 2, "lora_B.bias": 0},
    ),
    "bias and no zero": (
        "--lora-bias|--init|false|--rslora|--targets|v_proj|--lr|0",
        {"lora_bias": True, "init_lora_weights": False, "use_rslora": True, "use_dora": False},
        {"lora_B.bias": 2, "lora_A.weight": 2},
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_each_flag_is_its_field_and_acts(case: str, base: Path, tmp_path: Path) -> None:
    flags, fields, held = FLAGS[case]
    data = train_runs.make_data(tmp_path / "data")
    given = ["--model", base, "--out", tmp_path / "out", "--data", f"x={data['a']}"]
    given += ["--steps", 1, "--batch-size", 2, "--quiet", "--r", 2, *flags.split("|")]
    assert cli.main(["train", *map(str, given)]) == 0
    config = json.loads((tmp_path / "out" / "x" / "adapter_config.json").read_text())
    assert {name: config[name] for name in fields} == fields
    found = train_runs.saved(tmp_path / "out")
    assert {end: sum(key.endswith(end) for key in found) for end in held} == held
    if "false" in flags:  # B has values of its own from the first step on
        assert all(tensor.any() for key, tensor in found.items() if key.endswith("lora_B.weight"))


def test_flags_go_over_every_adapter(given: Any, tmp_path: Path, fails: Any) -> None:
    """What was not given stays the file's; what is wrong together is named with its adapter."""
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = command._flags_from_arguments(
        parser.parse_args(["--lora-bias", "--init", "true"]), parser
    )
    assert flags["defaults"] == {"lora_bias": True, "init_lora_weights": True}
    error = fails(given, "--lora-bias", "--dora", "--dry-run")
    assert "adapter 'a': " in error and "lora_bias" in error
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--bias", "some"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--targets", "q_proj,v_porj"], "adapter 'a': target_modules entries ['v_porj'] match no"),
        (["--targets", "q_proj,"], "the entries of target_modules must be module names, got ''"),
        (["--modules-to-save", "lm_haed"], "modules_to_save entries ['lm_haed'] match no module"),
    ],
)
def test_a_name_that_matches_nothing(
    fails: Any, given: Any, tmp_path: Path, flags: list[str], words: str
) -> None:
    """An error before data or weights are read, although other names match."""
    given["adapters"]["b"]["data"] = "nowhere.jsonl"
    assert words in fails(given, *flags)
    assert words in fails(given, *flags, "--dry-run")
    assert not (tmp_path / "out").exists()


def test_serve_accepts_every_name_that_trains() -> None:
    """Each first and second character, and the longest names."""
    characters = [chr(number) for number in range(128)]
    names = [first + second for first in characters for second in ("", *characters)]
    names += ["x" * length for length in (127, 128, 129)]
    trained = {name for name in names if settings._NAME.fullmatch(name)}
    assert trained == {n for n in names if served._NAME.fullmatch(n) and "." not in n}
    assert "base" in settings.RESERVED_NAMES
