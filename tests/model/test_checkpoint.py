"""Adapter folders against PEFT's own, and against files that lie."""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlora.model import atomic_files, tensor_file
from fastlora.model.adapter_folder import (
    WEIGHTS_NAME,
    inspect_adapter_folder,
    load_adapter_folder,
    save_adapter_folder,
)
from fastlora.model.config import CONFIG_NAME, LoraConfig
from fastlora.model.lora_model import get_peft_model
from fastlora.validation import AdapterStateError, CheckpointError
from tests.support.tiny import adapted, tiny, tiny_llama, two_layers

PRE = "base_model.model."


def factors(r: int = 2, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in names or ("q", "deep.q"):
        tensors[f"{PRE}{name}.lora_A.weight"] = torch.randn(r, 4).to(dtype)
        tensors[f"{PRE}{name}.lora_B.weight"] = torch.randn(6, r).to(dtype)
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter_folder(tmp_path / "a", LoraConfig(r=2, target_modules=["q"]), factors())
    return tmp_path / "a"


def error_message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_adapter_folder(folder)
    message = str(caught.value)
    assert str(folder) in message
    with pytest.raises(CheckpointError):
        inspect_adapter_folder(folder)
    return message


def test_saved_embeddings_of_a_transformers_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(tiny("LlamaForCausalLM"), config).save_pretrained(tmp_path)
    kinds = {
        key.removeprefix(PRE): parts.kind
        for key, parts in load_adapter_folder(tmp_path).keys.items()
    }
    assert kinds == {
        "model.layers.0.self_attn.q_proj.lora_A.weight": "lora_A",
        "model.layers.0.self_attn.q_proj.lora_B.weight": "lora_B",
        "model.embed_tokens.lora_embedding_A": "lora_embedding_A",
        "model.embed_tokens.lora_embedding_B": "lora_embedding_B",
        "model.embed_tokens.base_layer.weight": "base",
        "lm_head.weight": "saved",
    }


def test_base_tensors_are_saved_as_before_a_merge(tmp_path: Path) -> None:
    """Of a head and an embedding, of trained rows, and of biases with a merged lora_bias."""
    head = {"target_modules": ["lm_head", "embed_tokens"]}
    bias = {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True}
    rows = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    for config in (head, bias, rows):
        base = functools.partial(tiny_llama, tie_word_embeddings=False)
        model = adapted(base=base(), **config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "lora_embedding" in name or "trainable_" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / "before", save_embedding_layers=config is not bias)
        model.merge_adapter()
        model.save_pretrained(tmp_path / "merged", save_embedding_layers=config is not bias)
        before, merged = (
            load_file(tmp_path / folder / "adapter_model.safetensors")
            for folder in ("before", "merged")
        )
        torch.testing.assert_close(merged, before, rtol=0, atol=0)
        if config is rows:
            continue  # the rows are always kept
        model.unmerge_adapter()
        model.merge_adapter(keep_base=False)
        with pytest.raises(AdapterStateError, match="before the merge was not kept; call unmerge"):
            model.save_pretrained(tmp_path / "neither")
        assert not (tmp_path / "neither").exists()


def test_saving_without_an_active_adapter_or_without_values(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(two_layers(), config)
    model.set_adapter([])
    model.save_pretrained(tmp_path / "inactive")
    assert load_adapter_folder(tmp_path / "inactive").config.r == 2
    model.add_adapter("late", config, low_cpu_mem_usage=True)
    model.set_adapter("late")
    for refused in (
        lambda: model.save_pretrained(tmp_path / "late"),
        model.merge_adapter,
        lambda: model.merge_adapter(["default", "late"]),
        model.merge_and_unload,
    ):
        with pytest.raises(AdapterStateError, match="'late' is on the meta device"):
            refused()
    assert not (tmp_path / "late").exists()
    assert not model.base_model.model.q.merged


def test_magnitudes_of_a_file_need_the_field(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(two_layers(), peft.LoraConfig(target_modules=["v"], use_dora=True))
    model.save_pretrained(tmp_path)
    magnitude = next(k for k in load_adapter_folder(tmp_path).tensors if "magnitude" in k)
    assert inspect_adapter_folder(tmp_path).keys[magnitude].kind == "magnitude"
    data = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**data, "use_dora": False}))
    assert "the config has use_dora=False" in error_message(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_and_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = factors(2, dtype=dtype)
    tensors[f"{PRE}q.lora_A.weight"][0, 0] = float("nan")  # a value, not an error
    shared = tensors[f"{PRE}deep.q.lora_B.weight"]
    tensors[f"{PRE}q.lora_B.weight"] = shared  # aliased
    tensors[f"{PRE}deep.q.lora_A.weight"] = torch.randn(4, 2).to(dtype).t()  # not contiguous
    config = LoraConfig(r=2, target_modules=["q"])
    save_adapter_folder(tmp_path, config, tensors)
    file = load_adapter_folder(tmp_path)
    assert list(file.tensors) == list(file.keys)
    for key, tensor in tensors.items():
        assert file.tensors[key].dtype == dtype
        assert torch.equal(file.tensors[key].nan_to_num(7.0), tensor.nan_to_num(7.0))
    file.tensors[f"{PRE}q.lora_B.weight"].zero_()  # memory of its own: neither file nor neighbor
    again = load_adapter_folder(tmp_path)
    assert torch.equal(again.tensors[f"{PRE}q.lora_B.weight"], shared)
    assert torch.equal(file.tensors[f"{PRE}deep.q.lora_B.weight"], shared)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as opened:  # as PEFT's
        assert opened.metadata()["format"] == "pt"
    assert config.inference_mode is False and file.config.inference_mode is True


def test_inspect_reads_no_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file.SafetensorsFile, "read", None)
    header = inspect_adapter_folder(folder)
    assert {k.module for k in header.keys.values()} == {"deep.q", "q"}
    info = header.tensor_infos[f"{PRE}q.lora_B.weight"]
    assert (info.shape, info.dtype, info.nbytes) == ((6, 2), torch.float32, 48)


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (atomic_files.os, "fsync", OSError),
        (atomic_files.os, "replace", OSError),
        (tensor_file, "save_file", CheckpointError),  # could not be written
    ],
)
def test_failed_save_leaves_the_old_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: type
) -> None:
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def fail(*given: object, **_: object) -> None:
        if name == "save_file":
            Path(str(given[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, name, fail)
    with pytest.raises(error, match="No space left"):
        save_adapter_folder(folder, LoraConfig(r=3, target_modules=["q"]), factors(3))
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_nothing_inconsistent_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"shape \(2, 4\).*expected rank 3"):
        save_adapter_folder(tmp_path / "a", LoraConfig(r=3, target_modules=["q"]), factors(2))
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder, found a file"):
        save_adapter_folder(tmp_path / "file", LoraConfig(r=2, target_modules=["q"]), factors(2))


def test_missing_things_say_what_to_do(tmp_path: Path, folder: Path) -> None:
    assert "snapshot_download" in error_message(Path("some-org/some-adapter"))
    assert "found a file" in error_message(folder / WEIGHTS_NAME)
    assert f"has no {CONFIG_NAME} and no {WEIGHTS_NAME}; its subfolders a" in (
        error_message(tmp_path)
    )
    (folder / WEIGHTS_NAME).unlink()
    assert f"has no {WEIGHTS_NAME}" in error_message(folder)
    torch.save({}, folder / "adapter_model.bin")
    message = error_message(folder)
    assert "pickle" in message and "torch.load(bin_path, weights_only=True)" in message


def test_the_advised_conversion_of_a_pickle_works(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    bin_path, safetensors_path = folder / "adapter_model.bin", folder / WEIGHTS_NAME
    torch.save(tensors, bin_path)
    safetensors_path.unlink()
    save_file(torch.load(bin_path, weights_only=True), safetensors_path, metadata={"format": "pt"})
    assert set(load_adapter_folder(folder).tensors) == set(tensors)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"peft_type": "LOHA", "r": 2}', "peft_type must be 'LORA', got 'LOHA'"),
        ('{"peft_type": null, "r": 2}', "peft_type is None; expected 'LORA'"),
        ('{"peft_type": "LORA", "r": 0}', "r must be a positive integer"),
        ('{"r": 2, "target_modules": ["q"], "lora_alpha": NaN}', "lora_alpha"),
        ('{"r": 2, "use_dora": true, "lora_bias": true}', "not supported for DoRA"),
        ('{"r": 2, "init_lora_weights": "pizza"}', "init_lora_weights must be one of"),
    ],
)
def test_bad_config_file(folder: Path, text: str, words: str) -> None:
    (folder / CONFIG_NAME).write_text(text)
    message = error_message(folder)
    assert words in message and CONFIG_NAME in message


A, B = f"{PRE}q.lora_A.weight", f"{PRE}q.lora_B.weight"


@pytest.mark.parametrize(
    ("fields", "change", "words"),
    [
        ({}, {A: None}, f"found {B!r}, but no lora_A for 'q'; expected both"),
        ({}, {B: None}, f"found {A!r}, but no lora_B for 'q'; expected both"),
        (
            {},
            {A: (3, 4)},
            f"{A!r} has shape (3, 4) (rank, in) and therefore rank 3; expected rank 2",
        ),
        (
            {},
            {B: (6, 3)},
            f"{B!r} has shape (6, 3) (out, rank) and therefore rank 3; expected rank 2",
        ),
        ({}, {A: (8,)}, f"{A!r} has shape (8,), expected 2 to 5 dimensions"),
        ({}, {A: (3, 4, 3, 3)}, "and therefore rank 3; expected rank 2"),
        ({"r": 4}, {}, "expected rank 4"),
        (
            {"rank_pattern": {"deep.q": 1}},
            {},
            "as set for 'deep.q' by r and rank_pattern in the config",
        ),
        ({"lora_bias": True}, {}, "'deep.q' has no lora_B.bias"),
        (
            {"lora_bias": True},
            {f"{PRE}q.lora_B.bias": (5,), f"{PRE}deep.q.lora_B.bias": (6,)},
            "(5,)",
        ),
        ({}, {f"{PRE}q.lora_B.bias": (6,)}, "lora_bias=False"),
        ({}, {f"{PRE}q.base_layer.bias": (6,)}, f"unknown key '{PRE}q.base_layer.bias'"),
        ({}, {f"{PRE}other.weight": (6,)}, f"unknown key '{PRE}other.weight'"),
        ({"modules_to_save": ["head"]}, {f"{PRE}heads.weight": (6,)}, "unknown key"),
        ({}, {"q.lora_A.weight": (2, 4)}, f"expected a key that starts with {PRE!r}"),
        ({}, {f"{PRE}mha.lora_A": (2, 4)}, "unknown key"),
        ({}, {f"{PRE}q.lora_magnitude_vector": (6,)}, "the config has use_dora=False"),
        ({"use_dora": True}, {f"{PRE}q.lora_magnitude_vector": (6,)}, "has no lora_magnitude"),
        (
            {"use_dora": True},
            {f"{PRE}q.lora_magnitude_vector": (5,), f"{PRE}deep.q.lora_magnitude_vector": (6,)},
            "has shape (5,), expected (6,)",
        ),
        (
            {"use_dora": True},
            {f"{PRE}{m}.lora_magnitude_vector": (6,) for m in ("q", "deep.q", "v")},
            "but LoRA factors for 'v' are missing; expected both factors",
        ),
        ({}, {f"{PRE}e.token_adapter.trainable_tokens_delta": (6, 1)}, "trainable_token_indices"),
        ({}, {f"{PRE}e.lora_embedding_A": (2, 7)}, "but no lora_embedding_B for 'e'; expected"),
    ],
)
def test_tensors_that_contradict(
    folder: Path,
    fields: dict[str, object],
    change: dict[str, tuple[int, ...] | None],
    words: str,
) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    for key, shape in change.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = torch.zeros(shape)
    save_file(tensors, folder / WEIGHTS_NAME)
    LoraConfig(**{"r": 2, "target_modules": ["q"], **fields}).save_pretrained(folder)
    assert words in error_message(folder)


def test_integer_factors_and_empty_files(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({**tensors, A: torch.zeros(2, 4, dtype=torch.int32)}, folder / WEIGHTS_NAME)
    assert "dtype torch.int32" in error_message(folder)
    biases = {f"{PRE}{m}.lora_B.bias": torch.zeros(6) for m in ("q", "deep.q")}
    LoraConfig(r=2, target_modules=["q"], lora_bias=True).save_pretrained(folder)
    save_file({**tensors, **biases}, folder / WEIGHTS_NAME)
    load_adapter_folder(folder)
    wrong = f"{PRE}q.lora_B.bias"
    save_file({**tensors, **biases, wrong: torch.zeros(6).int()}, folder / WEIGHTS_NAME)
    assert f"{wrong!r} has dtype torch.int32" in error_message(folder)
    save_file({}, folder / WEIGHTS_NAME)
    assert "contains no LoRA factors" in error_message(folder)


def test_unknown_config_keys_are_named_once(folder: Path) -> None:
    data = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**data, "new_field": 1, "other_new": 2}))
    with pytest.warns(UserWarning) as caught:
        load_adapter_folder(folder)
    assert [("new_field" in str(w.message), "other_new" in str(w.message)) for w in caught] == [
        (True, True)
    ]
