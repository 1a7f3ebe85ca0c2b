"""One side of the differential test: a library's model, and the operations of a script on it."""

from __future__ import annotations

import copy
import dataclasses
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from tests.support.differential.bases import fresh, inputs_of
from tests.support.differential.scripts import Operation, Script

peft = pytest.importorskip("peft", reason="compares with PEFT")

LAYERS = (peft.tuners.lora.LoraLayer, fastlora.layers.LoraLayer)
Values = dict[str, "torch.Tensor | None"]
RATE = 0.05  # of the steps


class Observation(NamedTuple):
    """What is compared: facts for equality, values within their budget."""

    facts: dict[str, Any]
    values: Values

    def under(self, name: str) -> Observation:
        """The same observation with a name in front of every key."""
        facts = {f"{name}: {key}": fact for key, fact in self.facts.items()}
        return Observation(facts, {f"{name}: {key}": v for key, v in self.values.items()})

    def __or__(self, other: Observation) -> Observation:  # type: ignore[override]  # of a tuple
        return Observation(self.facts | other.facts, self.values | other.values)


NOTHING = Observation({}, {})


class Side:
    """A library's model. Each method named in an `Operation` returns what to compare beside it.

    Args:
        script: The script that will run.
        library: `fastlora` or `peft`.
        dtype: Of the base model.
        folder: Where the model is saved.
        patched: Apply `fastlora.patch` to PEFT's model.
    """

    def __init__(
        self, script: Script, library: Any, dtype: torch.dtype, folder: Path, patched: bool = False
    ) -> None:
        self.script, self.library, self.dtype = script, library, dtype
        self.folder, self.patched = folder, patched
        self.model: Any = None
        self.partner = self  # the side whose files this one reads

    def run(self, operation: Operation, seed: int) -> Observation:
        """Runs an operation; random numbers are the same on every side."""
        torch.manual_seed(seed)
        found: Observation = getattr(self, operation.name)(**operation.arguments)
        return found

    # Operations, in the order of `scripts`.

    def wrap(self, adapter_name: str, config: dict[str, Any]) -> Observation:
        base = fresh(self.script.base, self.dtype)
        self._take(
            self.library.get_peft_model(base, self._config(config), adapter_name=adapter_name)
        )
        return self._filled(adapter_name)

    def add(self, adapter_name: str, config: dict[str, Any]) -> Observation:
        self.model.add_adapter(adapter_name, self._config(config))
        return self._filled(adapter_name)

    def set(self, adapter_name: Any, **options: Any) -> Observation:
        # PEFT's model takes one name, its tuner takes several.
        model = self.model if isinstance(adapter_name, str) else self.model.base_model
        model.set_adapter(adapter_name, **options)
        return NOTHING

    def require(self, adapter_names: str, requires_grad: bool) -> Observation:
        self.model.set_requires_grad(adapter_names, requires_grad)
        return NOTHING

    def within_disabled(self) -> Observation:
        with self.model.disable_adapter():
            return self.observe().under("within disable_adapter()")

    def disable(self) -> Observation:
        self.model.base_model.disable_adapter_layers()
        return NOTHING

    def enable(self) -> Observation:
        self.model.base_model.enable_adapter_layers()
        return NOTHING

    def merge(self, **options: Any) -> Observation:
        self.model.merge_adapter(**options)
        return NOTHING

    def unmerge(self) -> Observation:
        self.model.unmerge_adapter()
        return NOTHING

    def weighted(self, adapter_name: str, **options: Any) -> Observation:
        self.model.add_weighted_adapter(adapter_name=adapter_name, **options)
        # The factors of a sum are not unique, the updates are.
        return Observation({}, self._updates(adapter_name))

    def delete(self, adapter_name: str) -> Observation:
        self.model.delete_adapter(adapter_name)
        return NOTHING

    def save(self) -> Observation:
        """Saves every adapter; returns what the files hold."""
        self.model.save_pretrained(self.folder)
        facts: dict[str, Any] = {}
        values: Values = {}
        for name in self.model.peft_config:
            folder = self.folder_of(name)
            tensors = load_file(folder / "adapter_model.safetensors")
            stored = json.loads((folder / "adapter_config.json").read_text())
            facts[f"file {name}: shapes"] = {key: list(t.shape) for key, t in tensors.items()}
            facts[f"file {name}: dtypes"] = {str(t.dtype) for t in tensors.values()}
            facts[f"file {name}: config"] = {
                key: sorted(set(value)) if isinstance(value, list) and key in _SETS else value
                for key, value in stored.items()
                if value not in (None, [])  # PEFT has both for no target_parameters
            }
            values |= {f"file {name}/{key}": value for key, value in tensors.items()}
        return Observation(facts, values)

    def load(self, saved: str, adapter_name: str, is_trainable: bool) -> Observation:
        folder = self.partner.folder_of(saved)
        self.model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
        return NOTHING

    def reload(self, is_trainable: bool) -> Observation:
        base = fresh(self.script.base, self.dtype)
        first, *others = self.model.peft_config
        model = self.library.PeftModel.from_pretrained(
            base, self.partner.folder_of(first), adapter_name=first, is_trainable=is_trainable
        )
        for name in others:
            model.load_adapter(self.partner.folder_of(name), name, is_trainable=is_trainable)
        self._take(model)
        return NOTHING

    def mixed(self, adapter_names: list[str]) -> Observation:
        training = self.model.training
        self.model.eval()  # PEFT raises for mixed batches in training mode
        try:
            return Observation({}, self.forward(adapter_names=list(adapter_names))).under("mixed")
        finally:
            self.model.train(training)

    def step(self) -> Observation:
        self.forward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        return NOTHING

    def copy(self) -> Observation:
        original, self.model = self.model, copy.deepcopy(self.model)
        with torch.no_grad():  # the copy must not follow
            for parameter in original.parameters():
                parameter.zero_()
        return NOTHING

    def cast(self) -> Observation:
        self.model.to(torch.float32)
        dtypes = {name: str(p.dtype) for name, p in self.parameters().items()}
        self.model.to(self.dtype)
        return Observation({"dtypes after .to(float32)": dtypes}, {})

    def unload(self) -> Observation:
        self.model = self.model.unload()
        return NOTHING

    def merge_and_unload(self, **options: Any) -> Observation:
        self.model = self.model.merge_and_unload(**options)
        return NOTHING

    # What is observed.

    def facts(self) -> dict[str, Any]:
        """Names, what trains, what acts, what is merged."""
        if self.model is None:
            return {}
        facts: dict[str, Any] = {
            "parameters": {name: list(p.shape) for name, p in self.parameters().items()},
            "trainable": sorted(n for n, p in self.parameters().items() if p.requires_grad),
        }
        if not hasattr(self.model, "peft_config"):
            return facts
        facts["training"] = self.model.base_model.model.training
        facts["adapters"] = list(self.model.peft_config)
        facts["active"] = list(self.model.base_model.active_adapters)
        facts["model's active"] = list(self.model.active_adapters)
        layers = [dataclasses.asdict(status) for status in self.model.get_layer_status()]
        for field in ("enabled", "active_adapters", "merged_adapters", "available_adapters"):
            facts[f"layers' {field}"] = {layer["name"]: layer[field] for layer in layers}
        return facts

    def copied(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters; none where there is no model."""
        if self.model is None:
            return {}
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def state(self) -> dict[str, Any]:
        """What an error must not change: facts, parameters, and the hooks of a mixed batch."""
        model = self.model or nn.Module()
        sums = [parameter.sum().item() for parameter in model.parameters()]
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        return self.facts() | {"hooks": hooks, "sums of the parameters": sums}

    def observe(self) -> Observation:
        """Facts, parameters, and a forward with every gradient."""
        facts = self.facts()
        values: Values = {f"parameter/{n}": p for n, p in self.copied().items()}
        self.model.train(self.script.training)
        return Observation(facts, values | self.forward())

    def forward(self, **options: Any) -> Values:
        """The output, and the gradient of everything that trains and of the input."""
        arguments, x = inputs_of(self.script.base, self.dtype, self.script.embedded)
        self.model.zero_grad(set_to_none=True)
        result = self.model(**arguments, **options)
        y = result if isinstance(result, torch.Tensor) else result.logits
        values: Values = {"output": y.detach()}
        if y.requires_grad:
            y.square().mean().backward()
            if x is not None:
                values["gradient/input"] = x.grad
            for name, parameter in self.parameters().items():
                if parameter.requires_grad:
                    values[f"gradient/{name}"] = parameter.grad
        return values

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters, by names that both libraries have."""
        return {n.replace("base_layer.", ""): p for n, p in self.model.named_parameters()}

    def folder_of(self, adapter_name: str) -> Path:
        """Where `save` puts an adapter."""
        return self.folder if adapter_name == "default" else self.folder / adapter_name

    def copy_adapter(self, other: Side, adapter_name: str) -> None:
        """Takes the values of an adapter from another side, where it has the same shapes."""
        own = dict(self._of(adapter_name))
        with torch.no_grad():
            for name, parameter in other._of(adapter_name):
                if name in own and own[name].shape == parameter.shape:
                    own[name].copy_(parameter)

    def _config(self, config: dict[str, Any]) -> Any:
        return self.library.LoraConfig(**copy.deepcopy(config))

    def _take(self, model: Any) -> None:
        self.model = model
        if self.patched:
            fastlora.patch(model)

    def _of(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.parameters().items():
            if f".{adapter_name}." in f"{name}.":
                yield name, parameter

    def _filled(self, adapter_name: str) -> Observation:
        """Returns the initial values of an adapter, then gives it others that have an effect."""
        values: Values = {f"initial/{n}": p.detach().clone() for n, p in self._of(adapter_name)}
        with torch.no_grad():
            for name, parameter in self._of(adapter_name):
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                value = torch.randn(parameter.shape, generator=generator).to(parameter) / 4
                parameter.copy_(parameter + value if "magnitude" in name else value)
        return Observation({}, values)

    def _updates(self, adapter_name: str) -> Values:
        """What an adapter adds to each weight, ``lora_B @ lora_A`` times its scaling."""
        own = dict(self._of(adapter_name))
        values: Values = {}
        scalings = {
            name.replace("base_layer.", ""): module.scaling[adapter_name]
            for name, module in self.model.named_modules()
            if isinstance(module, LAYERS) and adapter_name in module.scaling
        }
        for name, parameter in own.items():
            for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
                layer, found, rest = name.partition(f".{a}.")
                if found:
                    up = own[f"{layer}.{b}.{rest}"].detach().flatten(1)
                    update = up @ parameter.detach().flatten(1)
                    values[f"update/{layer}"] = scalings[layer] * update
        return values


_SETS = ("target_modules", "exclude_modules", "modules_to_save")
