"""Registry of initializations: each is a function of tensors, described by a few properties.

A method is one file in this folder with one decorated function::

    @register_init("pissa", title="PiSSA", changes_base=True, converts=True)
    def pissa(given: Given) -> Start: ...

The config and the loader call `find_init` to resolve a name. A layer calls `Init.start` with its
newly drawn factors and stores the result. A method does not see layers, models, or files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastlora.validation import ConfigError, InitialisationError


@dataclass(frozen=True)
class Given:
    """The input of an initialization.

    Attributes:
        name: Value of ``init_lora_weights``, such as ``"pissa_niter_4"``.
        rank: R.
        scaling: Factor that the update is multiplied by.
        lora_a: ``[R, K]``, as `nn.Linear` draws it. It is drawn before lora_b.
        lora_b: ``[N, R]``, as `nn.Linear` draws it.
        read_weight: Function that returns the base weight ``[N, K]``, dequantized if it is
            quantized.
        dtype: Dtype in which the factors will be stored.
        config: Settings of the method, or None.
        data: What the method's calibration stored for this layer, or None.
        transposed: Whether the base layer stores its weight as ``[K, N]``.
    """

    name: str
    rank: int
    scaling: float
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    read_weight: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.float32
    config: object | None = None
    data: object | None = None
    transposed: bool = False

    def weight(self) -> torch.Tensor:
        """Return the base weight ``[N, K]`` in fp32, or in fp64 if it is stored in fp64.

        Raises:
            InitialisationError: Some of its values are not finite.
        """
        weight = self.read_weight().detach()
        weight = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        check_finite(weight, f"init_lora_weights={self.name!r}: the base weight")
        return weight

    def check_rank(self, limit: int, why: str) -> None:
        """Raise `InitialisationError` if the rank exceeds ``limit``, which ``why`` describes."""
        if self.rank > limit:
            raise InitialisationError(
                f"init_lora_weights={self.name!r}: r={self.rank}, expected at most {limit}, {why}"
            )


@dataclass(frozen=True)
class Start:
    """The result of an initialization.

    Attributes:
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        weight: The new base weight ``[N, K]``, or None to leave it unchanged.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """The field of `fastlora.LoraConfig` that holds a method's settings.

    Attributes:
        field: Name of the field.
        cls: Dataclass of the settings. A mapping with its fields is accepted too.
        missing: What to do if the method is chosen without settings: use the defaults and warn
            (``"default"``), raise (``"refuse"``), or let the calibration decide (``"later"``).
        as_dict: Whether the config stores the settings as a dict, which is empty if there are none.
    """

    field: str
    cls: type
    missing: Literal["default", "refuse", "later"] = "default"
    as_dict: bool = False


@dataclass(frozen=True)
class Init:
    """An initialization and its properties.

    Attributes:
        name: Value of ``init_lora_weights`` that selects it: True, False, or a string.
        start: The function that computes the factors.
        title: Name of the method as its authors write it, for messages about settings and changed
            base weights.
        pattern: Regular expression for all names of the method, if there are several.
        changes_base: Whether it moves a part of the base weight into the factors. An adapter then
            works only with the base weight that it was trained on.
        converts: Whether the base weight and the scaled factors add up to the original weight. A
            trained adapter can then be saved as plain LoRA.
        on_quantised: Whether it may change a quantized base weight, which is then quantized again.
        random: Regular expression for the names that change the base weight differently on each
            run.
        data: Attribute of the base layer in which the calibration stores its result.
        calibration: Name of the calibration function, for messages. If the calibration runs before
            the adapter is added, ``data`` holds its result.
        must_repeat: Whether loading a trained adapter requires the calibration's result.
        settings: The field that holds the method's settings, or None.
        frozen: Names of the factors that do not train.
        any_kind: Whether it also supports convolutions.
    """

    name: bool | str
    start: Callable[[Given], Start]
    title: str = ""
    pattern: str = ""
    changes_base: bool = False
    converts: bool = False
    on_quantised: bool = False
    random: str = ""
    data: str = ""
    calibration: str = ""
    must_repeat: bool = True
    settings: Settings | None = None
    frozen: tuple[str, ...] = ()
    any_kind: bool = False

    def is_random(self, value: bool | str) -> bool:
        """Return whether this name changes the base weight differently on each run."""
        return bool(self.random) and re.fullmatch(self.random, str(value)) is not None


_registered: dict[bool | str, Init] = {}


def register_init(
    name: bool | str, **facts: Any
) -> Callable[[Callable[[Given], Start]], Callable[[Given], Start]]:
    """Register a function as an initialization.

    Args:
        name: Value of ``init_lora_weights`` that selects it.
        facts: Further fields of `Init`.
    """

    def register(start: Callable[[Given], Start]) -> Callable[[Given], Start]:
        _registered.setdefault(name, Init(name, start, **facts))
        return start

    return register


def all_inits() -> list[Init]:
    """Return all registered initializations."""
    return list(_registered.values())


def find_init(value: object) -> Init:
    """Return the initialization that a value of ``init_lora_weights`` selects.

    Raises:
        ConfigError: The value selects no initialization.
    """
    if isinstance(value, (bool, str)):
        lowered = value.lower() if isinstance(value, str) else value
        found = _registered.get(lowered)
        if found is not None:
            return found
        for init in _registered.values():
            if init.pattern and isinstance(lowered, str) and re.fullmatch(init.pattern, lowered):
                return init
    names = ", ".join(map(repr, _registered))
    raise ConfigError(
        f"init_lora_weights must be one of {names} or 'pissa_niter_<n>', got {value!r}"
    )


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise `InitialisationError` if a tensor has values that are not finite.

    Args:
        tensor: The tensor to check.
        what: Description of the tensor, which starts the message.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InitialisationError(
            f"{what} has {bad} of {tensor.numel()} values that are not finite; expected finite "
            "values, or another init_lora_weights"
        )


def without(
    given: Given, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> Start:
    """Return the factors, and the weight ``[N, K]`` minus the update that they make."""
    return Start(lora_a, lora_b, weight - given.scaling * lora_b @ lora_a)


def check_usable(given: Given, values: torch.Tensor, limit: int) -> None:
    """Raise `InitialisationError` if the smallest of R singular values is only rounding error.

    For such a value, the column of lora_b and the row of lora_a would both be zero, and so would
    their gradients. The error is also raised if the scaling is not positive, because both factors
    use the square root of its inverse.

    Args:
        given: The input of the initialization.
        values: Singular values in descending order.
        limit: Larger dimension of the matrix.
    """
    if not given.scaling > 0:
        raise InitialisationError(
            f"init_lora_weights={given.name!r} needs a positive scaling, got lora_alpha / r = "
            f"{given.scaling:g}"
        )
    tolerance = float(values[0]) * limit * torch.finfo(values.dtype).eps
    usable = int((values > tolerance).sum())
    if usable < given.rank:
        raise InitialisationError(
            f"init_lora_weights={given.name!r}: the base weight has rank {usable} or less, "
            f"expected at least r={given.rank}: the remaining directions would never train. Use a "
            "smaller r for this layer (rank_pattern), or leave it out (exclude_modules)"
        )
