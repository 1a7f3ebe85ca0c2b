"""CorDA: the adapter starts as the directions of the base weight that data uses most, or least.

Method: https://arxiv.org/abs/2406.05223, as in PEFT. `fastlora.model.calibration.preprocess_corda`
leaves the decomposition of each layer on its module.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fastlora.init.configs import CordaConfig
from fastlora.init.registry import (
    Given,
    Settings,
    Start,
    check_finite,
    check_usable,
    register_init,
    without,
)
from fastlora.validation import InitialisationError

DATA = "eigens"  # PEFT's name for it, so that either library's calibration serves the other


class Eigens(Protocol):
    """A layer's decomposition, whoever made it: ``W C = U S V^T`` with C of its inputs.

    Attributes:
        S_WC: R singular values.
        U_WC: ``[N, R]``.
        V_WC: ``[K, R]``, with the inverse of C.
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


@register_init(
    "corda",
    title="CorDA",
    changes_base=True,
    data=DATA,
    calibration="preprocess_corda",
    settings=Settings("corda_config", CordaConfig),
)
def corda(given: Given) -> Start:
    """B is ``U sqrt(S / scaling)`` and A ``sqrt(S / scaling) V^T``.

    Raises:
        InitialisationError: The decomposition is of another shape, not finite, or of a lower rank.
    """
    weight, found = given.weight(), given.data
    eigens: Eigens = found  # type: ignore[assignment]  # the layer found it under its name
    s, u, v = (part.to(weight) for part in (eigens.S_WC, eigens.U_WC, eigens.V_WC))
    (n, k), rank = weight.shape, given.rank
    if (tuple(s.shape), tuple(u.shape), tuple(v.shape)) != ((rank,), (n, rank), (k, rank)):
        raise InitialisationError(
            f"init_lora_weights='corda': the decomposition has shapes {tuple(u.shape)}, "
            f"{tuple(s.shape)} and {tuple(v.shape)}, expected {(n, rank)}, {(rank,)} and "
            f"{(k, rank)}: run preprocess_corda with the config of the adapter, and on this model"
        )
    for name, part in (("singular values", s), ("directions", u), ("directions", v)):
        check_finite(part, f"init_lora_weights='corda': what preprocess_corda left as {name}")
    largest_first = s if s[0] >= s[-1] else s.flip(0)
    check_usable(given, largest_first, max(n, k))
    root = (s / given.scaling).sqrt()
    return without(given, weight, v.T * root[:, None], u * root)
