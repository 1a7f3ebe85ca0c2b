"""DoRA on layers that tensor parallelism splits; run with checks_tensor_parallel.py."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastlora
from fastlora.integrations.distributed import clip_grad_norm_
from fastlora.layers import dora_norms as dora_norms
from fastlora.layers.tensor_parallel import TensorParallelLoraLinear
from fastlora.ops.torch import reference
from fastlora.sharding import copy_full_tensor_, full_tensor
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterStateError, ConfigError
from tests.support.distributed import steps
from tests.support.distributed.split_models import IDS, LAYOUTS, assert_same, pair, results
from tests.support.distributed.steps import raises

BOTH = ("default", "b")
P = 0.5
Chosen = list[tuple[list[int], str | None]]  # rows, and their adapter


def train_biases(model: Any) -> Any:
    """The same model, whose base biases train."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "lora_" not in name:
            parameter.requires_grad_(True)
    return model


def formula(dtype: torch.dtype, dora: tuple[str, ...], chosen: Chosen, masks: Any) -> Any:
    """PEFT's formula in plain PyTorch, for `results`' rows and loss.

    ``masks`` has what each layer's dropout leaves of the inputs of some rows.
    """
    model = train_biases(pair(None, dtype, dora))
    x = torch.randn(8, 17, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    weights = torch.randn(8, 10, generator=torch.Generator().manual_seed(4)).to(dtype)

    def layer(name: str, x: torch.Tensor, adapter: str | None, place: int) -> torch.Tensor:
        own = model.get_base_model().get_submodule(name)
        y = F.linear(x, own.weight, own.bias)
        if adapter is None:
            return y
        a, up, scaling = own.lora_A[adapter].weight, own.lora_B[adapter], own.scaling[adapter]
        kept = x * masks[name, place].to(dtype)
        update = F.linear(F.linear(kept, a), up.weight) * scaling
        if adapter not in dora:
            return y + update + (0.0 if up.bias is None else up.bias * scaling)
        norm = torch.linalg.vector_norm(own.weight + scaling * up.weight @ a, dim=1).detach()
        g = own.lora_magnitude_vector[adapter].weight / norm
        return y + (g - 1.0) * F.linear(kept, own.weight) + g * update

    y = torch.empty(8, 10, dtype=dtype)
    for place, (rows, adapter) in enumerate(chosen):
        inner = layer("up", x[rows], adapter, place).relu()
        y = y.index_copy(0, torch.tensor(rows), layer("down", inner, adapter, place))
    (y * weights).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def layer_dropout_seeds(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Fills up with the layer and seed of each dropout that acts in this process."""
    seen: list[tuple[str, torch.Tensor]] = []
    for name in ("up", "down"):
        layer: Any = model.get_base_model().get_submodule(name)

        def own_seed(seed: torch.Tensor, name: str = name, layer: Any = layer) -> torch.Tensor:
            made = TensorParallelLoraLinear._local_dropout_seed(layer, seed)
            seen.append((name, made[:1]))  # of a mixed batch's, the one plain adapter's
            return made

        layer._local_dropout_seed = own_seed
    return seen


def masks_of(seen: list[tuple[str, torch.Tensor]], dropping: Chosen) -> dict[Any, torch.Tensor]:
    """What both processes' dropouts have left of each layer's input, for each of some rows."""
    masks, places = {}, {"up": 0, "down": 0}
    for name, seed in seen:
        both = [torch.empty_like(seed) for _ in range(2)]
        dist.all_gather(both, seed)
        place = places[name]
        places[name] += 1
        like = torch.ones(len(dropping[place][0]), 17 if name == "up" else 11)
        parts = [reference.draw_keep_mask(like, each, P).float() / (1.0 - P) for each in both]
        if name == "up":
            assert torch.equal(*parts)
        else:
            assert not torch.equal(*parts)
        masks[name, place] = parts[0] if name == "up" else torch.cat(parts, 1)
    assert len(masks) == 2 * len(dropping)
    return masks


def check_layouts(folder: Path) -> None:
    """Values and every gradient in each layout: without DoRA; it before, behind, beside others."""
    for dora, ids, active in (
        ((), None, ["default", "b"]),
        ((), IDS, ["default", "b"]),
        (("b",), None, ["default", "b"]),
        (("b",), None, ["b", "default"]),
        (BOTH, None, ["default", "b"]),
        (("b",), IDS, ["default", "b"]),
        (BOTH, IDS, ["default", "b"]),
    ):

        def run(plan: Any, dtype: torch.dtype, own: bool, case: Any = (dora, ids, active)) -> Any:
            dora, ids, active = case
            model = train_biases(pair(plan, dtype, dora))
            model.set_adapter(active)
            return results(model, dtype, ids, own)

        same, truth = (run(None, dtype, False) for dtype in (torch.float32, torch.float64))
        for plan in LAYOUTS:
            own = plan["up"].input_layouts[0].is_shard()
            assert_same(run(plan, torch.float32, own), same, truth)


def check_dora_dropout(folder: Path) -> None:
    """PEFT's formula with the masks that were drawn: one adapter, and mixed rows; in eval none."""
    everything: Chosen = [(list(range(8)), "b")]
    places = {n: [i for i, chosen in enumerate(IDS) if chosen == n] for n in (*BOTH, None)}
    mixed: Chosen = [(places[name], name) for name in (*BOTH, None)]
    for dora in (("b",), BOTH):
        for training in (True, False):
            for chosen, ids in ((everything, None), (mixed, IDS)):
                dropping = [pair for pair in chosen if pair[1] is not None]
                model = train_biases(pair(LAYOUTS[0], torch.float32, dora, lora_dropout=P))
                if ids is None:
                    model.set_adapter("b")
                seen = layer_dropout_seeds(model.train(training))
                found = results(model, torch.float32, ids, False)
                if training:
                    # Plain adapters' dropouts come before those of DoRA.
                    order = sorted(dropping, key=lambda rows: rows[1] in dora)
                    drawn = masks_of(seen, order)
                    masks = {
                        (name, chosen.index(order[place])): mask
                        for (name, place), mask in drawn.items()
                    }
                else:
                    assert not seen
                    masks = dict.fromkeys(
                        [(n, i) for n in ("up", "down") for i in range(2)], torch.ones(())
                    )
                same, truth = (
                    formula(dtype, dora, chosen, masks) for dtype in (torch.float32, torch.float64)
                )
                assert_same(found, same, truth)


def check_dora_training(folder: Path) -> None:
    """Three clipped steps train what one process trains, whichever came first."""

    def train(plan: Any, dtype: torch.dtype, after: bool = False) -> dict[str, torch.Tensor]:
        model = train_biases(pair(plan, dtype, ("b",), after))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            x = torch.randn(8, 17, generator=generator).to(dtype)
            model(x).square().mean().backward()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        named = model.named_parameters()
        return {n.replace("base_layer.", ""): full_tensor(p.detach()) for n, p in named}

    same, truth = train(None, torch.float32), train(None, torch.float64)
    before = dict(pair(None, torch.float32, ("b",)).named_parameters())
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        key = f"base_model.model.down.{name}.b.weight"
        assert not torch.equal(same[key], before[key])
    for after in (False, True):
        assert_same(train(LAYOUTS[0], torch.float32, after), same, truth)


def check_dora_fresh(folder: Path) -> None:
    """A new adapter's magnitudes are the norms of whole rows, also while others are merged."""
    model = pair(LAYOUTS[0], torch.float64, ("b",))
    alone = pair(None, torch.float64, ("b",))
    fresh = {"target_modules": ["up", "down"], "use_dora": True, "init_lora_weights": False}
    for merged in (False, True):
        for each in (model, alone) if merged else ():
            each.merge_adapter()
        name = f"fresh{merged}"
        model.add_adapter(name, fastlora.LoraConfig(r=4, **fresh))
        for part in ("up", "down"):
            layer = model.get_base_model().get_submodule(part)
            magnitude = layer.lora_magnitude_vector[name].weight
            assert magnitude.placements == layer.lora_B[name].weight.placements
            weight = pair(None, torch.float64).get_base_model().get_submodule(part).weight
            truth = torch.linalg.vector_norm(weight + layer.get_delta_weight(name), dim=1)
            assert_within_budget(full_tensor(magnitude).float(), truth.float(), truth, part)
        model.delete_adapter(name)


def write(model: Any, what: str) -> None:
    """Writes into the parameters of a pair in place, as ``what`` says."""
    if what == "zeros":  # one row of `down` has nothing in the first half of x, another nothing
        down = model.get_base_model().down
        for parameter, columns in ((down.weight, 11), (down.lora_B["b"].weight, 5)):
            tensor = full_tensor(parameter.detach()).clone()
            tensor[3, :columns] = 0.0
            tensor[4] = 0.0
            copy_full_tensor_(parameter, tensor)
    elif what == "state":
        for name, tensor in model.state_dict().items():
            if ".b." in name:
                copy_full_tensor_(tensor, full_tensor(tensor) * 1.5)
    else:
        for name, parameter in model.named_parameters():
            if what in name if "lora" in what else "lora" not in name:
                parameter.mul_(1.5)


def check_dora_cached_norms(folder: Path) -> None:
    """What is cached without gradients is cleared at a change, if in one process only."""
    x = torch.randn(5, 17, generator=torch.Generator().manual_seed(3))
    kinds = ((LAYOUTS[0], torch.float32), (None, torch.float32), (None, torch.float64))
    models = [pair(plan, dtype, ("b",)).eval() for plan, dtype in kinds]
    model, same, truth = models

    def outputs() -> list[torch.Tensor]:
        return [each(x.double() if each is truth else x) for each in models]

    with torch.no_grad():
        for change in ("lora_A", "lora_B", "lora_magnitude", "base", "zeros", "state"):
            for _ in range(2):
                assert_within_budget(*outputs(), change)
                with contextlib.ExitStack() as stack:
                    for each in models:
                        stack.enter_context(fastlora.adapters(each, IDS[:5]))
                    assert_within_budget(*outputs(), change)
            for each in models:
                write(each, change)
            for each in (same, truth):
                fastlora.clear_caches(each)  # these are right whatever they keep
        assert_within_budget(*outputs())
        down, computed = model.get_base_model().down, dora_norms.squared_row_norms_with_update
        with mock.patch.object(
            dora_norms, "squared_row_norms_with_update", side_effect=computed
        ) as sums:
            model(x)
            assert not sums.called
            if steps.rank() == 0:
                down.lora_A["b"].weight.to_local().add_(0.0)
            assert_within_budget(*outputs())
            assert sums.call_count == (steps.rank() == 0)
        # A load into the parts of what state_dict() gave.
        state = model.state_dict()
        for each in models[1:]:
            each.get_base_model().down.weight.mul_(1.5)
            fastlora.clear_caches(each)
        state["base_model.model.down.base_layer.weight"].to_local().mul_(1.5)
        assert_within_budget(*outputs())


def check_written_while_merged(folder: Path) -> None:
    """What was written stays, by whichever process, and the update alone is taken out."""
    for dora in ((), ("b",)):
        model, same, truth = (
            pair(plan, dtype, dora)
            for plan, dtype in (
                (LAYOUTS[0], torch.float32),
                (None, torch.float32),
                (None, torch.float64),
            )
        )
        found = []
        for each in (model, same, truth):
            each.merge_adapter()
            layers = each.get_base_model()
            with torch.no_grad():
                for layer in (layers.up, layers.down):
                    base = layer.get_base_layer()
                    base.bias.add_(3.0)
                    base.weight.mul_(2.0)
                if each is model and steps.rank() == 0:
                    layers.down.base_layer.weight.to_local().add_(0.0)
            each.unmerge_adapter()
            bases = [layer.get_base_layer() for layer in (layers.up, layers.down)]
            found.append(
                [full_tensor(p).detach() for base in bases for p in (base.weight, base.bias)]
            )
        for mine, near, exact in zip(*found, strict=True):
            assert_within_budget(mine, near, exact)
    model = pair(LAYOUTS[0], torch.float32, ("b",))
    down = model.get_base_model().down
    down.merge()
    if steps.rank() == 0:  # who was not written to must not restore alone
        with torch.no_grad():
            down.base_layer.weight.to_local().add_(0.0)
    down.unmerge()


def check_dora_errors(folder: Path) -> None:
    """One error in every process, before anything changes."""
    model = pair(LAYOUTS[0], torch.float64, ("b",))
    config = {"target_modules": ["up", "down"], "use_dora": True}
    raises(ConfigError, "lora_bias", fastlora.LoraConfig, lora_bias=True, **config)
    assert "which DoRA scales; several active" in fastlora.fusion_report(model).rows[0].reason
    # A row of the second process's shard alone has no magnitude.
    up = model.get_base_model().up
    with torch.no_grad():
        magnitude = full_tensor(up.lora_magnitude_vector["b"].weight).clone()
        magnitude[-1] = 0.0
        copy_full_tensor_(up.lora_magnitude_vector["b"].weight, magnitude)
        up.merge(keep_base=False)
        merged = full_tensor(up.weight).clone()
        raises(AdapterStateError, "cannot be unmerged", up.unmerge)
        assert torch.equal(full_tensor(up.weight), merged) and up.merged_adapters == [
            "default",
            "b",
        ]
    model = pair(LAYOUTS[0], torch.float64, ("b",))
    up = model.get_base_model().up
    with torch.no_grad():
        magnitude[-1] = float("inf")
        copy_full_tensor_(up.lora_magnitude_vector["b"].weight, magnitude)
    raises(AdapterStateError, "not finite", model.merge_adapter, safe_merge=True)
    assert not up.merged_adapters
