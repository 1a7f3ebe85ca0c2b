"""TRL's trainers, given a config of ours: losses are those of PEFT's config, digit by digit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from tests.support.tiny import tiny_llama

trl = pytest.importorskip("trl", reason="runs its trainers")
peft = pytest.importorskip("peft", reason="TRL needs it")
datasets = pytest.importorskip("datasets", reason="TRL needs it")
transformers = pytest.importorskip("transformers", reason="TRL needs it")

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    ids = {word: number for number, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def texts(words: int) -> list[str]:
    generator = torch.Generator().manual_seed(words)
    rows = torch.randint(0, len(WORDS), (12, words), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in rows]


def reward(completions: list[str], **_: Any) -> list[float]:
    """More for completions with more different words, and with words that begin with w1."""
    return [float(len(set(text.split()))) + text.count("w1") for text in completions]


@dataclass(frozen=True)
class Kind:
    """A trainer and its config, with arguments for each, and the data."""

    trainer: str
    config: str
    data: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


_PROMPTS = {"prompt": texts(5)}
KINDS = {
    "sft": Kind("SFTTrainer", "SFTConfig", {"text": texts(12)}),
    "dpo": Kind("DPOTrainer", "DPOConfig", {**_PROMPTS, "chosen": texts(6), "rejected": texts(7)}),
    "kto": Kind(
        "KTOTrainer",
        "KTOConfig",
        {**_PROMPTS, "completion": texts(6), "label": [True, False] * 6},
    ),
    "grpo": Kind(
        "GRPOTrainer",
        "GRPOConfig",
        _PROMPTS,
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.1},
        {"reward_funcs": reward},
    ),
}


def printed(values: list[float]) -> list[str]:
    """Returns losses as Trainer's log shows them."""
    return [f"{value:.4g}" for value in values]


def losses(kind: str, config: Any, wrap: Any, tokenizer: Any, out: Path) -> tuple[Any, list[float]]:
    """Trains for three steps; returns the trained model and the losses as they are logged."""
    case = KINDS[kind]
    arguments = getattr(trl, case.config)(
        output_dir=str(out),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
        **case.arguments,
    )
    model, options = tiny_llama(), {"peft_config": config}
    torch.manual_seed(1)
    if wrap is not None:
        model, options = wrap(model, config), {}
    trainer = getattr(trl, case.trainer)(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(case.data),
        processing_class=tokenizer,
        **case.options,
        **options,
    )
    trainer.train()
    return trainer.model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_pefts(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """With ``peft_config=`` of ours, and with a model of ours, the logged losses are PEFT's."""
    config = peft.LoraConfig(**CONFIG, task_type="CAUSAL_LM")
    ours = fastlora.LoraConfig(**CONFIG, task_type="CAUSAL_LM")
    _, expected = losses(kind, config, None, tokenizer, tmp_path)
    model, found = losses(kind, ours, None, tokenizer, tmp_path)
    assert found == pytest.approx(expected, rel=1e-5)
    assert printed(found) == printed(expected) and len(set(found)) == 3
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").is_file()
    report = fastlora.fusion_report(model)
    assert report.fused == len(report.rows) == 4
    _, expected = losses(kind, config, peft.get_peft_model, tokenizer, tmp_path)
    model, found = losses(kind, ours, fastlora.get_peft_model, tokenizer, tmp_path)
    assert printed(found) == printed(expected) and isinstance(model, fastlora.LoraModel)
