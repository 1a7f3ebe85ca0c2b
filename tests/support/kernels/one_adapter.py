"""The kernels of one adapter, each launched on operands of its own, and what they should give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.kernels.chips import chip_of
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.configs import choose
from fastlora.kernels.lora_dropout import launch_lora_dropout
from fastlora.kernels.lora_expand import launch_lora_expand
from fastlora.kernels.lora_grad_a import launch_lora_grad_a
from fastlora.kernels.lora_grad_b import launch_lora_grad_b
from fastlora.kernels.lora_linear import launch_lora_linear
from fastlora.kernels.lora_shrink import launch_lora_shrink
from fastlora.kernels.modules import Module
from fastlora.kernels.plane_sums import launch_plane_sums
from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.ops.torch import reference
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.sums import yardstick

SEED = -8_765_432_109_876_543
Results = dict[str, torch.Tensor]


class Problem:
    """LayerAdapterOperands in one dtype, unless a test replaces one; each kernel is a method.

    Args:
        lab: The fixture.
        m, n, k, r: Rows, outputs, columns of x, rank.
        dtype: Of all operands but the scaling.
        p: Dropout's probability.
        further_ranks: Ranks of further layers fed by x, whose d_lora_a comes from the same launch.
    """

    KERNELS = ("shrink", "linear", "expand", "dropout", "grad_b", "grad_a", "grad_x", "grad_x_add")

    def __init__(
        self,
        lab: Lab,
        m: int,
        n: int,
        k: int,
        r: int,
        dtype: torch.dtype = torch.float32,
        p: float = 0.0,
        further_ranks: Sequence[int] = (),
    ) -> None:
        self.lab, self.m, self.n, self.k, self.r, self.p = lab, m, n, k, r, p
        self.x, self.weight = lab.rand(m, k, dtype=dtype), lab.rand(n, k, dtype=dtype)
        self.s, self.ds = lab.rand(m, r, dtype=dtype), lab.rand(m, r, dtype=dtype)
        self.lora_a, self.lora_b = lab.rand(r, k, dtype=dtype), lab.rand(n, r, dtype=dtype)
        self.y, self.dy = lab.rand(m, n, dtype=dtype), lab.rand(m, n, dtype=dtype)
        self.bias: torch.Tensor | None = lab.rand(n, dtype=dtype)
        self.scaling = torch.tensor([0.75], device=lab.device)
        self.all_ds = [self.ds, *(lab.rand(m, rank, dtype=dtype) for rank in further_ranks)]
        seeds = [SEED + 7 * i for i in range(len(self.all_ds))]
        self.seeds = torch.tensor(seeds, device=lab.device)
        self.seed = torch.tensor([SEED], device=lab.device)
        self.ps = [p, 0.0, 0.5 * p, p][: len(self.all_ds)]
        # What the last launch but sums of planes wrote: results, or planes of them.
        self.written: Results = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.x.dtype

    def config(self, launch: str) -> KernelConfig:
        """The one that an operator chooses."""
        sizes = {"m": self.m, "n": self.n, "k": self.k, "r": self.r}
        sizes["r"] = max(ds.shape[1] for ds in self.all_ds) if launch == "lora_grad_a" else self.r
        group_size = len(self.all_ds) if launch == "lora_grad_a" else 1
        chip = chip_of(self.x.device)
        return choose(chip, launch, self.dtype, **sizes, group_size=group_size)

    def drops(self) -> dict[str, Any]:
        """What a launch takes of dropout."""
        return {"seed": self.seed if self.p else None, "dropout_p": self.p}

    def _outputs(self, outs: Results, parts: Sequence[int]) -> list[torch.Tensor]:
        """Returns what a launch writes: each output over NaN, or so many planes of it."""
        for (name, out), count in zip(outs.items(), parts, strict=True):
            planes = self.lab.poisoned(count, *out.shape, dtype=torch.float32)
            self.written[name] = out if count == 1 else planes
        return list(self.written.values())

    def _summed(self, outs: Results) -> Results:
        """Sums the planes; returns the results."""
        pairs = [(out, self.written[name]) for name, out in outs.items()]
        pairs = [(out, planes) for out, planes in pairs if out is not planes]
        if pairs:
            config = choose(chip_of(self.x.device), "plane_sums", self.dtype)
            launch_plane_sums(*zip(*pairs, strict=True), config=config)
        return outs

    # ------------------------------------------------------------------------ launches

    def shrink(self, config: KernelConfig | None = None) -> Results:
        """``s``."""
        config = config or self.config("dropout_lora_shrink" if self.p else "lora_shrink")
        s = self.lab.poisoned(self.m, self.r, dtype=self.dtype)
        self.written = {}
        (written,) = self._outputs({"s": s}, [config.splits])
        launch_lora_shrink(written, self.x, [self.lora_a], **self.drops(), config=config)
        return self._summed({"s": s})

    def linear(
        self, config: KernelConfig | None = None, s_out: torch.Tensor | None = None
    ) -> Results:
        """``y``, of s or its planes."""
        config = config or self.config("lora_linear")
        outs = {"y": self.lab.poisoned(self.m, self.n, dtype=self.dtype)}
        self.written = {}
        (y,) = self._outputs(outs, [config.splits])
        launch_lora_linear(
            [Module(y, self.lora_b, self.scaling, self.bias, self.weight)],
            *(self.x, self.s),
            s_out=s_out,
            config=config,
            pdl=False,
        )
        return self._summed(outs)

    def expand(self, config: KernelConfig | None = None) -> Results:
        """``y_added``, which is y in place."""
        self.before, self.written = self.y.clone(), {"y_added": self.y}
        config = config or self.config("lora_expand")
        module = Module(self.y, self.lora_b, self.scaling)
        launch_lora_expand([module], self.s, reads_y=True, config=config)
        return self.written

    def dropout(self, config: KernelConfig | None = None) -> Results:
        """``dropped``."""
        self.written = {"dropped": self.lab.poisoned(self.m, self.k, dtype=self.dtype)}
        config = config or self.config("lora_dropout")
        launch_lora_dropout(self.written["dropped"], self.x, **self.drops(), config=config)
        return self.written

    def grad_b(self, config: KernelConfig | None = None, with_ds: bool = True) -> Results:
        """``d_lora_b``, ``d_bias`` and, on request, ``ds``."""
        config = config or self.config("lora_grad_b")
        outs = {
            "ds": self.lab.poisoned(self.m, self.r, dtype=self.dtype),
            "d_lora_b": self.lab.poisoned(self.n, self.r, dtype=self.lora_b.dtype),
            "d_bias": self.lab.poisoned(self.n, dtype=torch.float32),
        }
        parts = [cdiv(self.n, config.block_n), config.splits, config.splits]
        self.written = {}
        if with_ds:
            written = self._outputs(outs, parts)
        else:
            del outs["ds"]
            written = [None, *self._outputs(outs, parts[1:])]
        launch_lora_grad_b(*written, self.dy, self.s, self.lora_b, self.scaling, config=config)
        return self._summed(outs)

    def grad_a(self, config: KernelConfig | None = None) -> Results:
        """``d_lora_a_0`` and those of the other group members, in lora_a's dtype."""
        config = config or self.config("lora_grad_a")
        outs = {
            f"d_lora_a_{i}": self.lab.poisoned(ds.shape[1], self.k, dtype=self.lora_a.dtype)
            for i, ds in enumerate(self.all_ds)
        }
        self.written = {}
        written = self._outputs(outs, [config.splits] * len(outs))
        seeds = self.seeds if self.p else None
        launch_lora_grad_a(
            written, self.x, self.all_ds, seeds=seeds, dropout_p=self.ps, config=config
        )
        return self._summed(outs)

    def grad_x(self, config: KernelConfig | None = None) -> Results:
        """``dx``, by the forward's kernel on transposed operands."""
        config = config or self.config("lora_grad_x")
        outs = {"dx": self.lab.poisoned(self.m, self.k, dtype=self.dtype)}
        self.written = {}
        (dx,) = self._outputs(outs, [config.splits])
        launch_lora_linear(
            [Module(dx, self.lora_a.t(), None, None, self.weight.t())],
            *(self.dy, self.ds),
            s_out=None,
            config=config,
            pdl=False,
            **self.drops(),
        )
        return self._summed(outs)

    def grad_x_add(self, config: KernelConfig | None = None) -> Results:
        """``dx``, by an update of ``dy @ weight``."""
        self.written = {"dx": self.dy @ self.weight}
        config = config or self.config("lora_grad_x_add")
        module = Module(self.written["dx"], self.lora_a.t(), None)
        launch_lora_expand([module], self.ds, reads_y=True, config=config, **self.drops())
        return self.written

    # --------------------------------------------------------------------------- truth

    def drop(self, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        """An x ``[M, K]`` under a group member's dropout; what is dropped is zero, NaN or not."""
        p = self.ps[index]
        if not p or not x.numel():
            return x
        keep = philox_keep_mask(int(self.seeds[index]), *x.shape, p).to(x.device)
        return torch.where(keep, x / (1 - p), 0)

    def expected(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Returns a result by PyTorch in ``dtype``, of factors as kernels round them."""

        def to(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.dtype).to(dtype)

        scaling = self.scaling.double() if dtype == torch.float64 else self.scaling
        if name == "s":
            return self.drop(to(self.x)) @ to(self.lora_a).t()
        if name == "dropped":
            return self.drop(to(self.x))
        if name in ("y", "y_added"):
            # The sum of planes is rounded by whoever multiplies.
            s = self.s.sum(0).to(dtype) if self.s.dim() == 3 else to(self.s)
            if name == "y":
                bias = None if self.bias is None else to(self.bias)
                base = torch.nn.functional.linear(to(self.x), to(self.weight), bias)
            else:
                base = self.before.to(dtype, copy=True)
            return reference.lora_expand_(base, s, to(self.lora_b), scaling)
        dy = to(self.dy)
        if name == "ds":
            return reference.lora_ds(dy, to(self.lora_b), scaling)
        if name == "d_lora_b":
            return reference.lora_b_grad(dy, to(self.s), to(self.lora_b), scaling)
        if name == "d_bias":
            return reference.column_sums(dy)
        if name == "dx":
            return dy @ to(self.weight) + self.drop(to(self.ds) @ to(self.lora_a))
        index = int(name.removeprefix("d_lora_a_"))
        return to(self.all_ds[index]).t() @ self.drop(to(self.x), index)

    def check(self, found: Results) -> None:
        """Raises unless each result is as near to float64 as PyTorch is in the same dtype."""
        exact = {name: self.expected(name, torch.float64) for name in found}
        near = yardstick(lambda: {n: self.expected(n, self.dtype) for n in found}, exact)
        for name, result in found.items():
            assert_within_budget(result, near[name], exact[name], name)
