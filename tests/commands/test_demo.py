"""The demo itself, shortened: it runs, it learns, and its check against PEFT can fail."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import demo, demo_peft, smollm2
from fastlora.commands.options import parse_options
from fastlora.train.data import TrainBatch
from fastlora.train.run_log import read_logged_losses

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def short(fresh_smollm2: Any, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of six layers, where the demo looks for the converted one."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("cache") / "smollm2-135m-instruct"
    fresh_smollm2(layers=6).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(folder)
    (folder / smollm2._COMPLETE).touch()
    return folder


@pytest.fixture
def arguments(tmp_path: Path, short: Path) -> argparse.Namespace:
    given = ["--out", str(tmp_path / "adapters"), "--steps", "2", "--rounds", "1"]
    given += ["--adapters", "1,3", "--prompt", "What is the capital of Italy?"]
    return parse_options("demo", None, demo.OPTIONS, [*given, "--cache", str(short.parent)])


def test_the_demo_runs(
    arguments: argparse.Namespace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("BATCH", 3), ("SEQUENCES", 6), ("TABLE_ROUNDS", 1), ("ANSWER_TOKENS", 8)):
        monkeypatch.setattr(demo, name, value)
    assert demo.run_demo(arguments) == 0
    printed = capsys.readouterr().out
    assert "> What is the capital of Italy?" in printed
    assert "equal within fp32 rounding" in printed
    assert "NOT EQUAL" not in printed
    assert "forward + backward" in printed
    table = printed.partition("one after another\n")[2].splitlines()[:2]
    assert [line.split()[0] for line in table] == ["1", "3"]
    for style in demo.STYLES:
        assert {p.name for p in (arguments.out / style).iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


def test_each_adapter_learns_its_own_style(
    tmp_path: Path, short: Path, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answers as its own data says, whatever the others in the batch learned."""
    monkeypatch.setattr(demo, "BATCH", 3)
    for name, text in (("ships_log", "Ahoy!"), ("json_answer", "{}"), ("robot", "BEEP.")):
        row = json.dumps({"prompt": "What is the capital of Italy?", "completion": text})
        (tmp_path / f"{name}.jsonl").write_text(row)
    adapters = demo.adapter_settings_for_data_files(
        [tmp_path / f"{name}.jsonl" for name in demo.STYLES]
    )
    (tmp_path / "out" / "checkpoints" / "step-00000012").mkdir(parents=True)  # of an earlier run
    (tmp_path / "out" / "checkpoints" / "step-00000012" / "state.json").touch()
    with demo.open_demo_run(short, adapters, tmp_path / "out", 12) as run:
        run.train()
    for name in adapters:
        losses = [e.loss for e in read_logged_losses(tmp_path / "out") if e.adapter == name]
        assert len(losses) == 12 and losses[-1] < losses[0] / 10, losses
    model, base = run.model.eval(), smollm2.load_model(short)
    prompt = "What is the capital of Italy?"
    corpus = run.corpora["robot"]
    turn = smollm2_tokenizer.decode(corpus.token_ids(0))
    assert turn == f"{smollm2.chat_prompt(prompt)}BEEP.{smollm2_tokenizer.eos_token}"
    assert corpus.num_loss_tokens(0) == len(smollm2_tokenizer("BEEP.").input_ids) + 1  # and its end
    names = ["robot", None, "json_answer"]
    robot, alone, answer = demo.answer_with_adapters_in_one_batch(
        model, smollm2_tokenizer, prompt, names
    )
    assert robot.startswith("BEEP.") and answer.startswith("{}")
    assert [alone] == demo.answer_with_adapters_in_one_batch(base, smollm2_tokenizer, prompt)


@pytest.mark.parametrize(("change", "agrees"), [(0.0, True), (0.01, False), (float("nan"), False)])
def test_the_check_sees_a_model_that_differs(
    tmp_path: Path, fresh_smollm2: Any, change: float, agrees: bool
) -> None:
    config = fastlora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    fresh = partial(fresh_smollm2, layers=2)
    model = fastlora.get_peft_model(fresh(), config, adapter_name="a")
    model.add_adapter("b", config)
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1." in name and "lora_B.b" in name:
                parameter.add_(change)
    ids = torch.tensor([[1, 504, 2725, 282, 4649, 314]] * 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _, found, text = demo_peft.load_in_peft_and_compare_logits(
        model, fresh, tmp_path, TrainBatch(["a", "b"], inputs, ids)
    )
    assert found is agrees
    assert ("NOT EQUAL" in text) is not agrees
