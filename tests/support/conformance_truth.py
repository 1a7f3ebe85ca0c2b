"""What a case must give, in float64 and in plain PyTorch of its dtype; and dropout's masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlora.testing import assert_within_budget, error_budget, run_with_largest_error
from tests.support.conformance_models import (
    SHAPES,
    Subject,
    direction,
    local,
    scaling,
)

Masks = dict[tuple[str, str], torch.Tensor]


class Group(NamedTuple):
    """Rows, and the adapters that act on them in order."""

    rows: torch.Tensor
    names: list[str]


def groups_of(subject: Subject, count: int, ids: Any = None) -> list[Group]:
    """The rows of each set of adapters among ``count`` rows."""
    ids = subject.ids() if ids is None else ids
    if ids is None:
        return [Group(torch.arange(count), subject.case.active)]
    by_row = [name for name in ids for _ in range(count // len(ids))]
    # In one order in every process: that of a set, and with it the sums' rounding, is not.
    names = dict.fromkeys(by_row)
    named = {name: [i for i, own in enumerate(by_row) if own == name] for name in names}
    return [Group(torch.tensor(rows), [name] if name else []) for name, rows in named.items()]


def read_masks(subject: Subject, x: torch.Tensor, ids: Any = None, **options: Any) -> Masks:
    """Dropout's masks over ``1 - p`` by layer and adapter: ``[rows of the adapter, K]``.

    Read off a model of the same kind with identities for factors. What an adapter drops may not
    depend on its rank, on DoRA or on its base layer.
    """
    case = subject.case
    if not subject.net.training or not case.drops:
        return {}
    found: Masks = {}
    own = subject.case.active if subject.ids() is None else list(subject.adapters)
    for name in own:  # one after the other: several that are active add up
        configs = {n: _readable(c) for n, c in subject.adapters.items()}
        probe = Subject(case._replace(base_trains=False), configs, probing=True)
        with torch.no_grad():
            for key, parameter in probe.places().items():
                parameter.zero_()
                if key.split(".")[1] == name:
                    local(parameter).fill_diagonal_(1)
            outputs = probe.forward(torch.ones_like(x), ids, **options)
        p = subject.adapters[name].get("lora_dropout", 0.0)
        groups = groups_of(subject, x[..., 0].numel(), ids)
        rows = torch.cat([g.rows for g in groups if name in g.names] or [torch.zeros(0).long()])
        for layer, (n, k) in SHAPES.items():
            if layer in subject.adapters[name]["target_modules"]:
                kept = outputs[layer].reshape(-1, n)[rows, :k] != 0
                found[layer, name] = kept.double() / (1 - p)
    return found


def _readable(config: dict[str, Any]) -> dict[str, Any]:
    """The config with a rank that fits every K, and a plain update."""
    kept = {key: config[key] for key in ("target_modules", "lora_dropout") if key in config}
    return {"r": max(k for _, k in SHAPES.values()), "lora_alpha": 24, **kept}


class Plain:
    """A case's formula in plain PyTorch.

    Args:
        subject: The case's model; its values are read.
        tensors: Every tensor by name, in the dtype to compute in.
        groups: Which rows have which adapters.
        masks: Of the adapters that drop now.
        order: None, or a generator that shuffles the order of every sum.
    """

    def __init__(
        self,
        subject: Subject,
        tensors: dict[str, torch.Tensor],
        groups: list[Group],
        masks: Masks,
        order: torch.Generator | None = None,
    ) -> None:
        self.adapters, self.tensors, self.groups = subject.adapters, tensors, groups
        self.masks, self.order = masks, order

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 16]`` to ``[..., 66]``."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = torch.tanh(self.linear("q", rows)) + self.linear("k", rows)
        return self.linear("o", hidden).view(*x.shape[:-1], -1)

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        """One layer, over ``[M, K]``."""
        parts = [self._rows(layer, x[g.rows], g.names) for g in self.groups]
        order = torch.cat([g.rows for g in self.groups])
        return torch.cat(parts)[order.argsort()]

    def _rows(self, layer: str, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        weight, bias = self.tensors[f"{layer}.weight"], self.tensors.get(f"{layer}.bias")
        y = self.product(x, weight)
        y = y if bias is None else y + bias
        for name in names:
            if layer not in self.adapters[name]["target_modules"]:
                continue
            at, c = f"{layer}.{name}", scaling(self.adapters[name])
            a, b = self.tensors[f"{at}.A"], self.tensors[f"{at}.B"]
            mask = self.masks.get((layer, name))
            dropped = x if mask is None else x * mask.to(x.dtype)
            if self.order is None:
                update = c * self.product(self.product(dropped, a), b)
            else:
                update = self.product(c * self.product(dropped, a), b)
            if f"{at}.bias" in self.tensors:
                update = update + c * self.tensors[f"{at}.bias"]
            if f"{at}.m" not in self.tensors:
                y = y + update
                continue
            norm = (weight + c * b @ a).norm(dim=1).detach()
            g = self.tensors[f"{at}.m"] / norm
            p = self.adapters[name].get("lora_dropout", 0.0)
            if mask is not None and p:
                y = y + (g - 1) * self.product(dropped, weight) + g * update
            elif bias is None:
                y = g * (y + update)
            else:
                y = bias + g * (y - bias + update)
        return y

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T``."""
        if self.order is None:
            return x @ weight.t()
        sizes = (*x.shape, weight.shape[0])
        m, k, n = (torch.randperm(size, generator=self.order) for size in sizes)
        return (x[m][:, k] @ weight[n][:, k].t())[m.argsort()][:, n.argsort()]


@torch.enable_grad()
def results(
    subject: Subject,
    x: torch.Tensor,
    dtype: torch.dtype,
    masks: Masks,
    ids: Any = None,
    dy: torch.Tensor | None = None,
    seed: int | None = None,
    y_alone: bool = False,
) -> dict[str, torch.Tensor]:
    """y and every gradient of the formula in a dtype, by name; None where there is none."""
    order = None if seed is None else torch.Generator().manual_seed(seed)
    tensors = {n: v.to(dtype).requires_grad_() for n, v in subject.values.items()}
    leaf = x.detach().to(dtype).requires_grad_()
    groups = groups_of(subject, x[..., 0].numel(), ids)
    y = Plain(subject, tensors, groups, masks, order)(leaf)
    if y_alone:
        return {"y": y.detach()}
    places = subject.places() if subject.case.trains else {}
    tensors = {n: t for n, t in tensors.items() if n in places and places[n].requires_grad}
    dy = direction(y) if dy is None else dy.to(dtype)
    found = torch.autograd.grad(y, [leaf, *tensors.values()], dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(["x", *tensors], found, strict=True))}


def merged(subject: Subject) -> dict[str, torch.Tensor]:
    """The base model's tensors with the active adapters in them, in float64."""
    found = {n: v for n, v in subject.values.items() if n.count(".") == 1}
    for layer in SHAPES:
        base, change = found[f"{layer}.weight"], torch.zeros(1).double()
        for name in subject.case.active:
            at = f"{layer}.{name}"
            if f"{at}.A" not in subject.values:
                continue
            update = subject.values[f"{at}.B"] @ subject.values[f"{at}.A"]
            update = scaling(subject.adapters[name]) * update
            weight = found[f"{layer}.weight"] + update
            if f"{at}.bias" in subject.values:
                change = change + scaling(subject.adapters[name]) * subject.values[f"{at}.bias"]
            if f"{at}.m" in subject.values:
                g = subject.values[f"{at}.m"] / (base + update).norm(dim=1)
                weight, change = g[:, None] * weight, g * change
            found[f"{layer}.weight"] = weight
        if f"{layer}.bias" in found:
            found[f"{layer}.bias"] = found[f"{layer}.bias"] + change
    return found


def plain(
    subject: Subject,
    tensors: dict[str, torch.Tensor],
    x: torch.Tensor,
    dtype: torch.dtype,
    groups: list[Group],
    seed: int | None = None,
) -> torch.Tensor:
    """y of the formula in a dtype, for other tensors than the subject's."""
    order = None if seed is None else torch.Generator().manual_seed(seed)
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return Plain(subject, cast, groups, {}, order)(x.to(dtype))


def check(
    subject: Subject,
    found: dict[str, torch.Tensor],
    x: torch.Tensor,
    ids: Any = None,
    *,
    dy: torch.Tensor | None = None,
    zeros: bool = False,
    dtype: torch.dtype | None = None,
    masks: Masks | None = None,
) -> None:
    """Asserts that a step's results are as near to float64 as plain PyTorch's are.

    Args:
        subject: What made them.
        found: y alone, or what `Subject.step` returns.
        x: Its input.
        ids: Its ids.
        dy: The gradient that it started from.
        zeros: Whether adapters without rows have zeros for gradients, and not None.
        dtype: That plain PyTorch computes in; None for x's.
        masks: Dropout's, if they were read already.
    """
    dtype = dtype or subject.case.x_dtype
    masks = read_masks(subject, x, ids) if masks is None else masks
    y_alone = set(found) == {"y"}

    def run(dtype: torch.dtype, seed: int | None = None) -> dict[str, torch.Tensor]:
        return results(subject, x, dtype, masks, ids, dy, seed, y_alone)

    truth, runs = run(torch.float64), [run(dtype)]
    absent = {name for name, value in truth.items() if value is None}
    if zeros:
        assert all(not found[name].any() for name in absent), "an absent adapter's gradient"
    assert set(found) == set(truth) - (set() if zeros else absent)
    for name, value in truth.items():
        if value is None:
            continue
        mine = found[name].double().cpu()
        known = mine.shape == value.shape and bool(mine.numel())
        # The farthest of more orders allows no less. Few rows leave chance little to average over.
        for orders in (0, 7, 40):
            runs += [run(dtype, seed) for seed in range(len(runs) - 1, orders)]
            same = run_with_largest_error((other[name] for other in runs), value)
            error = (mine - value.cpu()).abs().max().item() if known else 0.0
            if error <= error_budget(same, value):
                break
        assert_within_budget(found[name], same, value, name)
