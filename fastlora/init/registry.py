"""What an initialisation is: a function of tensors, and what is to be known of it beforehand.

A method is one file in this folder with one decorated function::

    @register_init("pissa", title="PiSSA", changes_base=True, converts=True)
    def pissa(given: Given) -> Start: ...

The config and the loader ask `find_init` what a name means; a layer calls its `Init.start` with its
fresh factors, and writes what comes back. A method does not see layers, models or files.
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
    """What an initialisation starts from.

    Attributes:
        name: The value of ``init_lora_weights``, as ``"pissa_niter_4"``.
        rank: R.
        scaling: The factor on the update.
        lora_a: ``[R, K]``, as `nn.Linear` draws it; drawn first.
        lora_b: ``[N, R]``, as `nn.Linear` draws it.
        read_weight: Returns the base weight ``[N, K]``, dequantised where it is quantised.
        dtype: What the factors will be in.
        config: The method's own settings, or None.
        data: What the method's calibration left for this layer, or None.
        transposed: Whether the base layer stores its weight ``[K, N]``.
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
        """Returns the base weight ``[N, K]`` in fp32 (fp64 stays), all of it finite.

        Raises:
            InitialisationError: Some of its values are not finite.
        """
        weight = self.read_weight().detach()
        weight = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        check_finite(weight, f"init_lora_weights={self.name!r}: the base weight")
        return weight

    def check_rank(self, limit: int, why: str) -> None:
        """Raises `InitialisationError` where the rank is above a limit; ``why`` says what it is."""
        if self.rank > limit:
            raise InitialisationError(
                f"init_lora_weights={self.name!r}: r={self.rank}, expected at most {limit}, {why}"
            )


@dataclass(frozen=True)
class Start:
    """Where an adapter starts.

    Attributes:
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        weight: The base weight ``[N, K]`` to go on with; None leaves it as it is.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """The field of `fastlora.LoraConfig` that holds a method's own settings.

    Attributes:
        field: Its name.
        cls: A dataclass; a mapping with its fields is taken too.
        missing: Where the method is chosen without settings: take the defaults and warn, raise, or
            leave it to the calibration.
        as_dict: Whether the config keeps them as a dict, and an empty one for none.
    """

    field: str
    cls: type
    missing: Literal["default", "refuse", "later"] = "default"
    as_dict: bool = False


@dataclass(frozen=True)
class Init:
    """An initialisation.

    Attributes:
        name: True, False or a string.
        start: The method.
        title: As its authors write it, for messages about settings and changed base weights.
        pattern: A regular expression for all the names it has, where it has more than one.
        changes_base: Whether it moves a part of the base weight into the factors, so that an
            adapter means something only beside the base weight that it was trained on.
        converts: Whether base weight and scaled factors add up to the weight as it was, so that a
            trained adapter can be saved as plain LoRA.
        on_quantised: Whether it may change a quantised base weight, which is then quantised again.
        random: Names whose change of the base is another one each time.
        data: Attribute of the base layer where the calibration leaves its result.
        calibration: The function that looks at data, for messages; what it leaves is ``data``, if
            it comes before the adapter.
        must_repeat: Whether a trained adapter cannot be loaded where that result is missing.
        settings: Where its settings are.
        frozen: Factors that do not train.
        any_kind: Whether it is for convolutions too.
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
        """Whether the base changes in another way at each run of it."""
        return bool(self.random) and re.fullmatch(self.random, str(value)) is not None


_registered: dict[bool | str, Init] = {}


def register_init(
    name: bool | str, **facts: Any
) -> Callable[[Callable[[Given], Start]], Callable[[Given], Start]]:
    """Makes a function known as an initialisation; ``facts`` are fields of `Init`."""

    def register(start: Callable[[Given], Start]) -> Callable[[Given], Start]:
        _registered.setdefault(name, Init(name, start, **facts))
        return start

    return register


def all_inits() -> list[Init]:
    """Returns every initialisation that is registered."""
    return list(_registered.values())


def find_init(value: object) -> Init:
    """Returns what a value of ``init_lora_weights`` means.

    Raises:
        ConfigError: It means nothing.
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
    """Raises `InitialisationError` where a tensor has values that are not finite."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InitialisationError(
            f"{what} has {bad} of {tensor.numel()} values that are not finite; expected a weight "
            "that a model computes with, or another init_lora_weights"
        )


def without(
    given: Given, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> Start:
    """Returns factors, and the weight ``[N, K]`` without the update that they make."""
    return Start(lora_a, lora_b, weight - given.scaling * lora_b @ lora_a)


def check_usable(given: Given, values: torch.Tensor, limit: int) -> None:
    """Raises `InitialisationError` where the last of R singular values is nothing but rounding.

    Its column of lora_b and its row of lora_a would both be zero, and their gradients with them.
    ``limit`` is the larger dimension of the matrix. Raises too where the scaling, of whose inverse
    both take the square root, is not positive.
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
            f"expected at least r={given.rank}: what is left would never train. Take a smaller r "
            "for it (rank_pattern), or leave it out (exclude_modules)"
        )
