"""Tensor parallelism through DTensor; run by test_processes.py."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastlora
from fastlora.integrations.distributed import clip_grad_norm_, tensor_parallel
from fastlora.layers.tensor_parallel import TensorParallelLoraLinear
from fastlora.sharding import copy_full_tensor_, full_tensor
from fastlora.testing import assert_within_budget
from fastlora.train import AdapterOptimizers, causal_lm_losses, train_adapters
from fastlora.validation import AdapterStateError, ImplementationError, UnsupportedLayerError
from tests.distributed.checks_tensor_parallel_dora import (  # noqa: F401  # run in the same two processes
    check_dora_cached_norms,
    check_dora_dropout,
    check_dora_errors,
    check_dora_fresh,
    check_dora_training,
    check_layouts,
    check_written_while_merged,
)
from tests.support.distributed import steps
from tests.support.distributed.split_models import IDS, LAYOUTS, PLAN, Pair, assert_same, mesh, pair
from tests.support.distributed.steps import raises


def check_inference_mode(folder: Path) -> None:
    """Forwards in it are those without gradients, mixed rows and DoRA too."""
    x = torch.randn(8, 17, generator=torch.Generator().manual_seed(3))
    for plan in LAYOUTS:
        model = pair(plan, torch.float32, ("b",)).eval()
        for ids in (None, IDS):
            found = []
            for mode in (torch.no_grad, torch.inference_mode):
                routed = contextlib.nullcontext() if ids is None else fastlora.adapters(model, ids)
                with mode(), routed:
                    found.append(model.get_base_model()(x.clone()))
            torch.testing.assert_close(found[1], found[0])


def check_fresh_factors(folder: Path) -> None:
    """Whole factors are the same in every process although their generators were not."""
    torch.manual_seed(steps.rank())
    base = parallelize_module(Pair(), mesh(), dict(LAYOUTS[0]))
    model = fastlora.get_peft_model(base, fastlora.LoraConfig(target_modules=["up", "down"]))
    for factor in (model.get_base_model().up.lora_A, model.get_base_model().down.lora_B):
        own = factor["default"].weight.to_local().contiguous()
        parts = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(parts, own)
        assert torch.equal(*parts)


def check_training(folder: Path) -> None:
    """A Llama split over processes trains what one process trains, whichever came first."""
    first = steps.build()
    tensor_parallel(first, mesh(), dict(PLAN))
    base = steps.tiny_llama(tie_word_embeddings=False)
    parallelize_module(base, mesh(), dict(PLAN))
    second = fastlora.get_peft_model(base, fastlora.LoraConfig(**steps.CONFIG)).train()
    values = steps.trained(steps.build())
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if parameter.requires_grad:
                copy_full_tensor_(parameter, values[name.replace("base_layer.", "")])
    for model in (first, second):
        rows = fastlora.fusion_report(model).rows
        assert len(rows) == 14 and all("tensor parallel" in row.reason for row in rows)
        steps.train(model, half=False)
        steps.assert_as_one(model)


def check_adapter_optimizers(folder: Path) -> None:
    """Adapters of a mixed batch step as in one process: here all have the same rows."""

    def train(plan: dict[str, Any] | None, dtype: torch.dtype, **group: Any) -> dict[str, Any]:
        model = pair(plan, dtype, ("b",))
        train_adapters(model, ["default", "b"])
        makers = {n: functools.partial(torch.optim.SGD, lr=1e-3) for n in ("default", "b")}
        optimizers = AdapterOptimizers(model, makers, max_grad_norm=1.0, **group)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(8, 3, 17, generator=generator).to(dtype)
        labels = torch.randint(0, 10, (8, 3), generator=generator)
        with fastlora.adapters(model, IDS):
            logits = model(x)
        optimizers.backward(causal_lm_losses(logits, labels, IDS))
        assert optimizers.step().stepped == ("default", "b")
        named = model.named_parameters()
        return {n.replace("base_layer.", ""): full_tensor(p.detach()) for n, p in named}

    truth = train(None, torch.float64, group=None)
    same = train(None, torch.float32, group=None)
    found = train(LAYOUTS[0], torch.float32)
    assert_same(found, same, truth)


def check_split_and_whole_layers(folder: Path) -> None:
    """An adapter on layers of both kinds trains with an optimizer that takes them one by one."""
    plan = {name: style for name, style in PLAN.items() if ".mlp." in name}
    model = tensor_parallel(steps.build(), mesh(), plan)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, foreach=False)
    steps.train(model, half=False, optimizer=optimizer, clip=clip_grad_norm_)
    steps.assert_as_one(model)


def check_files_and_merging(folder: Path) -> None:
    """Saved from shards as from one process, loaded into shards; merged, unmerged and unloaded."""
    x = torch.randn(5, 17, generator=torch.Generator().manual_seed(3)).double()
    for dora in ((), ("b",)):
        model, alone = (pair(plan, torch.float64, dora) for plan in (LAYOUTS[0], None))
        same = pair(None, torch.float32, dora)
        split, whole_ = folder / f"split{len(dora)}", folder / f"alone{len(dora)}"
        model.save_pretrained(split)
        if steps.rank() == 0:
            alone.save_pretrained(whole_)
        dist.barrier()
        for file in ("adapter_model.safetensors", "b/adapter_model.safetensors"):
            saved, expected = (load_file(path / file) for path in (split, whole_))
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())
        torch.manual_seed(0)
        base = parallelize_module(Pair().double(), mesh(), dict(LAYOUTS[0]))
        again = fastlora.LoraModel.from_pretrained(base, split)
        again.load_adapter(split / "b", "b")
        assert again.get_base_model().down.get_delta_weight("b").shape == (10, 22)

        def near(found: torch.Tensor, same: Any = same, alone: Any = alone) -> None:
            assert_within_budget(found.float(), same(x.float()), alone(x))

        with torch.no_grad():
            for active in (["default", "b"], ["b", "default"]):
                for each in (model, again, alone, same):
                    each.set_adapter(active)
                expected = model(x)
                assert torch.equal(again(x), expected)
                near(expected)
                again.merge_adapter(safe_merge=True)
                near(again(x))
                again.unmerge_adapter()
                assert torch.equal(again(x), expected)
            for layer in (again.get_base_model().up, again.get_base_model().down):
                layer.merge(keep_base=False)
                layer.unmerge()  # computed back
            near(again(x))
            bare = again.merge_and_unload()
            assert type(bare.up) is nn.Linear and len(bare.up._forward_hooks) == 1  # torch's own
            near(bare(x))


def dropped(name: str, shown: list[tuple[int, int]], x: torch.Tensor) -> torch.Tensor:
    """What one layer of a pair with weights of zeros gives where lora_B shows parts of the mask.

    ``shown`` are pairs of an output and the input whose mask it is to be.
    """
    base = parallelize_module(Pair(), mesh(), dict(LAYOUTS[0]))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    r = base.get_submodule(name).in_features
    config = fastlora.LoraConfig(r=r, lora_alpha=r, target_modules=[name], lora_dropout=0.5)
    layer = fastlora.get_peft_model(base, config).train().get_base_model().get_submodule(name)
    lora_b = torch.zeros(layer.out_features, r)
    for output, seen in shown:
        lora_b[output, seen] = 1.0
    with torch.no_grad():
        copy_full_tensor_(layer.lora_A["default"].weight, torch.eye(r))
        copy_full_tensor_(layer.lora_B["default"].weight, lora_b)
    return layer(x)


def check_dropout(folder: Path) -> None:
    """Column-parallel layers drop the same elements in all processes, row-parallel ones do not."""
    torch.manual_seed(steps.rank())
    shown = [(i, i) for i in range(11)] + [(11 + i, i) for i in range(11)]
    own = dropped("up", shown, torch.ones(64, 17)).detach()
    assert set(own.flatten().tolist()) == {0.0, 2.0}
    parts = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(parts, own)
    assert torch.equal(*parts)

    torch.manual_seed(0)
    shown = [(i, i) for i in range(5)] + [(5 + i, 11 + i) for i in range(5)]
    y = dropped("down", shown, torch.ones(64, 11)).detach()
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(y[:, :5], y[:, 5:])


def check_errors(folder: Path) -> None:
    """What cannot be right is an error that says what to do."""
    for style in (ColwiseParallel(), RowwiseParallel()):
        base = pair(None, torch.float32).get_base_model()
        raises((KeyError, AttributeError), "", parallelize_module, base, mesh(), {"up": style})
    thin = parallelize_module(nn.Sequential(nn.Linear(4, 1)), mesh(), {"0": ColwiseParallel()})
    config = fastlora.LoraConfig(target_modules=["0"])
    raises(UnsupportedLayerError, "in every process", fastlora.get_peft_model, thin, config)
    model = pair(None, torch.float32)
    model.merge_adapter()
    raises(AdapterStateError, "unmerge_adapter", tensor_parallel, model, mesh(), dict(LAYOUTS[0]))
    split = pair(LAYOUTS[0], torch.float32)
    layer = split.get_base_model().up
    assert isinstance(layer, TensorParallelLoraLinear)
    layer.lora_A["b"].register_forward_hook(lambda *_: None)
    raises(UnsupportedLayerError, "has hooks", split, torch.randn(2, 17))
    layer.impl = "triton"
    with fastlora.adapters(split, ["default", "b"]):
        raises(ImplementationError, "mixed batches", split, torch.randn(2, 17))


def check_with_fsdp2(folder: Path) -> None:
    """FSDP2 over tensor parallelism, a mesh of two dimensions: trains, saves, loads."""
    for shape, dora in (((2, 1), False), ((1, 2), True)):
        both = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        model = steps.build(**(steps.DORA if dora else {}))
        tensor_parallel(model, both["tensor"], dict(PLAN))
        steps.shard(model, mesh=both["data"])
        steps.train(model, half=shape[0] == 2)
        steps.assert_as_one(model, use_dora=dora)
        expected = steps.trained(model)
        model.save_pretrained(folder / f"{shape}{dora}")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        model.load_adapter(folder / f"{shape}{dora}", "default")
        found = steps.trained(model)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        raises(UnsupportedLayerError, "parallelism and by FSDP2", model.merge_adapter)
        config = fastlora.LoraConfig(use_dora=dora, target_modules=["o_proj", "q_proj"])
        raises(AdapterStateError, "before you call fully_shard", model.add_adapter, "late", config)
