"""What an implementation of a linear with adapters has to do, and the implementations by name.

Which of them runs is `fastlora.ops.conditions`'.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.validation import check_dropout_dtype

if TYPE_CHECKING:
    from fastlora.ops.factors import Base, Operands
    from fastlora.ops.rows import Rows

_Gradient = torch.Tensor | None


def draw_seed(x: torch.Tensor, impl: str) -> torch.Tensor:
    """Draws a dropout seed (one int64) from torch's default generator.

    It stays on the device for kernels, so nothing waits, and on the CPU for the eager path. Drawn
    from the global generator, it repeats when activation checkpointing restores that.

    Raises:
        TypeError: x's dtype is one that dropout cannot run in; the generator has not moved.
    """
    check_dropout_dtype(x.dtype)
    device = x.device if impl == "triton" else torch.device("cpu")
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


class Backward(NamedTuple):
    """What the gradients of a `Backend.forward` are made of, but that of the base weight.

    Attributes:
        dy: Any strides, in x's dtype.
        weight: Of the base layer, any dtype; None for dx of the adapters' term alone.
        x: None where no gradient needs it.
        operands, rows, plan: As in the forward.
        s: Of the forward; None without rows where no lora_b is wanted.
        wants_x, wants_bias, wants_s: Whether those of x, of the base bias, and of an s that was
            given are wanted.
        wants: Whether those of ``lora_a, lora_b, lora_bias`` of each adapter in turn are. That of
            one adapter's lora_bias is the caller's part.
    """

    dy: torch.Tensor
    weight: torch.Tensor | None
    x: torch.Tensor | None
    operands: Operands
    rows: Rows | None
    s: torch.Tensor | None
    plan: str
    wants_x: bool
    wants_bias: bool
    wants_s: bool
    wants: Sequence[bool]


# dx ``[M, K]``; d_bias ``[N]`` of the base bias; ds ``[M, R]``; and those of ``lora_a, lora_b,
# lora_bias`` of each adapter in turn. None for what is not wanted, and for an adapter without rows.
Gradients = tuple[_Gradient, _Gradient, _Gradient, list[_Gradient]]

# Layers of one launch; `fastlora.kernels.tables.MAX_SIBLINGS` without an import of Triton.
MOST_SIBLINGS = 4


class Backend(ABC):
    """An implementation of a linear with adapters; what calls it knows its name only.

    What computes siblings has to be there where `computes_siblings` says so, and in a backend that
    layers share s in (`fastlora.layers.group_forward`).

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``y`` and ``dy [M, N]``. With rows, s and
    ds are ``[M, R]`` at sorted positions, R at least the largest rank; without, one adapter has all
    rows, and its rank is R.
    """

    @abstractmethod
    def forward(
        self,
        x: torch.Tensor,
        base: Base,
        operands: Operands,
        rows: Rows | None,
        s: torch.Tensor | None,
        plan: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the base layer's product with every row's own adapter, and s.

        Args:
            x: The input.
            base: A weight and bias in x's dtype, or y, ``[M, N]`` and contiguous.
            operands: The adapters.
            rows: Which adapter each row has; None for one, whose lora_bias is the caller's part.
            s: Where a sibling made it; else it is made here.
            plan: As in `fastlora.functional.lora_linear`.
        """

    @abstractmethod
    def gradients(self, given: Backward) -> Gradients:
        """Returns dx, d_bias, ds, and the gradients of factors; see `Gradients`."""

    # ------------------------------------------------- layers that are fed by the same x, at once

    # G siblings, each with one adapter and no lora_bias, are one list of operands, as what runs in
    # every step takes it: the weights of all, ``[N, K]`` in x's dtype; the biases, ``[N]`` or None;
    # every lora_a ``[R, K]``, every lora_b ``[N, R]``; the scalings, fp32 of one element; the seeds
    # of dropout, int64 ``[1]`` or None. ``dropout_p`` has the probability that acts on each.

    def computes_siblings(self, x: torch.Tensor) -> bool:
        """Whether the backend computes layers that are fed by x at once, by what follows."""
        return False

    def shrink(
        self,
        x: torch.Tensor,
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor]:
        """Returns s of each of G layers that are fed by the same x.

        Args:
            x: Their input.
            lora_a: Of each layer the adapters', by slot; one without rows.
            seeds: Of each layer int64 ``[1]``, or None; all None with rows.
            dropout_p: Of each layer.
            rows: Which adapter each row has.
        """
        raise NotImplementedError

    def grad_a(
        self,
        x: torch.Tensor,
        ds: Sequence[torch.Tensor],
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor | None]:
        """Returns the gradients of `shrink`'s lora_a, of all layers in turn."""
        raise NotImplementedError

    def siblings(
        self,
        x: torch.Tensor,
        operands: Sequence[torch.Tensor | None],
        dropout_p: tuple[float, ...],
        with_s: bool = False,
    ) -> list[torch.Tensor]:
        """Returns y ``[M, N]`` of each of 1 to 4 layers that are fed by the same x.

        And on request their s: one tensor, side by side, or one of each.
        """
        raise NotImplementedError

    def siblings_gradients(
        self,
        dys: Sequence[torch.Tensor | None],
        x: torch.Tensor | None,
        operands: Sequence[torch.Tensor | None],
        dropout_p: tuple[float, ...],
        s: Sequence[torch.Tensor],
        wants: tuple[bool, ...],
    ) -> list[torch.Tensor | None]:
        """Returns the gradients of `siblings` but those of base weights, None for those unwanted.

        Args:
            dys: Of each layer, any strides; None where nobody used its y.
            x: None where no lora_a's gradient is wanted.
            operands, dropout_p: Theirs.
            s: Of `siblings`.
            wants: Whether that of x is wanted, of each weight (which is the caller's part), bias,
                lora_a and lora_b.

        Returns:
            dx ``[M, K]``, then in fp32 those of all biases, of all lora_a, of all lora_b.
        """
        raise NotImplementedError


BACKENDS: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Makes a backend known under a name that ``impl`` resolves to."""
    BACKENDS[name] = backend
