"""The example of a Trainer over mixed batches: it trains, resumes exactly, and PEFT reads it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora.testing import assert_within_budget
from tests.support.tiny import tiny_llama

transformers = pytest.importorskip("transformers", reason="runs Trainer")
pytest.importorskip("accelerate", reason="Trainer needs it")
peft = pytest.importorskip("peft", reason="Trainer knows adapters by peft's class")

PATH = Path(__file__).parents[2] / "examples" / "multi_adapter_trainer.py"
NAMES = ["default", "b", "c"]


@pytest.fixture(scope="module")
def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("multi_adapter_trainer", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build(example: Any, out: Path, **arguments: Any) -> Any:
    """A trainer of three adapters on a tiny Llama, with data of different amounts and lengths."""
    config = {"target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    model = fastlora.get_peft_model(tiny_llama(), fastlora.LoraConfig(r=2, **config))
    for name, r in (("b", 4), ("c", 8)):
        model.add_adapter(name, fastlora.LoraConfig(r=r, **config))
    generator = torch.Generator().manual_seed(3)
    datasets = {}
    for name, rows, length in zip(NAMES, (20, 9, 4), (12, 7, 9), strict=True):
        ids = torch.randint(1, 97, (rows, length), generator=generator).tolist()
        datasets[name] = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]
    recipes = {
        "default": example.Recipe(learning_rate=1e-2),
        "b": example.Recipe(learning_rate=3e-2, weight_decay=0.1, max_grad_norm=0.1),
        "c": example.Recipe(learning_rate=2e-2, warmup_steps=2),
    }
    defaults = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    args = transformers.TrainingArguments(str(out), **{**defaults, **arguments})
    return example.MultiAdapterTrainer(model, args, recipes, datasets)


def saved(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Each adapter's tensors."""
    paths = [folder if name == "default" else folder / name for name in NAMES]
    return {
        name: load_file(path / "adapter_model.safetensors")
        for name, path in zip(NAMES, paths, strict=True)
    }


def test_it_trains_resumes_and_saves(example: Any, tmp_path: Path) -> None:
    """From step 3 of 6 on, a resumed run gives the whole run's adapters, which PEFT loads."""
    trainer = build(example, tmp_path / "whole")
    trainer.train()
    trainer.save_model()
    model, counts = trainer.model, trainer.optimizer.counts
    assert sum(count.steps for count in counts.values()) < 6 * len(NAMES)  # arrival was uneven
    assert all(count.steps for count in counts.values())
    logged = [entry for entry in trainer.state.log_history if "loss/default" in entry]
    assert logged and not any("grad_norm" in entry for entry in logged)

    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = build(example, tmp_path / "resumed")
    again.train(resume_from_checkpoint=str(checkpoint))
    again.save_model()
    assert again.optimizer.counts == counts
    whole, resumed = saved(tmp_path / "whole"), saved(tmp_path / "resumed")
    for name, before in saved(checkpoint).items():
        assert before.keys() == whole[name].keys() == resumed[name].keys()
        for key, tensor in whole[name].items():
            assert torch.equal(resumed[name][key], tensor), key
        assert any(not torch.equal(before[key], t) for key, t in whole[name].items())

    ids = torch.randint(1, 97, (3, 9))
    with torch.no_grad():
        ours = model.eval()(input_ids=ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        folder = tmp_path / "whole" / ("" if name == "default" else name)
        twin = peft.PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
        with torch.no_grad():
            theirs = twin(input_ids=ids[row : row + 1]).logits
            exact = twin.double()(input_ids=ids[row : row + 1]).logits.double()
        assert_within_budget(ours[row : row + 1], theirs, exact, name)


def test_a_broken_adapter_spoils_no_other(example: Any, tmp_path: Path) -> None:
    """NaN in one adapter from the start: the others end where they end without that."""
    runs = []
    for broken in (False, True):
        trainer = build(example, tmp_path / str(broken), save_strategy="no")
        if broken:
            with torch.no_grad():
                key = "model.layers.0.self_attn.q_proj"
                trainer.model.get_base_model().get_submodule(key).lora_A["b"].weight.fill_(
                    float("nan")
                )
        trainer.train()
        trainer.save_model()
        runs.append((trainer, saved(tmp_path / str(broken))))
    (_, healthy), (trainer, found) = runs
    counts = trainer.optimizer.counts
    assert counts["b"].steps == 0 and counts["b"].non_finite_losses > 0
    assert any("non_finite/b" in entry for entry in trainer.state.log_history)
    for name in ("default", "c"):
        for key, tensor in healthy[name].items():
            assert torch.equal(found[name][key], tensor), key


def test_recipes_and_data_must_agree(example: Any, tmp_path: Path) -> None:
    """Named before Trainer does anything."""
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"recipes are for \['a'\] and datasets for \['b'\]"):
        example.MultiAdapterTrainer(None, args, {"a": example.Recipe()}, {"b": []})
