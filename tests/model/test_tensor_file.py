"""Safetensors files that lie: about their length, their shapes, their places."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from fastlora.model.adapter_folder import (
    WEIGHTS_NAME,
    inspect_adapter_folder,
    load_adapter_folder,
    open_adapter_folder,
    save_adapter_folder,
)
from fastlora.model.config import LoraConfig
from fastlora.validation import CheckpointError


def save(folder: Path, r: int) -> Path:
    tensors = {
        "base_model.model.q.lora_A.weight": torch.randn(r, 4),
        "base_model.model.q.lora_B.weight": torch.randn(6, r),
    }
    save_adapter_folder(folder, LoraConfig(r=r, target_modules=["q"]), tensors)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "a", 2)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def error_message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_adapter_folder(folder)
    assert str(folder / WEIGHTS_NAME) in str(caught.value)
    with pytest.raises(CheckpointError):
        inspect_adapter_folder(folder)
    return str(caught.value)


GOOD = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"[1, 2]", b"", "expected a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "the key 'a' appears more than once"),
        (b"[" * 100_000, b"", "not valid JSON"),
        ({"a": 3}, b"", "'a' has the header entry 3; expected a"),
        ({"a": {**GOOD, "dtype": "C64"}}, bytes(32), "'C64'; expected one of"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, bytes(32), "expected one of"),
        ({"a": {**GOOD, "shape": [2, -4]}}, bytes(32), "shape [2, -4]"),
        ({"a": {**GOOD, "shape": [2, 4.0]}}, bytes(32), "shape [2, 4.0]"),
        ({"a": {**GOOD, "shape": [2, True]}}, bytes(32), "shape [2, True]"),
        ({"a": {**GOOD, "shape": [0, 4]}}, bytes(32), "of shape (0, 4) has no elements"),
        ({"a": {**GOOD, "shape": [1 << 40, 1 << 40]}}, bytes(32), "needs"),
        ({"a": {**GOOD, "shape": [2, 5]}}, bytes(32), "needs 40 bytes"),
        ({"a": {**GOOD, "data_offsets": [32, 0]}}, bytes(32), "data_offsets [32, 0]"),
        ({"a": {**GOOD, "data_offsets": [0]}}, bytes(32), "data_offsets [0]"),
        ({"a": {**GOOD, "data_offsets": [-32, 0]}}, bytes(32), "data_offsets [-32, 0]"),
        ({"a": {**GOOD, "data_offsets": [64, 96]}}, bytes(96), "leaves a gap"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [16, 48]}}, bytes(48), "overlaps"),
        ({"a": GOOD}, bytes(31), "truncated: tensor 'a' ends at byte"),
        ({"a": GOOD}, bytes(40), "but the file ends at"),
    ],
)
def test_hostile_header(folder: Path, header: object, data: bytes, words: str) -> None:
    raw_file(folder / WEIGHTS_NAME, header, data)
    assert words in error_message(folder)


def test_header_length_is_not_believed(folder: Path) -> None:
    raw_file(folder / WEIGHTS_NAME, {}, length=1 << 62)
    assert f"declares a header of {1 << 62} bytes" in error_message(folder)
    with (folder / WEIGHTS_NAME).open("r+b") as file:
        file.write(struct.pack("<Q", 64 << 20))
        file.truncate(100 << 20)  # a hole: costs no disk
    assert "expected at most" in error_message(folder)
    raw_file(folder / WEIGHTS_NAME, {}, length=1000)
    assert (
        "truncated: the file declares a header of 1000 bytes, but only 2 follow"
        in error_message(folder)
    )
    (folder / WEIGHTS_NAME).write_bytes(b"1234")
    assert "found 4 bytes" in error_message(folder)


def test_every_truncation_raises(folder: Path) -> None:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    for size in range(len(whole)):
        (folder / WEIGHTS_NAME).write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            load_adapter_folder(folder)
    (folder / WEIGHTS_NAME).write_bytes(whole)
    load_adapter_folder(folder)


def test_file_swapped_between_check_and_read(folder: Path) -> None:
    """The header and the tensors come from one descriptor: a new file changes nothing."""
    before = load_adapter_folder(folder)
    with open_adapter_folder(folder) as opened:
        assert opened.header.tensor_infos
        save(folder, 3)
        after = opened.load()
    assert after.config == before.config
    assert all(torch.equal(before.tensors[key], value) for key, value in after.tensors.items())


def test_file_written_over_between_check_and_read(folder: Path) -> None:
    with open_adapter_folder(folder) as opened:
        assert opened.header.tensor_infos
        with (folder / WEIGHTS_NAME).open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"1234")
        os.utime(folder / WEIGHTS_NAME, ns=(1, 1))  # the clock of a file system is coarse
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            opened.load()
