"""`fastlora train` and TRL's SFTTrainer on the same data: tokens, labels, losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.train.data import DataOptions, tokenize_files
from fastlora.train.data.formats import alpaca_prompt
from fastlora.train.data.packing import pack_documents
from fastlora.train.run import open_run
from fastlora.train.settings import settings_from_dict
from tests.support.tiny import randomize, tiny_llama

trl = pytest.importorskip("trl", reason="compares with its trainer")
peft = pytest.importorskip("peft", reason="TRL needs it")
datasets = pytest.importorskip("datasets", reason="TRL needs it")
transformers = pytest.importorskip("transformers", reason="TRL needs it")
pytest.importorskip("accelerate", reason="trains on it")

MERGES = [("a", "b"), ("l", "l"), ("ll", "o"), (" ", "t")]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
WORDS = ["hello", "that", "abba", "tall", "to", "the lab", "a ball", "talk"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, a tokenizer that joins letters, and an adapter beside them."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("twins")
    letters = [chr(32 + i) for i in range(95)]
    vocabulary = {t: i for i, t in enumerate([*letters, *map("".join, MERGES)])}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, MERGES)),
        eos_token="<eos>",
        pad_token="<pad>",
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    tiny_llama(vocab_size=104, tie_word_embeddings=False).save_pretrained(folder)
    config = fastlora.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    adapter = fastlora.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder), config
    )
    randomize(adapter)
    adapter.save_pretrained(folder / "adapter")
    return folder


def pair(word: str) -> dict[str, Any]:
    """The prompt's last letter and the completion's first one are one token where they meet."""
    return {"prompt": f"say {word}a", "completion": f"b{word} {word}"}


def asked(word: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "be"}, {"role": "user", "content": f"say {word}"}]


def answered(word: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f"{word} {word}"}]


def chat(word: str) -> list[dict[str, str]]:
    return [*asked(word), *answered(word), *asked(f"not {word}")[1:], *answered(f"no {word}")]


def shared(word: str) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in chat(word)]


def same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """TRL keeps human and gpt, which templates do not know."""
    names = {"human": "user", "gpt": "assistant"}
    return {"conversations": [m | {"from": names.get(m["from"], m["from"])} for m in row.pop("c")]}


def of_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """TRL has no such format: the prompt is written out."""
    return {
        "prompt": alpaca_prompt(row["instruction"], row["input"]),
        "completion": row["output"],
    }


Row = dict[str, Any]
# Rows of ours by word; what TRL is given for each; settings of ours and of TRL's.
CASES: dict[str, tuple[Callable[[str], Row], Callable[[Row], Row], Row, Row]] = {
    "text": (lambda w: {"text": f"{w} that {w}"}, same, {}, {}),
    "text cut": (lambda w: {"text": f"{w} that {w}"}, same, {"max_length": 9}, {}),
    "prompt_completion": (pair, same, {}, {}),
    "prompts cut": (pair, same, {"max_length": 10}, {}),
    "whole pairs": (pair, same, {"completion_only_loss": False}, {"completion_only_loss": False}),
    "pairs of messages": (
        *(lambda w: {"prompt": asked(w), "completion": answered(w)}, same),
        *({}, {}),
    ),
    "pairs as chats": (
        pair,
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
        {"chat": True},
        {},
    ),
    "messages": (lambda w: {"messages": chat(w)}, same, {}, {}),
    "assistant only": (
        *(lambda w: {"messages": chat(w)}, same),
        *({"assistant_only_loss": True}, {"assistant_only_loss": True}),
    ),
    "assistant only in pairs": (
        *(lambda w: {"prompt": chat(w), "completion": chat("so")}, same),
        *({"assistant_only_loss": True}, {"assistant_only_loss": True}),
    ),
    "sharegpt": (
        lambda w: {"conversations": shared(w)},
        lambda row: renamed({"c": row["conversations"]}),
        *({}, {}),
    ),
    "alpaca": (
        lambda w: {"instruction": f"say {w}", "input": w if len(w) > 4 else "", "output": w},
        of_alpaca,
        *({}, {}),
    ),
    "packed bfd": (
        *(lambda w: {"text": f"{w} that {w}"}, same),
        *({"packing": "bfd", "max_length": 24}, {"packing": True}),
    ),
    "packed pairs": (
        *(pair, same),
        *(
            {"packing": "bfd_split", "max_length": 20},
            {"packing": True, "packing_strategy": "bfd_split"},
        ),
    ),
    "packed wrapped": (
        *(lambda w: {"text": f"{w} that {w}"}, same),
        *(
            {"packing": "wrapped", "max_length": 13},
            {"packing": True, "packing_strategy": "wrapped"},
        ),
    ),
}


def trainer_of(base: Path, rows: list[Row], out: Path, **options: Any) -> Any:
    """TRL's trainer with the adapter in PEFT's model; every step has all rows."""
    arguments = trl.SFTConfig(
        output_dir=str(out),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return trl.SFTTrainer(
        model=peft.PeftModel.from_pretrained(model, str(base / "adapter"), is_trainable=True),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("case", CASES)
def test_tokens_labels_and_losses(case: str, base: Path, tmp_path: Path) -> None:
    """Two steps over the whole data: tokens and labels equal, losses to rounding."""
    row, theirs, ours, options = CASES[case]
    rows = [row(word) for word in WORDS]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    length = ours.get("max_length", 256)
    trainer = trainer_of(base, [theirs(r) for r in rows], tmp_path, max_length=length, **options)
    settings = {"max_length": length, **ours}
    adapter = {"data": str(path), "init_from": str(base / "adapter"), "lr": 1e-2}
    adapter |= {"schedule": "constant", "warmup_ratio": 0, "max_grad_norm": 0}
    expected = trainer.train_dataset
    given = {"model": str(base), "out": str(tmp_path / "out"), "cpu": True, "steps": 2, **settings}
    given |= {"batch_size": len(expected), "adapters": {"a": adapter}}
    with open_run(settings_from_dict(given, {}, "test"), progress=False) as run:
        corpus = run.corpora["a"]
        assert [corpus.token_ids(i).tolist() for i in range(len(corpus))] == expected["input_ids"]
        # A first label is of no use to TRL's loss either, in a packed document too.
        starts = [
            {sum(lengths[:n]) for n in range(len(lengths))}
            for lengths in (
                corpus.documents or [[corpus.num_tokens(i)] for i in range(len(corpus))]
            )
        ]
        labels = [
            [-100 if i in firsts else label for i, label in enumerate(own)]
            for own, firsts in zip(expected["labels"], starts, strict=True)
        ]
        assert [corpus.labels(i, -100).tolist() for i in range(len(corpus))] == labels
        assert any(label != -100 for own in labels for label in own)
        if corpus.documents is not None:
            assert corpus.documents == expected["seq_lengths"]
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = []
        for _ in range(2):
            run._run_training_step()
            found.append(run.losses["a"])
    # The second step shows the gradients: the loss has moved, and equally.
    assert found == pytest.approx(losses, rel=2e-5) and abs(found[1] - found[0]) > 1e-3


def test_packing_is_trls() -> None:
    """The same rows as `pack_dataset`, with ties, with more than it packs at once."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (1500,), generator=generator).tolist()
    ids = [[number] * length for number, length in enumerate(lengths)]
    for strategy in ("bfd", "bfd_split", "wrapped"):
        packed = trl.pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), 32, strategy)
        rows = pack_documents(lengths, 32, strategy)
        assert [[n for n, a, b in row for _ in range(a, b)] for row in rows] == packed["input_ids"]
        if strategy != "wrapped":
            assert [[b - a for _, a, b in row] for row in rows] == packed["seq_lengths"]


def test_packed_documents_stay_separate(base: Path, tmp_path: Path) -> None:
    """In bfd each token's loss is that of its document alone; wrapped, it sees what is before."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{w} that {w}"}) for w in WORDS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    alone = tokenize_files([path], tokenizer, 64)
    packed = tokenize_files([path], tokenizer, 64, DataOptions(packing="bfd"))
    assert len(packed) < len(alone) and len(packed.ids) == len(alone.ids)
    assert "packed by bfd: 8 samples in" in packed.notes[-1] and "and 3 more in" in str(
        packed.sources[0]
    )
    losses = {}
    for packing in (None, "bfd", "wrapped"):
        settings = {"model": str(base), "out": str(tmp_path / "out"), "cpu": True, "steps": 1}
        adapter = {"data": str(path), "init_from": str(base / "adapter")}
        settings |= {"max_length": 64, "batch_size": 8, "micro_batch_size": 2}
        settings |= {"adapters": {"a": adapter}} | ({"packing": packing} if packing else {})
        with open_run(settings_from_dict(settings, {}, "test"), progress=False) as run:
            run.schedule.order.batch_size = len(run.corpora["a"])  # all of them, each once
            run._run_training_step()
            losses[packing] = run.losses["a"]
    assert losses["bfd"] == pytest.approx(losses[None], rel=1e-6)
    assert abs(losses["wrapped"] - losses[None]) > 1e-3
