"""Flags of `fastlora train` that are fields of an adapter's config, and what they may name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlora import cli
from fastlora.train import command
from tests.support import train_runs

pytest.importorskip("transformers", reason="trains its models")
pytest.importorskip("accelerate", reason="trains on it")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``run(*flags)`` trains one adapter without a config file, and returns its config."""
    data = train_runs.make_data(tmp_path / "data")

    def run(*flags: object) -> dict[str, Any]:
        given = ["--model", base, "--out", tmp_path / "out", "--data", f"x={data['a']}"]
        given += ["--steps", 1, "--batch-size", 2, "--quiet", "--r", 2, *flags]
        assert cli.main(["train", *map(str, given)]) == 0
        return json.loads((tmp_path / "out" / "x" / "adapter_config.json").read_text())

    return run


def adapted(out: Path) -> set[str]:
    """The last part of the names that have factors in a run's folder."""
    return {key.split(".")[-3] for key in train_runs.saved(out) if "lora_A" in key}


def test_names_with_spaces(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A list as people write it names all of its modules."""
    config = run("--targets", " q_proj, v_proj", "--modules-to-save", "norm , lm_head")
    assert set(config["target_modules"]) == {"q_proj", "v_proj"} == adapted(tmp_path / "out")
    assert set(config["modules_to_save"]) == {"norm", "lm_head"}
    assert any("lm_head.weight" in key for key in train_runs.saved(tmp_path / "out"))


def test_all_linear_with_spaces(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The one word that is no name."""
    run("--targets", " All-linear ")
    assert len(adapted(tmp_path / "out")) == 7


def test_dora_and_gaussian(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Each flag is its field, and acts."""
    config = run("--dora", "--init", "gaussian", "--targets", "q_proj", "--bias", "lora_only")
    assert (config["use_dora"], config["init_lora_weights"]) == (True, "gaussian")
    assert (config["bias"], config["lora_bias"]) == ("lora_only", False)
    found = train_runs.saved(tmp_path / "out")
    assert len([key for key in found if "lora_magnitude_vector" in key]) == 2
    assert len([key for key in found if key.endswith("q_proj.base_layer.bias")]) == 2


def test_lora_bias_and_no_zero(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """B has a bias; and values of its own from the first step on."""
    config = run("--lora-bias", "--init", "false", "--rslora", "--targets", "v_proj", "--lr", 0)
    assert (config["lora_bias"], config["init_lora_weights"]) == (True, False)
    assert (config["use_rslora"], config["use_dora"]) == (True, False)
    found = train_runs.saved(tmp_path / "out")
    assert len([key for key in found if key.endswith("lora_B.bias")]) == 2
    assert all(tensor.any() for key, tensor in found.items() if key.endswith("lora_B.weight"))


def test_flags_go_over_every_adapter(given: Any, tmp_path: Path, fails: Any) -> None:
    """What was not given stays the file's; what is wrong together is named with its adapter."""
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = command._flags(parser.parse_args(["--lora-bias", "--init", "true"]), parser)
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
        (["--targets", "q_proj,"], "target_modules must hold module names, got the entry ''"),
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
