"""FSDP2 (`fully_shard`), and DistributedDataParallel; run by test_processes.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import fastlora
from fastlora.sharding import copy_full_tensor_, full_tensor
from fastlora.testing import assert_within_budget
from fastlora.train import train_adapters
from fastlora.validation import AdapterStateError, CheckpointError, UnsupportedLayerError
from tests.support.distributed import steps
from tests.support.distributed.split_models import assert_same
from tests.support.distributed.steps import raises


def check_data_parallel(folder: Path) -> None:
    """DDP: two processes with half of each batch train what one does with all of it."""
    model = torch.nn.parallel.DistributedDataParallel(steps.build())
    steps.train(model, half=True)
    steps.assert_as_one(model)


def check_steps(folder: Path) -> None:
    """Sharded parameters train as whole ones, whether gathered ones live on into the backward."""
    for reshard in (True, False):
        model = steps.shard(steps.build(), reshard_after_forward=reshard)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and not parameter._is_view(), name
        steps.train(model, half=True)
        steps.assert_as_one(model)


def check_layers_on_their_own(folder: Path) -> None:
    """Also with ``fully_shard`` on LoRA layers and on single factors, which are then called."""
    model = steps.build()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer.mlp.up_proj)
        fully_shard(layer.self_attn.q_proj.lora_A["default"])
    steps.shard(model)
    report = {row.name.rpartition(".")[2]: row for row in fastlora.fusion_report(model).rows}
    assert report["up_proj"].fused and report["v_proj"].fused
    assert not report["q_proj"].fused and "with hooks" in report["q_proj"].reason
    steps.train(model, half=True)
    steps.assert_as_one(model)


def check_accumulation(folder: Path) -> None:
    """Two backwards a step, the first without communication, are one of the whole batch."""
    model = steps.shard(steps.build())

    def backward(model: Any, ids: torch.Tensor) -> None:
        for place, part in enumerate(ids.chunk(2)):
            model.set_requires_gradient_sync(place == 1)
            (steps.loss_of(model, part) / 2).backward()

    steps.train(model, half=True, backward=backward)
    steps.assert_as_one(model)


def check_checkpointing(folder: Path) -> None:
    """Activation checkpointing of both kinds, in sharded layers and in DDP, changes nothing."""
    for reentrant in (False, True):
        for wrap in (steps.shard, torch.nn.parallel.DistributedDataParallel):
            model = steps.build()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.get_base_model().enable_input_require_grads()
            steps.train(wrap(model), half=True)
            steps.assert_as_one(model)


def check_mixed_precision(folder: Path) -> None:
    """bf16 in the forward, fp32 masters and fp32 sums: bit for bit what a bf16 model computes."""
    steps.check_mixed_precision_gradients(steps.build)


def check_scaler(folder: Path) -> None:
    """A loss scale: an overflow in one process's shard skips the step in all."""
    model = steps.shard(steps.build())
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = steps.trained(model)
    scaler.scale(steps.loss_of(model, steps.own_half(steps.tokens(0)))).backward()
    if steps.rank() == 0:
        next(p for p in parameters if p.to_local().numel()).grad.to_local().view(-1)[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(before[n], t) for n, t in steps.trained(model).items())


def check_adapter_files(folder: Path) -> None:
    """Adapters save from shards as from whole parameters, and load into shards again."""
    model = steps.shard(steps.build())
    model.save_pretrained(folder / "sharded")
    whole = steps.build()
    if steps.rank() == 0:
        whole.save_pretrained(folder / "whole")
    dist.barrier()
    saved, expected = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("sharded", "whole")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(folder / "sharded", "default", is_trainable=True)
    found, original = steps.trained(model), steps.trained(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())
    # A full state dict gathered by torch, which only the first process has.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    model.save_pretrained(folder / "full", state_dict=state, is_main_process=steps.rank() == 0)
    dist.barrier()
    again = load_file(folder / "full" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())
    # A disk that fails the writing process fails them all.
    (folder / "file").write_text("no folder")
    error, match = (
        (CheckpointError, "found a file") if steps.rank() == 0 else (CheckpointError, "see")
    )
    raises(error, match, model.save_pretrained, folder / "file")


def check_resume(folder: Path) -> None:
    """A sharded checkpoint, two more steps: the same as without the interruption, bit for bit."""
    model = steps.shard(steps.build(modules_to_save=["lm_head"]))
    optimizer = steps.train(model, half=True)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "dcp")
    steps.train(model, half=True, first=steps.STEPS, optimizer=optimizer)
    expected = steps.trained(model)

    resumed = steps.shard(steps.build(modules_to_save=["lm_head"]))
    parameters = [p for p in resumed.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    weights, moments = get_state_dict(resumed, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(
        resumed,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    steps.train(resumed, half=True, first=steps.STEPS, optimizer=optimizer)
    found = steps.trained(resumed)
    assert found.keys() == expected.keys() and any("lm_head" in name for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def check_generate(folder: Path) -> None:
    """Generation and evaluation of mixed batches, before and after a step."""
    model, whole = steps.build(), steps.build()
    steps.shard(model)
    register_fsdp_forward_method(model, "generate")
    ids = steps.tokens(0)
    for _ in range(2):
        for one in (model, whole):
            one.eval()
        exact = copy.deepcopy(whole).double()
        with torch.no_grad():
            for names in (["default", None, None, "default"],) * 3:  # packed from the second on
                found, expected, truth = (
                    one(input_ids=ids, adapter_names=names).logits for one in (model, whole, exact)
                )
                # Not bit for bit: a BLAS may add otherwise in weights that lie otherwise in memory.
                assert_within_budget(found, expected, truth.double(), "logits")
        arguments = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        found, expected = (one.generate(input_ids=ids, **arguments) for one in (model, whole))
        assert torch.equal(found, expected)
        # One batch for both, so that both models move alike.
        for one in (model, whole):
            one.train()
            steps.loss_of(one, ids).backward()
            with torch.no_grad():
                for parameter in one.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * parameter.grad


def check_patched_peft(folder: Path) -> None:
    """A patched PEFT model, sharded or in DDP: the gradients of one process."""
    try:
        import peft
    except ImportError:
        return

    def build(dtype: torch.dtype) -> Any:
        config = {**steps.CONFIG, "lora_bias": False}
        torch.manual_seed(1)
        base = steps.tiny_llama(tie_word_embeddings=False).to(dtype)
        model = peft.get_peft_model(base, peft.LoraConfig(**config))
        steps.randomize(model)
        assert fastlora.patch(model).fused == 14
        return model

    ids = steps.tokens(0)
    same, truth = build(torch.float32), build(torch.float64)
    for one in (same, truth):
        steps.loss_of(one, ids).backward()
    rounded, exact = dict(same.named_parameters()), dict(truth.named_parameters())
    for wrap in (steps.shard, torch.nn.parallel.DistributedDataParallel):
        model = build(torch.float32)
        wrapped = wrap(model)
        assert fastlora.fusion_report(model).fused == 14
        steps.loss_of(wrapped, steps.own_half(ids)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found = full_tensor(parameter.grad)
                assert_within_budget(found, rounded[name].grad, exact[name].grad, name)


def check_errors(folder: Path) -> None:
    """What cannot be right is an error that says what to do."""
    model = steps.shard(steps.build())
    assert fastlora.fusion_report(model).fused == len(fastlora.fusion_report(model).rows)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64)
    raises(UnsupportedLayerError, "register_fsdp_forward_method", layer, x)
    config = fastlora.LoraConfig(**steps.CONFIG)
    raises(AdapterStateError, "before you call fully_shard", model.add_adapter, "b", config)
    assert list(model.peft_config) == ["default"] and "b" not in layer.lora_A
    raises(UnsupportedLayerError, "sharded", model.merge_adapter)
    raises(UnsupportedLayerError, "sharded", model.merge_and_unload)
    base = steps.tiny_llama()
    for block in base.model.layers:
        fully_shard(block)
    raises(AdapterStateError, "before you call fully_shard", fastlora.get_peft_model, base, config)
    assert not any(isinstance(m, fastlora.layers.LoraLayer) for m in base.modules())


def check_dora(folder: Path) -> None:
    """DoRA: magnitudes are shards too; trains, and mixes with other rows, as in one process."""
    dora = steps.DORA

    def build(dtype: torch.dtype) -> Any:
        model = steps.build(dtype, **dora)
        model.add_adapter("b", fastlora.LoraConfig(r=5, target_modules=["q_proj", "v_proj"]))
        steps.randomize(model)
        train_adapters(model, ["default", "b"])
        return model

    model = steps.shard(steps.build(**dora))
    steps.train(model, half=True)
    steps.assert_as_one(model, use_dora=True)

    ids, names, gradients = steps.tokens(0), ["default", "b", None, "default"], []
    for model in (steps.shard(build(torch.float32)), build(torch.float32), build(torch.float64)):
        model(input_ids=ids, labels=ids, adapter_names=names).loss.backward()
        named = model.named_parameters()
        gradients.append({n: full_tensor(p.grad) for n, p in named if p.grad is not None})
    assert any("magnitude" in name for name in gradients[0])
    assert_same(*gradients)


def check_dora_norms_follow_shards(folder: Path) -> None:
    """What FSDP2 gathers lies where it lay before, at the version it had: no norm may be cached."""
    dora = steps.DORA
    model, whole_model = steps.shard(steps.build(**dora)).eval(), steps.build(**dora).eval()
    ids = steps.tokens(0)
    pairs = list(zip(model.named_parameters(), whole_model.parameters(), strict=True))
    with torch.no_grad():
        for step in range(12):
            found, expected = (one(input_ids=ids).logits for one in (model, whole_model))
            assert torch.equal(found, expected), step
            for (name, shard), parameter in pairs:
                if ("lora_" if step % 2 else "proj.weight") in name:
                    parameter.mul_(1.25)
                    copy_full_tensor_(shard, parameter)
    # An adapter that is there is read into its shards.
    if steps.rank() == 0:
        steps.build(**dora).save_pretrained(folder / "dora")
    dist.barrier()
    for one in (model, whole_model):
        one.load_adapter(folder / "dora", "default")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole_model(input_ids=ids).logits)
