"""Small models with the adapters of a case, built through the public API of each source."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastlora
from fastlora import FastLoraLinear, LoraConfig
from fastlora.functional import lora_add, lora_linear
from fastlora.layers import FastLoraWrapper
from tests.support.conformance_cases import FEATURES, SEEDS, Case

SAMPLES, WIDTH = 6, 16
# N and K of each linear; N is at least K, so that a dropout mask can be read off an output.
SHAPES = {"q": (24, 16), "k": (24, 16), "o": (66, 24)}
BIASED = ("q", "o")
PREFIX = "base_model.model."  # of PEFT's keys


class CalledLinear(nn.Linear):
    """A linear that is called as it is: LoRA is added to what it gives."""


def _nothing() -> None:
    """Does nothing."""


class Net(nn.Module):
    """Two linears fed by one tensor, and one behind them.

    Attributes:
        probing: Whether each linear is fed ones, and what each gives is returned.
        between: Called between the two linears that x feeds.
    """

    def __init__(self, kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.probing = False
        self.between: Callable[[], Any] = _nothing
        for name, (n, k) in SHAPES.items():
            setattr(self, name, kind(k, n, bias=name in BIASED))

    def forward(self, x: torch.Tensor) -> Any:
        """Maps ``[..., 16]`` to ``[..., 66]``."""
        if self.probing:
            return {"q": self.q(x), "k": self.k(x), "o": self.o(x.new_ones(*x.shape[:-1], 24))}
        hidden = torch.tanh(self.q(x))
        self.between()
        return self.o(hidden + self.k(x))


class FunctionLinear(nn.Module):
    """`fastlora.functional` behind the attributes of a LoRA layer of one adapter."""

    def __init__(self, base: nn.Linear, called: bool, **config: Any) -> None:
        super().__init__()
        (n, k), r = base.weight.shape, config["r"]
        self.base_layer, self.called = base, called
        self.lora_A = nn.ModuleDict({"en": nn.Linear(k, r, bias=False)})
        self.lora_B = nn.ModuleDict({"en": nn.Linear(r, n, bias=False)})
        self.scale, self.p, self.impl = config["lora_alpha"] / r, config.get("lora_dropout", 0), ""

    def get_base_layer(self) -> nn.Module:
        """Returns the linear."""
        return self.base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., K]`` to ``[..., N]``."""
        a, b, weight, bias = (
            self.lora_A["en"].weight,
            self.lora_B["en"].weight,
            self.base_layer.weight,
            self.base_layer.bias,
        )
        p = self.p if self.training else 0.0
        if self.called:
            return lora_add(self.base_layer(x), x, a, b, self.scale, dropout_p=p, impl=self.impl)
        options = {"bias": bias, "dropout_p": p, "impl": self.impl}
        return lora_linear(x, weight, a, b, self.scale, **options)


def drawn(key: str, *shape: int) -> torch.Tensor:
    """Normal values in float64, always the same ones for a key."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scaling(config: dict[str, Any]) -> float:
    """An adapter's scaling."""
    r = config["r"]
    return config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)


def values_of(case: Case, adapters: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Every tensor of base model and adapters by name, rounded to what all dtypes can hold."""
    found = {}
    for layer, (n, k) in SHAPES.items():
        found[f"{layer}.weight"] = drawn(f"{layer}.weight", n, k) / k**0.5
        if layer in BIASED:
            found[f"{layer}.bias"] = drawn(f"{layer}.bias", n)
        for name, config in adapters.items():
            if layer not in config["target_modules"]:
                continue
            at, r = f"{layer}.{name}", config["r"]
            found[f"{at}.A"] = drawn(f"{at}.A", r, k) / k**0.5
            found[f"{at}.B"] = drawn(f"{at}.B", n, r)
            if config.get("lora_bias"):
                found[f"{at}.bias"] = drawn(f"{at}.bias", n)
            if config.get("use_dora"):
                found[f"{at}.m"] = 1.5 + 0.5 * drawn(f"{at}.m", n).tanh()
    return {name: value.to(case.x_dtype).double() for name, value in found.items()}


class Subject:
    """A model of a case: how to run it, and where its tensors are.

    Attributes:
        net: The `Net`, with LoRA layers in it.
        call: What a user calls.
        handle: What `fastlora.adapters` takes.
        values: Every tensor by name, in float64.
    """

    def __init__(
        self, case: Case, adapters: dict[str, dict[str, Any]] | None = None, probing: bool = False
    ) -> None:
        self.case = case
        self.adapters = FEATURES[case.feature] if adapters is None else adapters
        self.values = values_of(case, self.adapters)
        kind = CalledLinear if case.base == "called" else nn.Linear
        self.net = Net(kind).to(case.x_dtype)
        for name, parameter in self.net.named_parameters():
            parameter.data.copy_(self.values[name])
        self.call: Callable[[torch.Tensor], Any] = self.net
        self.handle: Any = None
        getattr(self, f"_build_{case.source}")()
        for layer in self.layers().values():
            layer.impl = case.impl
        if case.trains:
            self.put()
        self.net.train(case.drops)
        self.net.probing = probing

    # ----------------------------------------------------------------------- how each is built

    def _build_function(self) -> None:
        called = self.case.base == "called"
        for name in SHAPES:
            base = getattr(self.net, name)
            setattr(self.net, name, FunctionLinear(base, called, **self.adapters["en"]))

    def _build_layer(self) -> None:
        for layer in SHAPES:
            base = getattr(self.net, layer)
            if self.case.base == "called":
                made: Any = FastLoraWrapper(base)
            else:
                made = FastLoraLinear.from_linear(base, adapter_name=None)
            setattr(self.net, layer, made)
            for name, config in self.adapters.items():
                if layer in config["target_modules"]:
                    fields = {k: v for k, v in config.items() if k != "target_modules"}
                    made.add_adapter(name, **fields)
            made.set_adapter([name for name in self.case.active if name in made.lora_A])

    def _build_model(self, library: Any = fastlora) -> None:
        (first, config), *others = self.adapters.items()
        model = library.get_peft_model(
            self.net, library.LoraConfig(**config), adapter_name=first, autocast_adapter_dtype=False
        )
        for name, config in others:
            model.add_adapter(name, library.LoraConfig(**config))
        model.base_model.set_adapter(self.case.active)
        self.call, self.handle = model, model

    def _build_patched(self) -> None:
        import peft

        self._build_model(peft)
        fastlora.patch(self.handle)

    def _build_pool(self) -> None:
        self.handle = fastlora.AdapterPool(
            self.net,
            target_modules=list(SHAPES),
            max_adapters=8,
            max_rank=64,
            dtype=self.case.factor_dtype,
        )
        for name in self.adapters:
            self.load(name)

    def _build_shards(self) -> None:
        plan = {
            "q": ColwiseParallel(output_layouts=Replicate()),
            "k": ColwiseParallel(output_layouts=Replicate()),
            "o": RowwiseParallel(input_layouts=Replicate()),
        }
        self.net = parallelize_module(self.net, _mesh(), plan)
        self._build_model()

    # ---------------------------------------------------------------------------- where it is

    def layers(self) -> dict[str, Any]:
        """The LoRA layers."""
        return {name: getattr(self.net, name) for name in SHAPES}

    def places(self) -> dict[str, nn.Parameter]:
        """Every parameter by the names of `values`."""
        found = {}
        for layer, module in self.layers().items():
            base = module.get_base_layer()
            found[f"{layer}.weight"] = base.weight
            if base.bias is not None:
                found[f"{layer}.bias"] = base.bias
            for name in module.lora_A:
                found[f"{layer}.{name}.A"] = module.lora_A[name].weight
                found[f"{layer}.{name}.B"] = module.lora_B[name].weight
                if module.lora_B[name].bias is not None:
                    found[f"{layer}.{name}.bias"] = module.lora_B[name].bias
                if name in getattr(module, "lora_magnitude_vector", {}):
                    found[f"{layer}.{name}.m"] = module.lora_magnitude_vector[name].weight
        return found

    def put(self) -> None:
        """Writes `values` into the parameters, in their dtypes, and makes them train."""
        with torch.no_grad():
            for name, parameter in self.places().items():
                if name.count(".") == 2:
                    parameter.data = parameter.data.to(self.case.factor_dtype)
                local(parameter).copy_(self.values[name])
                trains = name.count(".") == 2 or self.case.base_trains
                parameter.requires_grad_(trains and self.acts(name))
        if self.case.source != "function":
            fastlora.clear_caches(self.handle or self.net)

    def read(self) -> None:
        """Makes `values` what the parameters are."""
        found = {name: local(p).double().clone() for name, p in self.places().items()}
        self.values |= {name: value for name, value in found.items() if name in self.values}

    def acts(self, name: str) -> bool:
        """Whether a parameter's adapter acts in some row, or it is the base model's."""
        if name.count(".") < 2 or self.case.rows == "mixed":
            return True
        return name.split(".")[1] in self.case.active

    def load(self, name: str) -> None:
        """Brings an adapter of `values` into the pool."""
        config, state = self.adapters[name], {}
        keys = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}
        for key, value in self.values.items():
            layer, *rest = key.split(".")
            if len(rest) == 2 and rest[0] == name:
                end = keys.get(rest[1], "lora_magnitude_vector")
                kept = torch.float32 if rest[1] == "m" else self.case.factor_dtype
                state[f"{PREFIX}{layer}.{end}"] = value.to(kept)
        self.handle.load(name, state, config=LoraConfig(**config))

    # ------------------------------------------------------------------------------ how it runs

    def x(self, tokens: int | None = None) -> torch.Tensor:
        """The input, ``[6, tokens, 16]``."""
        shape = SAMPLES, self.case.tokens if tokens is None else tokens, WIDTH
        return drawn("x", *shape).to(self.case.x_dtype)

    def ids(self) -> Any:
        """What `fastlora.adapters` gets, or None outside of a mixed batch."""
        if self.case.rows == "mixed":
            return self.case.ids
        return ["en"] * SAMPLES if self.case.source == "pool" else None

    def block(self, ids: Any = None, **options: Any) -> contextlib.AbstractContextManager[None]:
        """The block of a mixed batch, or none; and the state of dropout's generator."""
        torch.manual_seed(5)
        ids = self.ids() if ids is None else ids
        if ids is None:
            return contextlib.nullcontext()
        if self.net.training and "seeds" not in options:
            known = set(ids) if isinstance(ids, list) else set(self.adapters)
            options["seeds"] = {n: s for n, s in SEEDS.items() if n in known}
        return fastlora.adapters(self.handle, ids, **options)

    def forward(self, x: torch.Tensor, ids: Any = None, **options: Any) -> torch.Tensor:
        """One forward of the case's rows."""
        with self.block(ids, **options):
            return self.call(x)

    def step(
        self, x: torch.Tensor, ids: Any = None, dy: torch.Tensor | None = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        """A forward and a backward: y, and every gradient there is, by name."""
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        y = self.forward(leaf, ids, **options)
        y.backward(direction(y) if dy is None else dy)
        return {"y": y.detach(), "x": leaf.grad, **self.gradients()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every gradient there is by name; clears them."""
        places = self.places() if self.case.trains else {}
        found = {n: local(p.grad) for n, p in places.items() if p.grad is not None}
        for parameter in self.net.parameters():
            parameter.grad = None
        return found


@functools.cache
def _mesh() -> Any:
    """One process that is a whole group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.init_device_mesh("cpu", (1,))


def local(tensor: Any) -> torch.Tensor:
    """A shard as a plain tensor, of a group of one process."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def direction(y: torch.Tensor) -> torch.Tensor:
    """The gradient that every backward starts from: normal values."""
    return drawn("dy", *y.shape).to(y.dtype)
