"""The options of `fastlora train`: config files, flags, dtypes, evaluation, dry run, data."""

from __future__ import annotations

import json
import math
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.train import AdapterOptimizers, causal_lm_losses, count_tokens
from fastlora.train import run as run_module
from fastlora.train.base_model import load_tokenizer
from fastlora.train.data import (
    SampleOrder,
    SampleRef,
    TokenizedCorpus,
    collate_samples,
    sorted_micro_batches,
    tokenize_files,
)
from fastlora.train.prepare import learning_rate_lambda
from fastlora.train.run import open_run
from fastlora.train.settings import AdapterSettings, read_settings, settings_from_dict
from fastlora.validation import ConfigError
from tests.support import train_runs
from tests.support.tiny import tiny_llama
from tests.support.train_runs import log


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


# ---------------------------------------------------------------------------------- whole commands


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str, base: Path, data: Any, tmp_path: Path) -> None:
    """Factors stay fp32; in fp16 each adapter has a loss scale, which a checkpoint holds."""
    given = train_runs.config(base, data, tmp_path / "whole", dtype=dtype, steps=4, save_every=2)
    whole = train_runs.train(tmp_path / "c.json", given)
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    root = tmp_path / "whole" / "checkpoints"
    state = json.loads((root / "step-00000002" / "state.json").read_text())
    scaled = dict(dict(state["optimizers"]["dict"])["a"]["dict"])["scaler"]
    assert (scaled is None) == (dtype == "bfloat16")
    resumed = tmp_path / "resumed" / "checkpoints"
    resumed.mkdir(parents=True)
    (root / "step-00000002").rename(resumed / "step-00000002")
    again = train_runs.train(
        tmp_path / "c.json", given | {"out": str(tmp_path / "resumed")}, "--resume"
    )
    assert train_runs.same(again, whole)
    losses = [entry["loss"]["a"] for entry in log(tmp_path / "whole") if "a" in entry["loss"]]
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_nothing(base: Path, data: Any, tmp_path: Path) -> None:
    """Recomputed in the backward, dropout included: the same adapters bit for bit."""
    found = []
    for on in (False, True):
        given = train_runs.config(base, data, tmp_path / str(on), steps=3)
        found.append(train_runs.train(tmp_path / "c.json", given | {"gradient_checkpointing": on}))
    assert train_runs.same(*found)


def test_accumulation_is_one_large_batch(base: Path, data: Any, tmp_path: Path) -> None:
    """Without dropout, forwards of 1 and of 4 give the same losses and gradients: in float64."""
    found: list[dict[str, Any]] = []
    for size in (1, 4):
        given = train_runs.config(base, data, tmp_path / "out", micro_batch_size=size)
        given["defaults"]["dropout"] = 0.0
        with open_run(settings_from_dict(given, {}, "test"), progress=False) as run:
            run.model.double()
            entries: list[dict[str, Any]] = []
            run._write_log_and_trackers = entries.append  # type: ignore[method-assign]
            run._run_training_step()
            run._run_training_step()
            found.append(entries[-1])
    for kind in ("loss", "grad_norm"):
        assert found[0][kind].keys() == found[1][kind].keys() == {"a", "b"}
        for name, value in found[0][kind].items():
            # Some thousand roundings of 2e-16; a sample left out changes the second digit.
            assert value == pytest.approx(found[1][kind][name], rel=1e-12)


def test_logits_are_gone_before_the_backward_and_the_next_forward(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large vocabulary they are among a run's largest tensors."""
    logits: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            alive.append(sum(each() is not None for each in logits))
            return real(*args)

        return counted

    def losses(own: torch.Tensor, *args: Any, **options: Any) -> Any:
        logits.append(weakref.ref(own))
        return causal_lm_losses(own, *args, **options)

    monkeypatch.setattr(run_module, "causal_lm_losses", losses)
    monkeypatch.setattr(run_module, "collate_samples", counting(run_module.collate_samples))
    monkeypatch.setattr(AdapterOptimizers, "backward", counting(AdapterOptimizers.backward))
    for adapter in given["adapters"].values():
        adapter["eval_data"] = adapter["data"]
    train_runs.train(tmp_path / "c.json", {**given, "dtype": "bfloat16"})
    assert len(alive) > len(logits) > 8  # 4 steps of 2 forwards with backwards, and evaluations
    assert not any(alive)


def test_evaluation(base: Path, data: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Losses over all tokens of the evaluation data, dropout off; training is not disturbed."""
    given = train_runs.config(base, data, tmp_path / "plain", steps=4)
    plain = train_runs.train(tmp_path / "c.json", given)
    given["out"] = str(tmp_path / "out")
    given["adapters"]["a"]["eval_data"] = [str(data["a"]), str(data["c"])]
    found = train_runs.train(tmp_path / "c.json", given | {"eval_every": 3})
    assert train_runs.same(found, plain)
    entries = log(tmp_path / "out", "eval_loss")
    assert [entry["step"] for entry in entries] == [3, 4]
    model = fastlora.LoraModel.from_pretrained(tiny_llama(), tmp_path / "out" / "a")
    corpus = tokenize_files([data["a"], data["c"]], tokenizer, 512)
    total = 0.0
    for i in range(len(corpus)):
        batch = collate_samples([SampleRef("a", i)], {"a": corpus}, 0, torch.device("cpu"))
        with torch.no_grad():
            logits = model.double()(**batch.inputs).logits
        total += causal_lm_losses(logits, batch.labels, ["a"]).values["a"] * corpus.num_loss_tokens(
            i
        )
    exact = total / sum(corpus.num_loss_tokens(i) for i in range(len(corpus)))
    # Each of the logits behind the loss is a sum of 64 products in fp32.
    assert entries[-1]["eval_loss"]["a"] == pytest.approx(exact, rel=64 * 2**-23)


def test_going_on_from_an_adapter(base: Path, data: Any, tmp_path: Path) -> None:
    """init_from takes factors and config; the untrained adapter beside it is a new one."""
    given = train_runs.config(base, data, tmp_path / "first", steps=2)
    first = train_runs.train(tmp_path / "c.json", given)
    # How it was initialised is of no consequence now, nor whether fastlora can do that.
    path = tmp_path / "first" / "b" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "eva"}))
    tables = {
        "more": {"data": str(data["b"]), "init_from": str(tmp_path / "first" / "b"), "lr": 1e-9},
        "new": {"data": str(data["c"]), "r": 1, "lr": 1e-9},
    }
    given |= {"out": str(tmp_path / "second"), "adapters": tables, "defaults": {}}
    second = train_runs.train(tmp_path / "c.json", given | {"epochs": 1, "max_length": 9})
    for key, tensor in first.items():
        if key.startswith("b:"):
            # Two steps of 1e-9: a value that Adam moves by as much as its rounding, or not at all.
            near = second[f"more:{key[2:]}"]
            assert (near - tensor).abs().max() <= 1e-8, key
    config = json.loads((tmp_path / "second" / "more" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True and config["r"] == 4
    assert {len(t) for k, t in second.items() if k.startswith("new:") and "lora_A" in k} == {1}


def test_dry_run(
    base: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Parameters, memory and fusion of what a run would make; no weight is read, no file made."""
    given = train_runs.config(base, data, tmp_path / "out", dtype="bfloat16")
    path = train_runs.write_config(tmp_path / "c.json", given)
    weights = (base / "model.safetensors").read_bytes()
    try:
        (base / "model.safetensors").unlink()
        assert cli.main(["train", str(path), "--dry-run", "--steps", "6"]) == 0
    finally:
        (base / "model.safetensors").write_bytes(weights)
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    model = fastlora.get_peft_model(
        tiny_llama().bfloat16(),
        fastlora.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    parameters, total = model.get_nb_trainable_parameters()
    assert f"{total - parameters:,} parameters, bfloat16" in text
    assert f"r 2, alpha 4, dropout 0.1; {parameters:,} parameters on 14 modules" in text
    assert "steps       6 of 4 samples, 2 per forward, 1 process" in text
    assert "a: 10 samples, 186 tokens (128 with loss)" in text
    assert "14 of 14 LoRA layers are eligible for the fused call, " in text
    assert f"base model {2 * (total - parameters) / 1024:.1f} KiB, 2 adapters with" in text
    assert str(fastlora.recommend(total - parameters)) in text
    longest = re.search(r"KiB \(weights, gradients, AdamW\), activations ([\d.]+) KiB \(2 s", text)
    assert longest is not None and float(longest[1]) > 100


def test_the_dry_run_counts_in_singular(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sample, one step, and one adapter are written without a plural."""
    (tmp_path / "one.jsonl").write_text('{"text": "hi"}\n')
    flags = ["--model", base, "--out", tmp_path / "out", "--data", f"a={tmp_path / 'one.jsonl'}"]
    assert cli.main(["train", *map(str, flags), "--steps", "1", "--cpu", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "\na: 1 sample, 3 tokens (2 with loss), 1 step\n" in text
    assert ", 1 adapter with " in text


def test_flags_alone(
    base: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No config file: two adapters of several files, all of one kind."""
    flags = ["--model", base, "--out", tmp_path / "out", "--steps", 2, "--batch-size", 4]
    flags += ["--data", f"x={data['a']}", "--data", f"x={data['b']}", "--data", f"y={data['c']}"]
    flags += ["--r", 3, "--targets", "q_proj,v_proj", "--lr", 1e-2, "--dropout", 0, "--rslora"]
    flags += ["--max-length", 16, "--eval-data", f"y={data['a']}", "--schedule", "constant"]
    assert cli.main(["train", *map(str, flags)]) == 0
    printed = capsys.readouterr()
    assert "training: 100%" in printed.err and "x " in printed.err  # the bar, with losses
    assert "y, mean loss " in printed.out and "evaluation loss" in printed.out
    found = train_runs.saved(tmp_path / "out")
    assert {key.split(".")[6] for key in found} == {"q_proj", "v_proj"}
    config = json.loads((tmp_path / "out" / "x" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.0)
    assert config["use_rslora"] is True
    assert log(tmp_path / "out")[-1]["next_lr"] == {"x": 1e-2, "y": 1e-2}


# ------------------------------------------------------------------------------------ config files


def test_toml_and_precedence(tmp_path: Path) -> None:
    """Defaults, then an adapter's table, then flags; paths lie beside the file."""
    pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    path = tmp_path / "c.toml"
    path.write_text(
        """
        model = "base"
        out = "/runs/x"
        steps = 3
        [defaults]
        alpha = 7
        lr = 1e-3
        [adapters.a]
        data = ["a.jsonl", "/data/b.jsonl"]
        lr = 2e-3
        rank_pattern = { "q_proj" = 4 }
        [adapters.b]
        data = "c.txt"
        init_from = "first"
        """
    )
    flags = {"steps": 5, "defaults": {"weight_decay": 0.5}, "data": {"c": ["d.txt"]}}
    settings = read_settings(path, flags)
    assert (settings.model, settings.out) == (tmp_path / "base", Path("/runs/x"))
    assert settings.steps == 5 and settings.batch_size == 8
    a, b, c = settings.adapters
    assert a.data == (tmp_path / "a.jsonl", Path("/data/b.jsonl"))
    assert (a.learning_rate, b.learning_rate, a.weight_decay) == (2e-3, 1e-3, 0.5)
    assert a.lora == {"rank_pattern": {"q_proj": 4}, "lora_alpha": 7}
    assert b.init_from == tmp_path / "first" and not b.lora  # has its own config
    assert c.data == (Path("d.txt"),) and c.lora == {"lora_alpha": 7}
    advice = fastlora.recommend(7_000_000_000)
    made = a.new_adapter_config(advice)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (32, 7, 0.1)
    assert made.rank_pattern == {"q_proj": 4} and made.target_modules == "all-linear"
    for flags, steps in (({"epochs": 2}, None), ({"epochs": 2, "steps": 5}, 5), ({}, 3)):
        settings = read_settings(path, flags)
        assert (settings.steps, settings.epochs) == (steps, flags.get("epochs", 1))


def test_alpha_follows_rank() -> None:
    """A rank of one's own keeps the advice's ratio, unless alpha is given too."""
    adapter = {"data": "d", "r": 24}
    given = {"model": "m", "out": "o", "adapters": {"a": adapter, "b": {**adapter, "alpha": 5}}}
    a, b = settings_from_dict(given, {}, "test").adapters
    advice = fastlora.recommend(1)
    assert (a.new_adapter_config(advice).lora_alpha, b.new_adapter_config(advice).lora_alpha) == (
        48,
        5,
    )
    with pytest.raises(ConfigError, match="'a': r must be a positive integer, got None"):
        AdapterSettings("a", (), lora={"r": None}).new_adapter_config(advice)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("cosine", [0.5, 1, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(5))]),
    ],
)
def test_rates(schedule: str, expected: list[float]) -> None:
    """Two of six steps warm up; behind the last one the rate is 0."""
    adapter = AdapterSettings("a", (), schedule=schedule, warmup_ratio=0.3)
    assert [learning_rate_lambda(adapter, 6)(step) for step in range(7)] == pytest.approx(expected)
    assert learning_rate_lambda(AdapterSettings("a", (), warmup_ratio=0.0), 1)(0) == 1.0
    assert learning_rate_lambda(AdapterSettings("a", (), warmup_ratio=1.0), 2)(1) == 1.0


# -------------------------------------------------------------------------------------------- data


def test_what_is_encoded(tmp_path: Path, tokenizer: Any) -> None:
    """Prompts have no loss; texts and completions end; plain text is cut into pieces."""
    pairs, texts, plain = tmp_path / "a.jsonl", tmp_path / "t.jsonl", tmp_path / "b.txt"
    pairs.write_text(json.dumps({"prompt": "ab", "completion": "cd"}))
    rows = [{"text": "wxyz"}, {"text": "w\u2028z"}]
    texts.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    plain.write_text("abcdefg")
    eos = tokenizer.eos_token_id
    corpus = tokenize_files([pairs, texts, plain], tokenizer, 4)

    def ids(text: str) -> list[int]:
        return tokenizer(text).input_ids

    expected = [ids("abcd"), ids("wxyz"), [*ids("w z"), eos], ids("abcd"), ids("efg")]
    assert [corpus.token_ids(i).tolist() for i in range(len(corpus))] == expected
    labels = [[-100, -100, *ids("cd")], *([-100, *own[1:]] for own in expected[1:])]
    assert [corpus.labels(i, -100).tolist() for i in range(len(corpus))] == labels
    assert [corpus.num_loss_tokens(i) for i in range(5)] == [2, 3, 3, 3, 2] and corpus.cut == 2
    places = [f"{pairs}, line 1", f"{texts}, line 1", f"{texts}, line 3", str(plain), str(plain)]
    assert list(map(str, corpus.sources)) == places
    # A last piece of one token has nothing to learn, a whole text of two has.
    assert len(tokenize_files([plain], tokenizer, 3)) == 2
    uncut = tokenize_files([pairs, texts], tokenizer, 9)
    assert uncut.token_ids(0).tolist() == [*ids("abcd"), eos] and uncut.cut == 0
    assert uncut.digest != corpus.digest


def test_a_byte_order_mark_is_no_text(base: Path, tmp_path: Path) -> None:
    """Neither of a config file nor of a chat template, whose text the tokenizer would encode."""
    (tmp_path / "t.jinja").write_text("\ufeffhello")
    config = {"model": str(base), "out": "o", "adapters": {"a": {"data": "d"}}}
    config["chat_template"] = "t.jinja"
    (tmp_path / "c.json").write_text("\ufeff" + json.dumps(config))
    found = load_tokenizer(read_settings(tmp_path / "c.json", {}))
    assert found.chat_template == "hello"


def test_batches(data: dict[str, Path], tokenizer: Any) -> None:
    """Padding has no label and is not attended to; counts are those of the loss."""
    corpora = {name: tokenize_files([data[name]], tokenizer, 24) for name in "abc"}
    rows = [SampleRef("a", 2), SampleRef("b", 1), SampleRef("c", 0), SampleRef("a", 0)]
    batch = collate_samples(rows, corpora, 96, torch.device("cpu"))
    assert batch.adapters == ["a", "b", "c", "a"]
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    for i, row in enumerate(rows):
        corpus = corpora[row.adapter]
        size = corpus.num_tokens(row.sample)
        assert ids[i, :size].equal(corpus.token_ids(row.sample)) and (ids[i, size:] == 96).all()
        assert mask[i].sum() == size and mask[i, :size].all()
        assert batch.labels[i, :size].equal(corpus.labels(row.sample, -100))
        assert (batch.labels[i, size:] == -100).all()
    counted = Counter[str]()
    for row in rows:
        counted[row.adapter] += corpora[row.adapter].num_loss_tokens(row.sample)
    assert count_tokens(batch.labels, batch.adapters) == counted
    parts = sorted_micro_batches(rows, corpora, 3)
    assert [len(part) for part in parts] == [3, 1] and sorted(sum(parts, [])) == sorted(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 40])
def test_order(batch_size: int) -> None:
    """Each sample once an epoch, in another order in each; any step at once; steps are counted."""
    sizes = {"a": 10, "b": 1, "c": 6}
    order, steps = SampleOrder(sizes, batch_size, seed=3), 60
    rows = [order.step_samples(step) for step in range(steps)]
    every = sum(rows, [])
    assert all(len(part) == batch_size for part in rows)
    epochs = [every[i : i + 17] for i in range(0, len(every) - 16, 17)]
    samples = [SampleRef(name, i) for name, size in sizes.items() for i in range(size)]
    assert all(sorted(epoch) == sorted(samples) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    again = SampleOrder(sizes, batch_size, seed=3)
    assert [again.step_samples(step) for step in (59, 7, 30)] == [
        rows[step] for step in (59, 7, 30)
    ]
    assert SampleOrder(sizes, batch_size, seed=4).step_samples(5) != rows[5]
    found = Counter[str]()
    for part in rows:
        found.update({row.adapter for row in part})
    assert order.count_steps_with_samples(steps) == found


def test_corpus_is_small() -> None:
    """Tokens lie in one tensor of 32 bits, not in lists."""
    counts = torch.tensor([False, True, False, False, True, True])
    corpus = TokenizedCorpus(torch.arange(6, dtype=torch.int32), counts, [2, 6], [], "")
    assert [corpus.num_loss_tokens(i) for i in (0, 1)] == [1, 2]
    assert corpus.token_ids(1).tolist() == [2, 3, 4, 5] and corpus.token_ids(1).dtype == torch.int64
