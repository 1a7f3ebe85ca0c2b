"""Settings of individual initializations. Fields and defaults are those of PEFT 0.21.2."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlora.validation import ConfigError


@dataclass
class LoftQConfig:
    """Settings of LoftQ.

    Args:
        loftq_bits: Bits of the quantized weight: 2 or 4 (normal floats), or 8 (integers).
        loftq_iter: Number of times to alternate between quantization and decomposition.

    Raises:
        ConfigError: loftq_bits is not 2, 4, or 8, or loftq_iter is not a positive whole number.
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
    """Settings of EVA.

    Args:
        rho: A layer's rank is at most ``rho * r``. With 1, every layer keeps its own r.
        tau: A direction has converged once its cosine similarity with its value of the step before
            is at least tau.
        use_label_mask: Whether to skip positions that have the label ``label_mask_value``.
        label_mask_value: Label of the positions to skip.
        whiten: Whether to divide each direction by the square root of its singular value.
        adjust_scaling_factors: Whether to change a layer's alpha in proportion to its rank, which
            keeps the scaling constant.

    Raises:
        ConfigError: rho is below 1, or tau is not in [0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1.0:
            raise ConfigError(f"`rho` must be >= 1.0, got {self.rho!r}")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0. Got {self.tau!r}")


@dataclass
class CordaConfig:
    """Settings of CorDA.

    Args:
        cache_file: File for the decompositions. If it exists, they are read from it instead of
            computed.
        covariance_file: File for the covariances, used in the same way. They do not depend on the
            rank.
        corda_method: "ipm" adapts the directions that the data uses most. "kpm" adapts those that
            it uses least, which preserves what the model knows about the data.
        verbose: Whether to show the progress of the decompositions.
        use_float16_for_covariance: Whether to sum the covariances in the inputs' own dtype instead
            of fp32.
        prune_temporary_fields: Whether to leave only the result on the layers.

    Raises:
        ConfigError: corda_method is neither "ipm" nor "kpm".
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
            setattr(self, name, None if path is None else os.fspath(path))  # files hold strings
        _check_choice("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """Settings of LoRA-GA.

    Args:
        direction: How the gradient's first 2 r singular directions are divided between A and B:
            "ArB2r" (A gets the first r), "A2rBr" (B gets the first r), "ArBr" (they alternate), or
            "random" (both get the same r random directions).
        scale: Scale of the factors: "stable" (B times ``out_features ** 0.25 /
            sqrt(stable_gamma)``), "weight_svd" (B scaled to the weight's largest singular value),
            "gd_scale" (both factors divided by the adapter's scaling), or "unit" (no scale).
        stable_gamma: The gamma of the "stable" scale.

    Raises:
        ConfigError: A value is not one of these, or stable_gamma is not positive.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        _check_choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _check_choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        if not self.stable_gamma > 0:
            raise ConfigError(f"stable_gamma must be positive, got {self.stable_gamma!r}")


def settings_of(value: object, cls: type) -> Any:
    """Return settings as an instance of ``cls``, or None for None.

    Args:
        value: An instance of ``cls``, PEFT's object of the same name, or a mapping of fields as in
            a config file. As in PEFT, fields of a mapping that the class does not have are ignored.
        cls: One of the classes above.

    Raises:
        ConfigError: ``value`` has another type, or one of its fields has a wrong value.
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


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
