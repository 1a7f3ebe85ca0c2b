"""`fastlora train --load-in`: base models that bitsandbytes quantizes while they are read."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.integrations.transformers import quiet_transformers
from fastlora.model.estimate import format_bytes
from fastlora.train.data import collate_samples
from fastlora.train.losses import causal_lm_losses
from fastlora.train.run import open_run, train
from fastlora.train.settings import settings_from_dict
from fastlora.validation import CheckpointError
from tests.support import train_runs
from tests.support.tiny import tiny_llama
from tests.support.train_runs import log, same

transformers = pytest.importorskip("transformers", reason="trains its models")
pytest.importorskip("bitsandbytes", reason="quantizes")


def quantized_base(base: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The base model as QLoRA's users load it."""
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=bits, dtype=dtype, device_map={"": "cpu"}
        )


@pytest.fixture(scope="module")
def whole(base: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in 4 bits with evaluations, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("bits")
    train_runs.train(folder / "c.json", given_of(base, data, folder / "out"))
    return folder / "out"


def given_of(base: Path, data: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    """A config in 4 bits that evaluates behind every third step."""
    given = train_runs.config(base, data, out, load_in="4bit", eval_every=3, **changes)
    given["adapters"]["a"]["eval_data"] = str(data["b"])
    return given


def test_resume(whole: Path, base: Path, data: Any, tmp_path: Path) -> None:
    """From a checkpoint: the adapters and losses bit for bit. In other bits it is another run.

    Evaluations come in between, in which bitsandbytes would round the base weights' scales.
    """
    step, out = "step-00000006", tmp_path / "out"
    shutil.copytree(whole / "checkpoints" / step, out / "checkpoints" / step)
    given = given_of(base, data, out)
    for load_in in ("8bit", None):
        settings = settings_from_dict(given | {"load_in": load_in}, {}, "test")
        with pytest.raises(CheckpointError, match='load_in was "4bit", is '):
            train(settings, resume=True, progress=False)
    assert same(train_runs.train(tmp_path / "c.json", given, "--resume"), whole)
    assert log(out) == log(whole)[6:]
    losses = [entry["loss"]["a"] for entry in log(whole) if "a" in entry["loss"]]
    assert losses[-1] < losses[0]


def test_losses_are_those_of_pefts_qlora(base: Path, data: Any, tmp_path: Path) -> None:
    """Ten steps on the same samples from the same factors: every loss, and the factors at the end.

    With dtype float32 what is not quantized is in fp32, as after PEFT's preparation.
    """
    peft = pytest.importorskip("peft")
    given = train_runs.config(base, data, tmp_path / "out", steps=10, load_in="4bit", seed=2)
    del given["adapters"]["b"]
    given["adapters"]["a"] |= {"weight_decay": 0.1, "r": 4}
    given["defaults"]["dropout"] = 0.0
    with open_run(
        settings_from_dict(given | {"dtype": "float32"}, {}, "test"), progress=False
    ) as run:
        assert run.model.get_base_model().lm_head.weight.dtype == torch.float32
        theirs: Any = peft.prepare_model_for_kbit_training(
            quantized_base(base, torch.float32), use_gradient_checkpointing=False
        )
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        theirs = peft.get_peft_model(theirs, config, "a").train()
        mine = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
        other = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        assert mine.keys() == other.keys() and mine
        with torch.no_grad():
            for name, parameter in mine.items():
                other[name].copy_(parameter)
        optimizer = torch.optim.AdamW(other.values(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (step + 1) / 3 if step < 3 else 1 - (step - 3) / 7
        )
        expected = []
        for step in range(10):
            batch = collate_samples(
                run.schedule.order.step_samples(step), run.corpora, run.pad, torch.device("cpu")
            )
            logits = theirs(**batch.inputs, use_cache=False).logits
            losses = causal_lm_losses(logits, batch.labels, batch.adapters)
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_(other.values(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            expected.append(losses.values["a"])
        run.train()
    found = [entry["loss"]["a"] for entry in log(tmp_path / "out")]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.95 * found[0]
    for name, parameter in mine.items():
        assert (parameter - other[name]).norm() < 0.02 * other[name].norm(), name


def test_peft_loads_the_adapter(whole: Path, base: Path) -> None:
    """On the model in 4 bits and on the plain one."""
    peft = pytest.importorskip("peft")
    ids = torch.randint(0, 95, (2, 9))
    for make in (lambda: quantized_base(base, torch.float32), lambda: tiny_llama().eval()):
        ours = fastlora.LoraModel.from_pretrained(make(), whole / "a").eval()
        theirs = peft.PeftModel.from_pretrained(make(), str(whole / "a")).eval()
        with torch.no_grad():
            found, expected = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
            bare = make()(input_ids=ids).logits
        assert (found - expected).norm() < 1e-2 * (expected - bare).norm()


def test_eight_bits_and_checkpointing(base: Path, data: Any, tmp_path: Path) -> None:
    """LLM.int8 trains too; recomputing activations changes nothing."""
    found = []
    for load_in, on in (("8bit", False), ("4bit", False), ("4bit", True)):
        out = tmp_path / f"{load_in}{on}"
        given = train_runs.config(base, data, out, steps=3, load_in=load_in)
        given["defaults"]["lr"] = 1e-2
        found.append(train_runs.train(tmp_path / "c.json", given | {"gradient_checkpointing": on}))
    assert same(found[2], found[1])
    assert not torch.equal(*(next(iter(tensors.values())) for tensors in found[:2]))


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base model as it is stored in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    quantized_base(base).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stored", [False, True])
def test_dry_run(
    stored: bool,
    base: Path,
    packed: Path,
    data: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bits of the base model are counted: those that no run has made yet, or the folder's."""
    make, folder = (train_runs.config, packed) if stored else (given_of, base)
    path = train_runs.write_config(tmp_path / "c.json", make(folder, data, tmp_path / "out"))
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    real = fastlora.estimate(quantized_base(base), fastlora.LoraConfig(target_modules="all-linear"))
    bits = "stored in quantized form" if stored else "quantized in 4bit"
    assert f"{real.base_parameters:,} parameters, bfloat16, {bits}" in text
    size, scales = format_bytes(real.base_bytes), format_bytes(real.scale_bytes)
    assert f"base model {size} ({scales} of that for scales), 2 adapters" in text
    assert f"one dequantized weight {format_bytes(128 * 64 * 2)}, activations " in text
    assert "activations unknown" not in text and "not quantized yet" not in text
    over = (
        "that bitsandbytes has quantized; call"
        if stored
        else "that bitsandbytes will quantize in 4bit"
    )
    assert f"14 LoRA layers over weights {over}" in text
    assert not (tmp_path / "out").exists()


def test_errors(
    fails: Any, given: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bits, a model that is quantized already, and no bitsandbytes; nothing is written."""
    assert "load_in must be one of 4bit, 8bit, got '2bit'" in fails(given | {"load_in": "2bit"})
    for flags in ((), ("--dry-run",)):
        error = fails(given | {"model": str(packed)}, "--load-in", "4bit", *flags)
        assert f"{packed} is already quantized, but load_in is '4bit'" in error
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    for flags in ((), ("--dry-run",)):
        error = fails(given, "--load-in", "8bit", *flags)
        assert "load_in='8bit' needs bitsandbytes; install it with: pip install" in error
    assert not (tmp_path / "out").exists()
