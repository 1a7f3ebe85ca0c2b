"""The pages of examples/ run, and show what they say."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the models of the pages are transformers'")

FOLDER = Path(__file__).parents[1] / "examples"


def close(a: float, b: float, tolerance: float = 1e-3) -> bool:
    return abs(a - b) <= tolerance


SHOWN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "one_adapter": lambda r: (
        close(r["base"], r["before"])
        and close(r["loaded"], r["trained"])
        and r["trained"] < 0.5 * r["before"]
    ),
    "several_adapters": lambda r: (
        max(r["ones on ones"], r["threes on threes"]) < 0.5 * r["base on threes"]
        and r["threes on ones"] > 2 * r["ones on ones"]
    ),
    "experts": lambda r: (
        r["ranks on experts"]
        == {"gate_up_proj": {"ones": 8}, "down_proj": {"ones": 8, "threes": 4}}
        and max(r["ones"], r["threes"]) < 0.6 * r["base"]
        and close(r["loaded"], r["ones"])
    ),
    "serving_pool": lambda r: (
        r["names"] == ["step1", "step2", "step3", "step4"]
        and sorted(r["resident"]) == ["step1", "step4"]
        and r["generated"] == (2, 5)
        and r["largest difference"] < 1e-4
    ),
    "dora": lambda r: (
        close(r["new dora"], r["base"])
        and close(r["merged dora"], r["dora"])
        and max(r["dora"], r["lora"]) < 0.6 * r["base"]
    ),
    "new_tokens": lambda r: (
        r["trained"] < 0.6 * r["before"]
        and close(r["loaded"], r["trained"])
        and close(r["merged"], r["trained"])
        and r["rows"] == (2, 32)
        and r["other rows as before"]
        and r["bytes"] < 30_000
    ),
    "weighted": lambda r: (
        r["both on threes"] < r["ones on threes"] and r["both on ones"] < r["threes on ones"]
    ),
    "pissa": lambda r: (
        close(r["start"], r["base"])
        and r["trained"] < 0.6 * r["base"]
        and close(r["loaded"], r["trained"])
    ),
    "hot_swap": lambda r: (
        close(r["swapped"], r["second alone"]) and r["swapped"] < 0.5 * r["first"]
    ),
    "merging": lambda r: (
        close(r["merged"], r["unmerged"], 0.05)
        and close(r["unloaded"], r["merged"])
        and r["weights are back"]
        and r["class"] == "LlamaForCausalLM"
    ),
    "deeper": lambda r: (
        r["layers"] == 4
        and r["base parameters"][0] == r["base parameters"][1]
        and r["trained"] < 0.6 * r["before"]
        and close(r["merged"], r["trained"])
    ),
}


@pytest.mark.parametrize("page", SHOWN)
def test_page(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    result = runpy.run_path(str(FOLDER / f"{page}.py"))["main"]()
    assert SHOWN[page](result), result


MODULES = {"tiny", "shared", "axolotl_plugin"}  # imported by other programs
NEEDS = {
    "export_gguf": ("gguf",),
    "hf_trainer": ("peft",),
    "qlora": ("peft", "bitsandbytes"),
    "trl_sft": ("trl", "datasets"),
    "two_processes": ("accelerate",),
}
SCRIPTS = sorted(path for path in FOLDER.rglob("*.py") if path.stem not in MODULES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--help`` prints the docstring and runs nothing; wrong arguments get a one-line error."""
    for library in NEEDS.get(script.stem, ()):
        pytest.importorskip(library, reason=f"{script.stem} imports it")
    for folder in {script.parent, FOLDER}:
        monkeypatch.syspath_prepend(str(folder))
    needs_paths = script.stem.startswith("export_")
    for arguments, code in ((["--help"], 0), ([] if needs_paths else ["--nonsense"], 2)):
        for module in ("shared", "tiny"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr("sys.argv", [str(script), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(script), run_name="__main__")
        assert caught.value.code == code
        shown = capsys.readouterr()
        text = shown.err if code else shown.out
        assert text.startswith(f"usage: {script.name} [-h]")
        assert not code or f"{script.name}: error: " in text.splitlines()[-1]
        source = script.read_text(encoding="utf-8")
        assert code or source.removeprefix('"""').splitlines()[0] in text


@pytest.mark.parametrize(
    "arguments",
    [["export_vllm", "missing", "out"], ["export_gguf", "adapter", "missing", "base", "out.gguf"]],
    ids=lambda arguments: arguments[0],
)
def test_an_export_of_nothing_fails_in_one_line(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    script = FOLDER / "recipes" / f"{arguments[0]}.py"
    for library in NEEDS.get(script.stem, ()):
        pytest.importorskip(library, reason=f"{script.stem} imports it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), *arguments[1:]])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script.name}: error: ")


def test_every_page_is_run_and_listed() -> None:
    pages = {path.stem for path in FOLDER.glob("*.py")} - {"tiny", "multi_adapter_trainer"}
    assert pages == set(SHOWN)
    listed = re.findall(r"\]\((\w+)\.py\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert set(listed) == pages | {"multi_adapter_trainer"}
