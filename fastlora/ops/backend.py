"""`Backend`, the interface of implementations of linear layers with adapters, and their registry.

`fastlora.ops.execution_mode` chooses the backend of a forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.ops.factors import Base
from fastlora.validation import check_dropout_dtype

if TYPE_CHECKING:
    from fastlora.ops.factors import LayerAdapterOperands
    from fastlora.ops.rows import Rows
    from fastlora.ops.stacks import StackedWeightAdapterOperands

_Gradient = torch.Tensor | None


def draw_dropout_seed(x: torch.Tensor, impl: str) -> torch.Tensor:
    """Draw a random dropout seed on the device that ``impl`` requires.

    The seed is an int64 tensor ``[1]``, drawn from torch's default generator. If ``impl`` is
    ``"triton"``, the tensor is on x's device, so that the host does not wait for the seed.
    Otherwise, the tensor is on the CPU. Activation checkpointing restores the default generator, so
    a recomputed forward pass draws the same seed.

    Raises:
        TypeError: Dropout does not support x's dtype. In this case, no seed is drawn.
    """
    check_dropout_dtype(x.dtype)
    device = x.device if impl == "triton" else torch.device("cpu")
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


class BackwardArguments(NamedTuple):
    """The arguments that a backend takes for the backward pass of a LoRA layer.

    `Backend.gradients` takes these arguments for one layer. The caller computes the gradient of the
    base weight.

    Attributes:
        dy: Gradient of y in x's dtype, with any strides.
        weight: Weight of the base layer in any dtype, or None to compute dx of the adapters' term
            alone.
        x: Input of the forward pass, or None if no gradient needs it.
        operands, rows, plan: As in `Backend.forward`.
        s: s of the forward pass. It may be None if rows is None and no gradient of a lora_b is
            wanted.
        wants_x, wants_bias, wants_s: Whether the gradients of x, of the base bias, and of an s that
            was passed to the forward pass are wanted.
        wants: Whether the gradients of ``lora_a, lora_b, lora_bias`` of each adapter in turn are
            wanted. Without rows, the caller computes the gradient of lora_bias.
    """

    dy: torch.Tensor
    weight: torch.Tensor | None
    x: torch.Tensor | None
    operands: LayerAdapterOperands
    rows: Rows | None
    s: torch.Tensor | None
    plan: str
    wants_x: bool
    wants_bias: bool
    wants_s: bool
    wants: Sequence[bool]


# The gradients: dx ``[M, K]``; d_bias ``[N]`` of the base bias; ds ``[M, R]``; and the gradients of
# ``lora_a, lora_b, lora_bias`` of each adapter in turn. An entry may be None if the gradient is not
# wanted, or if the adapter has no rows.
Gradients = tuple[_Gradient, _Gradient, _Gradient, list[_Gradient]]

# Maximum number of layers in one launch. The value is
# `fastlora.kernels.config_tables.MAX_GROUP_SIZE`, which cannot be imported without Triton.
MAX_LAYERS_PER_LAUNCH = 4


class Backend(ABC):
    """Base class of the backends, which run the operations of linear layers with LoRA adapters.

    Callers look up a backend by name in `BACKENDS`. A backend implements `grouped_forward` and
    `grouped_gradients` if `supports_grouped_forward` can return True. A backend implements
    `grouped_shrink` and `grouped_grad_a` if layers that use the backend can share s (see
    `fastlora.layers.group_forward`).

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``y`` and ``dy [M, N]``. With rows, s and ds are
    ``[M, R]`` at sorted positions, and R is at least the largest rank. In the PyTorch backend they
    can have another layout (`fastlora.ops.torch.segments`). Without rows, one adapter applies to
    all rows, and R is its rank.
    """

    @abstractmethod
    def forward(
        self,
        x: torch.Tensor,
        base: Base,
        operands: LayerAdapterOperands,
        rows: Rows | None,
        s: torch.Tensor | None,
        plan: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the forward pass of a layer with adapters.

        The result is a tuple (y, s). y ``[M, N]`` is the output of the layer. s is the shrink
        output: the product of each row of x, after dropout, and the ``lora_a.T`` of its adapter.

        Args:
            x: The input.
            base: A weight and bias in x's dtype, or the base layer's output y, which is contiguous
                ``[M, N]``.
            operands: The adapters.
            rows: The adapter of each row, or None if one adapter applies to all rows. If rows is
                None, the caller adds the adapter's lora_bias.
            s: The s of the layer if it has already been computed, or None to compute it here.
            plan: As in `fastlora.functional.lora_linear`.
        """

    @abstractmethod
    def gradients(self, given: BackwardArguments) -> Gradients:
        """Compute the gradients in the backward pass of a layer with adapters.

        The result is a `Gradients` tuple with the gradients of the layer's inputs: x, the base
        bias, s, and the factors of the adapters.
        """

    # ------------------------------------------------------------------------- stacks of weights

    def add_stacked_updates_(
        self, y: torch.Tensor, x: torch.Tensor, operands: StackedWeightAdapterOperands, rows: Rows
    ) -> torch.Tensor:
        """Add each row's LoRA update to y in place, for a layer with a stack of weights.

        The factors of each adapter on a stack of E weights are stacks of E matrices. The function
        returns s, the shrink output, as in `forward`.

        Args:
            y: The base product, ``[P, N]``, in x's dtype.
            x: ``[P, K]``, sorted by key; see `fastlora.ops.stacks`.
            operands: The adapters.
            rows: The sorted rows.
        """
        base = Base(y=y, inplace=True)
        return self.forward(
            x, base, operands.as_operands_of_one_layer(), rows.in_sorted_order(), None, "auto"
        )[1]

    def stacked_gradients(
        self,
        dy: torch.Tensor,
        x: torch.Tensor | None,
        s: torch.Tensor,
        operands: StackedWeightAdapterOperands,
        rows: Rows,
        wants_x: bool,
        wants: Sequence[bool],
        dx: torch.Tensor | None = None,
    ) -> tuple[_Gradient, list[_Gradient]]:
        """Return the gradients of x and of the stacked LoRA factors.

        The factors of each adapter on a stack of E weights are stacks of E matrices. The result is
        a tuple of the gradient dx ``[P, K]`` and a list of the factors' gradients. Both ``wants``
        and the list of gradients have one item for lora_a and one for lora_b of each adapter in
        turn. If dx is given, it is the dx of the base product, to which the dx of the LoRA update
        is added.
        """
        count, none = operands.num_matrices, [False]
        each = [
            flag
            for pair in zip(wants[::2], wants[1::2], none * (len(wants) // 2), strict=True)
            for flag in pair
        ] * count
        given = BackwardArguments(
            *(dy, None, x, operands.as_operands_of_one_layer(), rows.in_sorted_order(), s, "auto"),
            *(wants_x, False, False, each),
        )
        update, _, _, found = self.gradients(given)
        slots = len(operands.lora_a)
        pairs = zip(operands.lora_a, operands.lora_b, strict=True)
        made = [f.new_zeros(f.shape) for pair in pairs for f in pair]
        for key in range(count * slots):
            matrix, slot = divmod(key, slots)
            for part in range(2):
                own = found[3 * key + part]
                if own is not None:
                    made[2 * slot + part][matrix] = own if part == 0 else own.t()
        if dx is not None and update is not None:
            update = dx.add_(update)
        return update, [m if wanted else None for m, wanted in zip(made, wants, strict=True)]

    # -------------------------------------------------- layers of a shared-input group, in one call

    # A shared-input group of G layers, each with one adapter and no lora_bias, passes its operands
    # as one flat list, because this code runs in every step. The list has six parts of G items
    # each: the weights ``[N, K]`` in x's dtype; the biases ``[N]`` or None; the lora_a ``[R, K]``;
    # the lora_b ``[N, R]``; the scalings, fp32 with one element each; and the seeds of dropout,
    # int64 ``[1]`` or None. ``dropout_p`` holds the active dropout probability of each layer.

    def supports_grouped_forward(self, x: torch.Tensor) -> bool:
        """Return whether `grouped_forward` supports layers that share the input x."""
        return False

    def grouped_shrink(
        self,
        x: torch.Tensor,
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor]:
        """Compute the shrink outputs s of a group of layers that share an input.

        The result is a list with one s for each layer.

        Args:
            x: Input of the layers.
            lora_a: For each layer, the lora_a of its adapters by slot. Without rows, each layer has
                one.
            seeds: For each layer a dropout seed, int64 ``[1]``, or None. With rows, all are None.
            dropout_p: Dropout probability of each layer.
            rows: The adapter of each row, or None if one adapter applies to all rows.
        """
        raise NotImplementedError

    def grouped_grad_a(
        self,
        x: torch.Tensor,
        ds: Sequence[torch.Tensor],
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor]:
        """Return the gradients of the lora_a factors of layers that share an input.

        The result is a list with one gradient for each lora_a, ordered by layer and then by slot.

        Args:
            x: Input of the layers.
            ds: Gradient of s of each layer.
            lora_a, seeds, dropout_p, rows: As in `grouped_shrink`.
        """
        raise NotImplementedError

    def grouped_forward(
        self,
        x: torch.Tensor,
        operands: Sequence[torch.Tensor | None],
        dropout_p: tuple[float, ...],
        with_s: bool = False,
    ) -> list[torch.Tensor]:
        """Return a list of the outputs of layers that share the input x.

        There is one output ``[M, N]`` for each of 1 to 4 layers. If ``with_s`` is True, the list
        also contains the s of the layers after the outputs: one tensor with the s of all layers
        side by side, or one tensor for each layer.
        """
        raise NotImplementedError

    def grouped_gradients(
        self,
        dys: Sequence[torch.Tensor | None],
        x: torch.Tensor | None,
        operands: Sequence[torch.Tensor | None],
        dropout_p: tuple[float, ...],
        s: Sequence[torch.Tensor],
        wants: tuple[bool, ...],
    ) -> list[torch.Tensor | None]:
        """Compute the gradients of several layers that share an input.

        The gradients are those of the inputs of `grouped_forward`. A gradient that is not wanted is
        None. The caller computes the gradients of base weights.

        Args:
            dys: dy of each layer, with any strides, or None if the layer's y was not used.
            x: Input of the layers, or None if no gradient of a lora_a is wanted.
            operands, dropout_p: As in `grouped_forward`.
            s: The s that `grouped_forward` returned.
            wants: Whether each gradient is wanted: one item for x, and then one item per layer for
                the weights, for the biases, for the lora_a, and for the lora_b.

        Returns:
            dx ``[M, K]``, then the gradients of all biases in fp32, of all lora_a, and of all
            lora_b.
        """
        raise NotImplementedError


BACKENDS: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Register a backend under a name.

    Callers look it up by this name.
    """
    BACKENDS[name] = backend
