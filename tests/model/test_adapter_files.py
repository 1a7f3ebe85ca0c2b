"""Which config belongs to an adapter's weights, and which files are read at all."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.model import adapter_files
from fastlora.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME, open_regular_file
from fastlora.model.adapter_folder import (
    AdapterContents,
    inspect_adapter_folder,
    load_adapter_folder,
    open_adapter_folder,
    save_adapter_folder,
)
from fastlora.model.config import LoraConfig
from fastlora.validation import CheckpointError, ConfigError
from tests.support import crash
from tests.support.tiny import randomize, two_layers


def save(folder: Path, r: int = 2, alpha: int = 8) -> AdapterContents:
    """Saves an adapter with its alpha as every value."""
    tensors = {
        "base_model.model.q.lora_A.weight": torch.full((r, 16), float(alpha)),
        "base_model.model.q.lora_B.weight": torch.full((24, r), float(alpha)),
    }
    save_adapter_folder(folder, LoraConfig(r=r, lora_alpha=alpha, target_modules=["q"]), tensors)
    return load_adapter_folder(folder)


def alpha_of(folder: Path) -> int:
    """The alpha of the adapter that a reader finds, which the weights must agree with."""
    file = load_adapter_folder(folder)
    values = {value for tensor in file.tensors.values() for value in tensor.unique().tolist()}
    assert values == {file.config.lora_alpha}
    return int(file.config.lora_alpha)


@pytest.fixture
def cut_off(tmp_path: Path) -> Path:
    """The new weights beside the old config, as a save killed between the renames leaves them."""
    folder = tmp_path / "cut"
    save(folder, alpha=8)
    old = (folder / CONFIG_NAME).read_bytes()
    save(folder, alpha=16)
    (folder / CONFIG_NAME).write_bytes(old)
    return folder


def test_a_save_that_was_cut_off(cut_off: Path, tmp_path: Path) -> None:
    """R2: new weights never meet the old scaling, and the reader writes nothing; nor in a copy."""
    copy = shutil.copytree(cut_off, tmp_path / "copy")
    for folder in (cut_off, copy):
        with pytest.warns(UserWarning, match="a save was interrupted"):
            assert alpha_of(folder) == 16
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert inspect_adapter_folder(folder).config.lora_alpha == 16
            assert LoraConfig.from_pretrained(folder).lora_alpha == 16
            model = fastlora.LoraModel.from_pretrained(two_layers(), folder)
            assert model.peft_config["default"].lora_alpha == 16
        assert LoraConfig.from_json_file(folder / CONFIG_NAME)["lora_alpha"] == 8  # the file's own
    if sys.platform == "linux":
        assert crash.changes(lambda: load_adapter_folder(cut_off), cut_off) == []
    save(cut_off, alpha=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alpha_of(cut_off) == 32


def test_an_edited_config_counts(tmp_path: Path, cut_off: Path) -> None:
    """A person or another tool that changes the config file is believed."""
    save(tmp_path / "a")
    for folder in (tmp_path / "a", cut_off):
        path = folder / CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 2}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_adapter_folder(folder).config.lora_alpha == 2
            assert LoraConfig.from_pretrained(folder).lora_alpha == 2
    LoraConfig(r=2, lora_alpha=3, target_modules=["q"]).save_pretrained(tmp_path / "a")
    assert load_adapter_folder(tmp_path / "a").config.lora_alpha == 3


def test_the_config_that_was_replaced_can_be_saved_again(tmp_path: Path) -> None:
    """A config that is saved alone counts, also the one that the last save replaced."""
    wanted = LoraConfig(r=2, lora_alpha=8, target_modules=["q"])
    save(tmp_path, alpha=16)
    wanted.save_pretrained(tmp_path)
    for _ in range(2):
        save(tmp_path, alpha=16)
        wanted.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_adapter_folder(tmp_path).config.lora_alpha == 8


def test_weights_of_other_tools(tmp_path: Path) -> None:
    """With no metadata, or with other or too long metadata, the config file counts."""
    save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    digest = "0" * 64
    for metadata in (
        None,
        {"format": "pt", "fastlora.replaces": digest},
        {"fastlora.config": "[", "fastlora.replaces": digest},
        {"fastlora.config": " " * (adapter_files.MAX_CONFIG_BYTES + 1)},
    ):
        save_file(tensors, tmp_path / WEIGHTS_NAME, metadata=metadata)
        assert alpha_of(tmp_path) == 8


def test_peft_reads_and_writes_the_same_folder(tmp_path: Path) -> None:
    """R2: keys, tensors and config stay PEFT's bit for bit; PEFT's saves and ours alternate."""
    peft = pytest.importorskip("peft")
    config: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q", "v"]}
    theirs = peft.get_peft_model(two_layers(), peft.LoraConfig(**config))
    randomize(theirs, 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastlora.LoraModel.from_pretrained(two_layers(), tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [tmp_path / name / WEIGHTS_NAME for name in ("theirs", "ours")]
    with safe_open(files[0], "pt") as first, safe_open(files[1], "pt") as second:
        assert list(first.keys()) == list(second.keys())
        for key in first.keys():  # noqa: SIM118  # not a mapping
            left, right = first.get_tensor(key), second.get_tensor(key)
            assert left.dtype == right.dtype and torch.equal(left, right)
        assert {**second.metadata(), "fastlora.config": ""} == {
            "format": "pt",
            "fastlora.config": "",
        }
    folder = tmp_path / "theirs"
    for alpha in (16, 32):
        save(folder, alpha=alpha)
        read = peft.PeftModel.from_pretrained(two_layers(), folder)
        assert read.peft_config["default"].lora_alpha == alpha
        theirs.save_pretrained(folder)
        assert load_adapter_folder(folder).config.lora_alpha == 8
        assert torch.equal(load_file(folder / WEIGHTS_NAME)[key], left)


def test_equal_adapters_give_equal_files(tmp_path: Path) -> None:
    """Metadata have an order (safetensors writes a random one), and no history of equal saves."""
    save(tmp_path / "a")
    first = (tmp_path / "a" / WEIGHTS_NAME).read_bytes()
    for _ in range(8):
        save(tmp_path / "a")
        assert (tmp_path / "a" / WEIGHTS_NAME).read_bytes() == first
    save(tmp_path / "b", alpha=32)
    save(tmp_path / "b")
    text = (tmp_path / "b" / WEIGHTS_NAME).read_bytes()
    for _ in range(8):
        save(tmp_path / "b", alpha=32)
        save(tmp_path / "b")
        assert (tmp_path / "b" / WEIGHTS_NAME).read_bytes() == text


def test_simultaneous_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: a save that comes between the two renames of another waits."""
    save(tmp_path, alpha=8)
    real = os.replace
    second = threading.Thread(target=lambda: save(tmp_path, r=3, alpha=32))

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == WEIGHTS_NAME and not second.ident:
            second.start()
            second.join(0.3)
            assert second.is_alive()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert alpha_of(tmp_path) == 16

    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, alpha=16)
    second.join()
    assert alpha_of(tmp_path) == 32


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_simultaneous_processes(tmp_path: Path) -> None:
    """R2: beside processes that save into one folder, a reader always finds a whole adapter."""
    save(tmp_path, alpha=1)
    children = []
    for number in range(2, 5):
        child = os.fork()
        if not child:
            try:
                for _ in range(10):
                    save(tmp_path, r=number, alpha=number)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    seen, running = set(), set(children)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while running:
            seen.add(alpha_of(tmp_path))
            for child in set(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    assert status == 0
                    running.remove(child)
    assert len(seen) > 1
    assert alpha_of(tmp_path) in range(2, 5)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}


def test_both_files_replaced_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2: the config was read before two saves, and the weights after them: it is read again."""
    save(tmp_path, alpha=8)
    real = adapter_files.open_regular_file
    left = [2]

    def opened(path: Path, root: Path | None = None) -> Any:
        if path.name == WEIGHTS_NAME and left[0]:
            left[0] -= 1
            monkeypatch.setattr(adapter_files, "open_regular_file", real)
            save(tmp_path, alpha=16 + left[0])
            save(tmp_path, r=3, alpha=32 + left[0])
            monkeypatch.setattr(adapter_files, "open_regular_file", opened)
        return real(path, root)

    monkeypatch.setattr(adapter_files, "open_regular_file", opened)
    assert alpha_of(tmp_path) == 32
    left[0] = 1_000
    with pytest.raises(CheckpointError, match="kept changing"):
        alpha_of(tmp_path)


# ------------------------------------------------------------------------- links and odd files


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder of adapters, and one outside of it with a secret."""
    save(tmp_path / "root" / "a", alpha=8)
    save(tmp_path / "root" / "b", alpha=16)
    save(tmp_path / "outside", alpha=32)
    (tmp_path / "outside" / "secret.json").write_text('{"r": "hunter2"}')
    return tmp_path / "root"


def read_within(folder: Path, root: Path) -> int:
    with open_adapter_folder(folder, root) as opened:
        return int(opened.load().config.lora_alpha)


def relink(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_links_out_of_the_root(served: Path, name: str) -> None:
    """E6: a link out of the root is not read; without a root, links are followed."""
    folder = served / "a"
    target = {CONFIG_NAME: "secret.json", WEIGHTS_NAME: WEIGHTS_NAME}[name]
    for link in (served.parent / "outside" / target, Path("../../outside") / target):
        relink(folder / name, link)
        with pytest.raises(
            CheckpointError,
            match=f"{name}: this path points to a file outside the folder of adapters",
        ) as caught:
            read_within(folder, served)
        assert "hunter2" not in str(caught.value)
    relink(folder / name, served.parent / "outside" / name)
    with pytest.raises(CheckpointError, match="points to a file outside the folder of adapters"):
        read_within(folder, served)
    assert load_adapter_folder(folder)


def test_links_inside_the_root(served: Path, tmp_path: Path) -> None:
    """E6: links inside the folder stay allowed, and the folder may be a link itself."""
    relink(served / "a" / CONFIG_NAME, Path("../b") / CONFIG_NAME)
    relink(served / "a" / WEIGHTS_NAME, (served / "b" / WEIGHTS_NAME).absolute())
    (served / "c").symlink_to("b")
    (tmp_path / "link").symlink_to(served)
    for root in (served, tmp_path / "link"):
        assert read_within(root / "a", root) == 16
        assert read_within(root / "c", root) == 16
        with pytest.raises(
            CheckpointError, match="points to a file outside the folder of adapters"
        ):
            read_within(tmp_path / "outside", root)
    (served / "d").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="points to a file outside the folder of adapters"):
        read_within(served / "d", served)
    relink(served / "a" / CONFIG_NAME, served / "a" / CONFIG_NAME)  # a circle
    with pytest.raises(CheckpointError, match="replaced with a symbolic link"):
        read_within(served / "a", served)


@pytest.mark.parametrize("swapped", ["a", f"a/{WEIGHTS_NAME}"])
def test_a_link_that_appears_after_the_check(
    served: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E6: a file or a folder that becomes a link behind the resolved path is not followed."""
    real = os.path.realpath

    def swap(path: Any, **options: Any) -> str:
        found = real(path, **options)
        if Path(path).name == WEIGHTS_NAME:
            (served / swapped).rename(served.parent / "moved")
            (served / swapped).symlink_to(served.parent / "outside" / Path(swapped).name)
        return found

    (served.parent / "outside" / "a").symlink_to(served.parent / "outside")
    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises(
        CheckpointError, match="replaced with a symbolic link while it was being opened"
    ):
        read_within(served / "a", served)


@pytest.mark.skipif(sys.platform == "win32", reason="has no FIFOs")
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_files_that_are_not_regular(served: Path, name: str) -> None:
    """E6: a FIFO, a socket, a device and a folder are refused at once, with and without a root."""
    path = served / "a" / name

    def raise_error() -> None:
        for root in (served, None):
            with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
                open_adapter_folder(served / "a", root).__enter__()
            with pytest.raises(CheckpointError, match="not a regular file"):
                open_regular_file(path, root)

    path.unlink()
    os.mkfifo(path)
    raise_error()
    path.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            bound.bind(name)
        finally:
            os.chdir(here)
        raise_error()
    path.unlink()
    path.mkdir()
    raise_error()
    path.rmdir()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_adapter_folder(served / "a")


def test_a_config_of_a_gigabyte_is_not_read(served: Path) -> None:
    """E6: the size of a config is bounded, and nothing longer is written."""
    with (served / "a" / CONFIG_NAME).open("wb") as file:
        file.truncate(1 << 30)  # a hole: costs no disk
    with pytest.raises(CheckpointError, match="1073741824 bytes long, expected at most 4194304"):
        read_within(served / "a", served)
    config = LoraConfig(r=2, target_modules=["q", "x" * adapter_files.MAX_CONFIG_BYTES])
    tensors = load_adapter_folder(served / "b").tensors
    with pytest.raises(ConfigError, match="expected at most 4194304"):
        save_adapter_folder(served / "b", config, tensors)
    assert alpha_of(served / "b") == 16
