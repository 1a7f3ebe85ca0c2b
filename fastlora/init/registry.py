"""Registry of the initialization methods and their properties.

A method is a decorated function in a module of its own in this folder::

    @register_init("pissa", title="PiSSA", changes_base=True, converts=True)
    def pissa(given: InitInputs) -> InitResult: ...

`find_init_method` returns the method that a value of ``init_lora_weights`` selects. A layer calls
the method's `InitMethod.start` with newly initialized factors, and stores the result. A method has
no access to layers, models, or files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastlora.validation import ConfigError, InitializationError


@dataclass(frozen=True)
class InitInputs:
    """The arguments of an initialization method.

    Attributes:
        name: Value of ``init_lora_weights``, such as ``"pissa_niter_4"``.
        rank: Rank of the adapter, R.
        scaling: Factor by which the update is multiplied.
        lora_a: Factor A as initialized by `nn.Linear`, ``[R, K]``. Its random values are drawn
            before those of lora_b.
        lora_b: Factor B as initialized by `nn.Linear`, ``[N, R]``.
        read_weight: Function that returns the base weight, ``[N, K]``. A quantized weight is
            dequantized.
        dtype: Dtype in which the factors will be stored.
        config: Config of the method, or None.
        data: The result that the method's calibration stored for this layer, or None.
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

    def base_weight(self) -> torch.Tensor:
        """Return the base weight that the initialization method uses.

        A quantized weight is dequantized. The result is a matrix ``[N, K]`` in fp32, or in fp64 if
        the weight is stored in fp64.

        Raises:
            InitializationError: The weight has values that are not finite.
        """
        weight = self.read_weight().detach()
        weight = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        check_finite_for_init(weight, f"init_lora_weights={self.name!r}: the base weight")
        return weight

    def check_rank_limit(self, limit: int, description: str) -> None:
        """Raise `InitializationError` if the rank exceeds a limit.

        Args:
            limit: The highest rank that is allowed.
            description: Description of the limit, for the error message.
        """
        if self.rank > limit:
            raise InitializationError(
                f"init_lora_weights={self.name!r} requires r to be at most {limit} "
                f"({description}), got r={self.rank}"
            )


@dataclass(frozen=True)
class InitResult:
    """Result of an initialization method.

    It contains the initial factors A and B of an adapter, and a changed base weight if the method
    changes the base weight.

    Attributes:
        lora_a: Initial value of factor A, ``[R, K]``.
        lora_b: Initial value of factor B, ``[N, R]``.
        weight: The new base weight, ``[N, K]``, or None to leave the base weight unchanged.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class InitConfigField:
    """Description of the config field for an initialization method.

    The field belongs to `fastlora.LoraConfig` and holds the config of the method.

    Attributes:
        field: Name of the field.
        cls: Dataclass of the method's config. The field also accepts a mapping of its fields.
        missing: What to do if the method is selected and the field is not set: use the defaults and
            warn (``"default"``), raise an error (``"raise"``), or leave the decision to the
            calibration (``"later"``).
        as_dict: Whether `fastlora.LoraConfig` stores the method's config as a dict, which is empty
            if the field is not set.
    """

    field: str
    cls: type
    missing: Literal["default", "raise", "later"] = "default"
    as_dict: bool = False


@dataclass(frozen=True)
class InitMethod:
    """Specification of an initialization method for LoRA adapters, which the registry holds.

    It contains the function that computes the initial factors, and the properties of the method.

    Attributes:
        name: Value of ``init_lora_weights`` that selects the method: True, False, or a string.
        start: Function that computes the initial factors and the new base weight.
        title: Name of the method as written by its authors, for messages about its config and
            about changed base weights.
        pattern: Regular expression that matches all names of the method, if it has several names.
        changes_base: Whether the method changes the base weight. An adapter then works only with
            the changed base weight.
        converts: Whether the changed base weight and the initial update add up to the original
            weight, so that a trained adapter can be saved as a LoRA adapter for the original
            weight.
        supports_quantized: Whether the method can change a quantized base weight, which is then
            quantized again.
        random: Regular expression that matches the names for which the change of the base weight
            differs from run to run.
        data: Name of the base layer's attribute in which the calibration stores its result, if the
            calibration must run before the adapter is added.
        calibration: Name of the calibration function, for messages.
        must_repeat: Whether loading a trained adapter requires the result of the calibration.
        settings: The field of `fastlora.LoraConfig` for the method's config, or None.
        frozen: Names of the factors that are not trained.
        supports_convolutions: Whether the method also supports convolutions.
    """

    name: bool | str
    start: Callable[[InitInputs], InitResult]
    title: str = ""
    pattern: str = ""
    changes_base: bool = False
    converts: bool = False
    supports_quantized: bool = False
    random: str = ""
    data: str = ""
    calibration: str = ""
    must_repeat: bool = True
    settings: InitConfigField | None = None
    frozen: tuple[str, ...] = ()
    supports_convolutions: bool = False

    def changes_base_randomly(self, value: bool | str) -> bool:
        """Return whether the method makes random changes to the base weight.

        Random changes differ from run to run.

        Args:
            value: Value of ``init_lora_weights`` that selected this method.
        """
        return bool(self.random) and re.fullmatch(self.random, str(value)) is not None


_registered: dict[bool | str, InitMethod] = {}


def register_init(
    name: bool | str, **properties: Any
) -> Callable[[Callable[[InitInputs], InitResult]], Callable[[InitInputs], InitResult]]:
    """Return a decorator that registers a function as an initialization method.

    Args:
        name: Value of ``init_lora_weights`` that selects the method.
        **properties: Further fields of `InitMethod`.
    """

    def register(start: Callable[[InitInputs], InitResult]) -> Callable[[InitInputs], InitResult]:
        _registered.setdefault(name, InitMethod(name, start, **properties))
        return start

    return register


def all_init_methods() -> list[InitMethod]:
    """Return a list of all registered initialization methods."""
    return list(_registered.values())


def find_init_method(value: object) -> InitMethod:
    """Return the initialization method that a value of ``init_lora_weights`` selects.

    Raises:
        ConfigError: The value does not select any method.
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


def check_finite_for_init(tensor: torch.Tensor, what: str) -> None:
    """Raise `InitializationError` if a tensor contains NaN or infinite values.

    Args:
        tensor: The tensor to check.
        what: Description of the tensor, which starts the error message.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InitializationError(
            f"{what} contains NaN or infinite values ({bad} of {tensor.numel()}); make all values "
            "finite, or choose another value for init_lora_weights"
        )


def subtract_update(
    given: InitInputs, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> InitResult:
    """Subtract the update ``scaling * B @ A`` from the base weight, and return the result.

    A and B are the given factors. The result contains the factors and the new base weight.

    Args:
        given: The arguments of the initialization method.
        weight: The base weight, ``[N, K]``.
        lora_a: Factor A, ``[R, K]``.
        lora_b: Factor B, ``[N, R]``.
    """
    return InitResult(lora_a, lora_b, weight - given.scaling * lora_b @ lora_a)


def check_used_singular_values_nonzero(
    given: InitInputs, values: torch.Tensor, larger_dimension: int
) -> None:
    """Raise `InitializationError` if any singular value that the factors are built from is zero.

    These are R values, where R is the rank of the adapter. Values that are as small as rounding
    errors count as zero. For a singular value of zero, the column of lora_b and the row of lora_a
    would both be zero and would never receive a gradient. The error is also raised if the scaling
    is not positive, because the factors are divided by its square root.

    Args:
        given: The arguments of the initialization method.
        values: The R singular values in descending order.
        larger_dimension: Larger dimension of the matrix.
    """
    if not given.scaling > 0:
        raise InitializationError(
            f"init_lora_weights={given.name!r} requires a positive scaling factor, got "
            f"lora_alpha / r = {given.scaling}"
        )
    tolerance = float(values[0]) * larger_dimension * torch.finfo(values.dtype).eps
    usable = int((values > tolerance).sum())
    if usable < given.rank:
        raise InitializationError(
            f"init_lora_weights={given.name!r} needs r={given.rank} nonzero singular values, but "
            f"only {usable} {'is' if usable == 1 else 'are'} nonzero; directions with a singular "
            "value of zero would never be trained. Use a smaller r for this layer (rank_pattern), "
            "or exclude the layer with exclude_modules"
        )
