"""Config classes of initialization methods, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlora.validation import ConfigError


@dataclass
class LoftQConfig:
    """Configuration for LoftQ initialization (``init_lora_weights="loftq"``).

    Args:
        loftq_bits: Bits per value of the quantized weight: 2 or 4 (normal floats), or 8 (integers).
        loftq_iter: Number of iterations. Each iteration quantizes the weight and then decomposes
            the quantization error.

    Raises:
        ConfigError: ``loftq_bits`` is not 2, 4, or 8, or ``loftq_iter`` is not a positive integer.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        _check_choice("loftq_bits", self.loftq_bits, (2, 4, 8))
        if isinstance(self.loftq_iter, bool) or not isinstance(self.loftq_iter, int):
            raise ConfigError(f"loftq_iter must be an integer, got {self.loftq_iter!r}")
        if self.loftq_iter < 1:
            raise ConfigError(f"loftq_iter must be at least 1, got {self.loftq_iter}")


@dataclass
class EvaConfig:
    """Configuration for EVA initialization (``init_lora_weights="eva"``).

    Args:
        rho: Limit on the rank of each layer, as a multiple of the layer's ``r``. With 1, every
            layer has rank ``r``, unless ``rank_pattern`` gives different ranks to layers with the
            same input.
        tau: A direction has converged once its cosine similarity with the direction of the previous
            step is at least ``tau``.
        use_label_mask: Whether to ignore token positions whose label is ``label_mask_value``.
        label_mask_value: Label of the token positions to ignore.
        whiten: Whether to divide each direction by the square root of its singular value.
        adjust_scaling_factors: Whether to change the ``lora_alpha`` of each layer in proportion to
            its rank, so that the scaling stays the same (without ``use_rslora``).

    Raises:
        ConfigError: ``rho`` is not a number or is below 1, or ``tau`` is not in [0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        _check_number("rho", self.rho)
        _check_number("tau", self.tau)
        if not self.rho >= 1.0:
            raise ConfigError(f"`rho` must be >= 1.0, got {self.rho!r}")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0, got {self.tau!r}")


@dataclass
class CordaConfig:
    """Configuration for CorDA initialization (``init_lora_weights="corda"``).

    Args:
        cache_file: File that caches the decompositions, or None. If the file exists, the
            decompositions are read from it instead of being computed.
        covariance_file: File that caches the covariances in the same way, or None. The covariances
            do not depend on the rank.
        corda_method: ``"ipm"`` adapts the directions that the data uses most. ``"kpm"`` adapts the
            directions that the data uses least, which preserves the model's knowledge of the data.
        verbose: Whether to show a progress bar for the decompositions.
        use_float16_for_covariance: Whether to sum the covariances in the dtype of the inputs
            instead of fp32.
        prune_temporary_fields: Whether to remove intermediate results from the layers.

    Raises:
        ConfigError: ``corda_method`` is neither ``"ipm"`` nor ``"kpm"``.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_file", "covariance_file"):
            path = getattr(self, name)
            setattr(self, name, None if path is None else os.fspath(path))  # for config files
        _check_choice("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """Configuration for LoRA-GA initialization (``init_lora_weights="lora_ga"``).

    Args:
        direction: How to divide the first ``2 * r`` singular directions of the gradient between A
            and B: ``"ArB2r"`` (A gets the first ``r``), ``"A2rBr"`` (B gets the first ``r``),
            ``"ArBr"`` (A and B get alternate directions), or ``"random"`` (both get the same ``r``
            random directions).
        scale: How to scale the factors: ``"stable"`` (multiply B by ``out_features ** 0.25 /
            sqrt(stable_gamma)``), ``"weight_svd"`` (scale B to the largest singular value of the
            weight), ``"gd_scale"`` (divide both factors by the adapter's scaling), or ``"unit"``
            (do not scale).
        stable_gamma: The value of gamma for ``scale="stable"``.

    Raises:
        ConfigError: ``direction`` or ``scale`` has an unknown value, or ``stable_gamma`` is not
            a positive number.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        _check_choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _check_choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        _check_number("stable_gamma", self.stable_gamma)
        if not self.stable_gamma > 0:
            raise ConfigError(f"stable_gamma must be positive, got {self.stable_gamma!r}")


def convert_init_config(value: object, cls: type) -> Any:
    """Convert an initialization config to an instance of ``cls``.

    Args:
        value: An instance of ``cls``, an instance of PEFT's class of the same name, a mapping of
            fields as in a config file, or None. As in PEFT, unknown fields of a mapping are
            ignored.
        cls: One of the config classes in this module.

    Returns:
        The instance, or None if ``value`` is None.

    Raises:
        ConfigError: ``value`` is of another type, or one of its fields has an invalid value.
    """
    if value is None or isinstance(value, cls):
        return value
    if dataclasses.is_dataclass(value) and type(value).__name__ == cls.__name__:
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"`{cls.__name__}` must be a `{cls.__name__}`, a dict, or None. Got {value!r}"
        )
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: entry for name, entry in value.items() if name in known})


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name} must be a number, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
