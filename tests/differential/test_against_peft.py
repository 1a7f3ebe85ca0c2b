"""Random scripts of operations, on fastlora and on PEFT: everything that can be seen agrees.

`make fuzz` runs every seed. CI runs a part of them, drawn by the hash of the commit. To replay
seeds, name them: ``FASTLORA_FUZZ_SEEDS=17,203 python -m pytest tests/differential``.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the models are its")

from fastlora.model import inject
from fastlora.model.tuner import LoraTuner
from fastlora.validation import ConfigError
from tests.support.differential.exemptions import EXEMPTIONS, Exemption
from tests.support.differential.oracle import Disagreement, run, run_seed
from tests.support.drawn import commit

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = 300
IN_CI = 60


def _seeds() -> list[int]:
    """The seeds to run: those that are named, or a part of all that the commit draws."""
    named = os.environ.get("FASTLORA_FUZZ_SEEDS", "")
    if named == "all":
        return list(range(ALL))
    if named:
        return [int(seed) for seed in named.split(",")]
    return sorted(random.Random(commit()).sample(range(ALL), IN_CI))


@pytest.mark.parametrize("seed", _seeds())
def test_a_script_does_what_it_does_in_peft(seed: int) -> None:
    run_seed(seed)


@pytest.mark.parametrize("exemption", EXEMPTIONS, ids=lambda exemption: exemption.title[:40])
def test_exemptions_are_documented_differences(exemption: Exemption) -> None:
    """The title is in docs/differences.md, and PEFT does differ there."""
    text = " ".join((ROOT / "docs" / "differences.md").read_text(encoding="utf-8").split())
    assert exemption.title in text
    assert run(exemption.witness) == [exemption.title]


def _train_idle_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: base biases train whichever adapter is active."""

    def with_biases(method: Callable[..., None]) -> Callable[..., None]:
        def planted(self: LoraTuner, *args: Any, **kwargs: Any) -> None:
            method(self, *args, **kwargs)
            for name, config in self.peft_config.items():
                for bias in inject.base_biases_trained_by(self.model, name, config.bias).values():
                    bias.requires_grad_(True)

        return planted

    for name in ("add_adapter", "set_adapter"):
        monkeypatch.setattr(LoraTuner, name, with_biases(getattr(LoraTuner, name)))


def _unmerge_before_unload(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: `unload` returns the base model after `merge_adapter`."""
    unload = LoraTuner.unload

    def planted(self: LoraTuner, **options: Any) -> Any:
        self.unmerge_adapter()
        return unload(self, **options)

    monkeypatch.setattr(LoraTuner, "unload", planted)


def _raise_for_repeated_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: `add_weighted_adapter` refuses a name that is given twice."""
    add = LoraTuner.add_weighted_adapter

    def planted(self: LoraTuner, adapters: list[str], *args: Any, **options: Any) -> None:
        if len(set(adapters)) < len(adapters):
            raise ConfigError(f"{len(set(adapters))} different adapters, got {adapters}")
        add(self, adapters, *args, **options)

    monkeypatch.setattr(LoraTuner, "add_weighted_adapter", planted)


def _plant_bias(monkeypatch: pytest.MonkeyPatch, instead: dict[str, str]) -> None:
    """Reads values of ``bias`` as others."""

    def planted(self: LoraTuner, name: str) -> list[nn.Parameter]:
        bias = self.peft_config[name].bias
        return list(
            inject.base_biases_trained_by(self.model, name, instead.get(bias, bias)).values()
        )

    monkeypatch.setattr(LoraTuner, "_selected_base_biases", planted)


def _train_no_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant_bias(monkeypatch, {"all": "none", "lora_only": "none"})


def _train_biases_of_targets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant_bias(monkeypatch, {"all": "lora_only"})


def _train_biases_of_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant_bias(monkeypatch, {"lora_only": "all"})


def _act_where_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged adapters act within `disable_adapter` too."""
    disable = LoraTuner.disable_adapter

    @contextlib.contextmanager
    def planted(self: LoraTuner) -> Iterator[None]:
        layers = [layer for layer in inject.lora_layers(self.model).values() if layer.merged]
        weights = [layer.get_base_layer().weight for layer in layers]
        merged = [weight.detach().clone() for weight in weights]
        with disable(self):
            unmerged = [weight.detach().clone() for weight in weights]
            _write(weights, merged)
            yield
            _write(weights, unmerged)

    monkeypatch.setattr(LoraTuner, "disable_adapter", planted)


@torch.no_grad()
def _write(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


PLANTED = {
    _train_idle_biases: (4, 26),
    _unmerge_before_unload: (12, 55),
    _raise_for_repeated_names: (168, 173),
    _train_no_biases: (8, 24),
    _train_biases_of_targets_alone: (13, 44),
    _train_biases_of_all_modules: (8, 24),
    _act_where_disabled: (38, 39),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_faults_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for seed in PLANTED[plant]:
        with pytest.raises(Disagreement, match=f"FASTLORA_FUZZ_SEEDS={seed} "):
            run_seed(seed)
