"""The settings of single initialisations; fields and defaults are those of PEFT 0.21.2."""

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
        loftq_bits: Bits of the quantised weight: 2 or 4 (normal floats), or 8 (integers).
        loftq_iter: How often quantisation and decomposition take turns.

    Raises:
        ConfigError: A value is none of these.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        _check_choice("loftq_bits", self.loftq_bits, (2, 4, 8))
        if isinstance(self.loftq_iter, bool) or not isinstance(self.loftq_iter, int):
            raise ConfigError(f"loftq_iter must be a whole number, got {self.loftq_iter!r}")
        if self.loftq_iter < 1:
            raise ConfigError(f"loftq_iter must be at least 1, got {self.loftq_iter}")


@dataclass
class EvaConfig:
    """Settings of EVA.

    Args:
        rho: A layer gets at most ``rho * r`` ranks; 1 leaves every layer its own r.
        tau: Directions count as found once their cosine with those of the step before is above it.
        use_label_mask: Leave out positions whose label is ``label_mask_value``.
        label_mask_value: See ``use_label_mask``.
        whiten: Divide each direction by the root of its singular value.
        adjust_scaling_factors: Multiply a layer's alpha as its rank, so that the scaling stays.

    Raises:
        ConfigError: rho is below 1, or tau not in [0, 1].
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
        cache_file: Where the decompositions are kept; they are read from there if it exists.
        covariance_file: The same for the covariances, which do not depend on the rank.
        corda_method: "ipm" adapts the directions that the data uses most, "kpm" those it uses
            least, and so keeps what the model knows of the data.
        verbose: Show the progress of the decompositions.
        use_float16_for_covariance: Sum the covariances in the inputs' own dtype, not in fp32.
        prune_temporary_fields: Leave only the result on the layers.

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
            setattr(self, name, None if path is None else os.fspath(path))  # a file holds strings
        _check_choice("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """Settings of LoRA-GA.

    Args:
        direction: Which of the gradient's 2 r singular directions go into A and which into B:
            "ArB2r" (the first into A), "A2rBr", "ArBr" (they take turns) or "random".
        scale: Of B: "stable" (``out_features ** 0.25 / sqrt(stable_gamma)``), "weight_svd" (as
            large as the weight's largest singular value), "gd_scale" (both factors by the
            adapter's scaling) or "unit".
        stable_gamma: See ``scale``.

    Raises:
        ConfigError: A value is none of these.
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
    """Returns settings as an object of ``cls``, or None for None.

    Args:
        value: Such an object, a mapping of its fields as a file has it (fields that the class does
            not have are left out, as PEFT does), or the object of that name of PEFT's.
        cls: One of the classes above.

    Raises:
        ConfigError: It is none of these, or a value in it is wrong.
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
