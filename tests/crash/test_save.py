"""`save_pretrained` over an adapter is killed at any of its file-system calls.

``make crash`` kills it 100 times, at random calls.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from fastlora.model.adapter_folder import AdapterContents, load_adapter_folder
from fastlora.model.hub import CARD_NAME
from tests.support import crash
from tests.support.tiny import randomize, two_layers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")

KILLS = int(os.environ.get("FASTLORA_CRASH_KILLS", "0"))
# Another rank, another alpha, and rsLoRA: mixed files fail to load, or load with a wrong scaling.
FIELDS: tuple[dict[str, Any], ...] = (
    {"r": 2, "lora_alpha": 4},
    {"r": 2, "lora_alpha": 16},
    {"r": 2, "lora_alpha": 4, "use_rslora": True},
    {"r": 3, "lora_alpha": 4},
)


class Saved(NamedTuple):
    """An adapter: how it is saved, and what its folder then holds."""

    save: Callable[[Path], None]
    config: bytes
    file: AdapterContents


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Saved]:
    found = []
    for number, fields in enumerate(FIELDS):
        config = fastlora.LoraConfig(target_modules=["q", "v"], **fields)
        model = fastlora.get_peft_model(two_layers(), config)
        randomize(model, number)
        folder = tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder)
        config_text = (folder / CONFIG_NAME).read_bytes()
        found.append(Saved(model.save_pretrained, config_text, load_adapter_folder(folder)))
    return found


def equal(found: AdapterContents, expected: AdapterContents) -> bool:
    """Whether two adapters are the same, bit for bit."""
    return (
        found.config == expected.config
        and [found.config.scaling_for(name) for name in "qv"]
        == [expected.config.scaling_for(name) for name in "qv"]
        and found.tensors.keys() == expected.tensors.keys()
        and all(torch.equal(found.tensors[key], t) for key, t in expected.tensors.items())
    )


def check(folder: Path, old: Saved, new: Saved, config_before: bytes) -> Saved:
    """Checks a folder after a kill, and returns which of two adapters it holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reader says that a save was cut off
        file = load_adapter_folder(folder)
        held = [saved for saved in (old, new) if equal(file, saved.file)]
        assert held, (file.config, old.file.config, new.file.config)
        assert fastlora.LoraConfig.from_pretrained(folder, for_loading=True) == file.config
    # What PEFT reads: whole files, and new weights beside the old config at worst.
    config = (folder / CONFIG_NAME).read_bytes()
    tensors = load_file(folder / WEIGHTS_NAME)
    assert config in (config_before, new.config)
    assert all(torch.equal(tensors[key], t) for key, t in held[0].file.tensors.items())
    if config != config_before:
        assert held[0] is new
    return held[0]


def finish(folder: Path, saved: Saved) -> None:
    """A save that nothing interrupts leaves its adapter, and nothing else."""
    saved.save(folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    assert json.loads((folder / CONFIG_NAME).read_text()) == json.loads(saved.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(load_adapter_folder(folder), saved.file)


@pytest.mark.parametrize("new", range(1, len(FIELDS)))
def test_kills_at_fixed_calls(adapters: list[Saved], new: int, tmp_path: Path) -> None:
    """R2: a save killed between its two renames leaves the whole old or the whole new adapter."""
    folder = tmp_path / "a"
    before, after = adapters[0], adapters[new]
    before.save(folder)
    after_save = partial(after.save, folder)
    calls = crash.changes(after_save, folder)
    first, second = (
        next(i for i, call in enumerate(calls, 1) if call.endswith(f" {name}"))
        for name in (WEIGHTS_NAME, CONFIG_NAME)
    )
    shutil.rmtree(folder)
    for at in (calls.index("middle .tmpCrash") + 1, first, second, second + 1):
        before.save(folder)
        crash.kill(after_save, folder, at, seed=at)
        held = check(folder, before, after, before.config)
        assert held is (before if at <= first else after), calls[at - 1]
    finish(folder, after)


@pytest.mark.skipif(not KILLS, reason="make crash")
def test_kills_at_random_calls(adapters: list[Saved], tmp_path: Path) -> None:
    """Kills follow each other, so saves also begin in what a killed save left."""
    folder = tmp_path / "a"
    choose = random.Random(KILLS)
    held = adapters[0]
    held.save(folder)
    for number in range(KILLS):
        new = choose.choice([saved for saved in adapters if saved is not held])
        save = partial(new.save, folder)
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        count = len(crash.changes(partial(new.save, copy), copy))
        shutil.rmtree(copy)
        config = (folder / CONFIG_NAME).read_bytes()
        crash.kill(save, folder, choose.randrange(count) + 1, seed=number)
        held = check(folder, held, new, config)
        if choose.random() < 0.2:
            held = choose.choice(adapters)
            finish(folder, held)
    finish(folder, adapters[0])
