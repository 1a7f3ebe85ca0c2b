"""Training in mixed batches: every adapter's steps are those of its solo run."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

import fastlora
from fastlora.testing import assert_within_budget
from fastlora.train import (
    AdapterOptimizers,
    adapter_parameters,
    count_tokens,
    train_adapters,
)
from fastlora.validation import AdapterNotFoundError, AdapterStateError, CheckpointError
from tests.support.mixed_training import (
    CONFIGS,
    NAMES,
    OPTIMIZERS,
    SCHEDULERS,
    batch,
    build,
    gradients,
    losses_of,
    make,
    only,
    parameters,
    run,
    same,
    uneven_steps,
)
from tests.support.tiny import TwoLayers


def test_joint_training_is_solo_training() -> None:
    """20 uneven steps with dropout, schedules and clipping: each adapter ends where it does alone.

    In float64, so that equal means equal in every digit that AdamW could blow up.
    """
    steps = uneven_steps(20, torch.float64)
    joint = build(torch.float64, dropout=0.1)
    start = {name: parameters(joint, name) for name in CONFIGS}
    optimizers = make(joint)
    run(joint, optimizers, steps)
    for name in CONFIGS:
        solo = build(torch.float64, dropout=0.1)
        own = [rows for rows in (only(data, name) for data in steps) if rows is not None]
        assert len(own) < len(steps)  # in some step it had no row
        alone = make(solo)
        run(solo, alone, own)
        assert optimizers.counts[name] == alone.counts[name]
        expected = parameters(solo, name)
        for key, parameter in parameters(joint, name).items():
            torch.testing.assert_close(parameter, expected[key], msg=key)
            assert not torch.equal(parameter, start[name][key]), key


def test_absent_adapters_do_not_move() -> None:
    """Neither parameters nor optimizer state nor schedule, nor with gradients of zeros."""
    model = build()
    optimizers = make(model)
    run(model, optimizers, [batch(NAMES)])
    before = {name: parameters(model, name) for name in CONFIGS}
    rates = {name: o.param_groups[0]["lr"] for name, o in optimizers.by_adapter.items()}
    for parameter in adapter_parameters(model, "a").values():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.backward(losses_of(model, batch(["b", "c", "b"])))
    report = optimizers.step()
    assert report.stepped == ("b", "c") and set(report.grad_norms) == {"b", "c"}
    for name in ("a", "d"):
        assert same(parameters(model, name), before[name])
        assert optimizers.by_adapter[name].param_groups[0]["lr"] == rates[name]
        assert optimizers.counts[name].steps == 1
        for state in optimizers.by_adapter[name].state.values():
            assert state["step"] == 1
    assert optimizers.by_adapter["c"].param_groups[0]["lr"] != rates["c"]
    assert not same(parameters(model, "b"), before["b"])


def test_accumulated_batches_are_one_large_batch() -> None:
    """Micro-batches with different adapters: one step each, with the large batch's gradient."""
    names = ["a", "b", "c", "a", "a", "d", "b", "a"]
    x, labels, _ = batch(names)
    tokens = count_tokens(labels, names)

    def accumulated(dtype: torch.dtype, parts: int) -> tuple[Any, AdapterOptimizers]:
        model = build(dtype)
        optimizers = make(model)
        for rows in torch.arange(8).chunk(parts):
            part = [names[i] for i in rows]
            optimizers.backward(
                losses_of(model, (x[rows].to(dtype), labels[rows], part), None, tokens)
            )
        return model, optimizers

    model, optimizers = accumulated(torch.float32, 4)
    (same_dtype, _), (truth, _) = accumulated(torch.float32, 1), accumulated(torch.float64, 1)
    for name in CONFIGS:
        alone, exact = gradients(same_dtype, name), gradients(truth, name)
        for key, gradient in gradients(model, name).items():
            assert_within_budget(gradient, alone[key], exact[key], key)
    assert optimizers.step().stepped == tuple(CONFIGS)
    assert [count.steps for count in optimizers.counts.values()] == [1, 1, 1, 1]


def test_each_adapter_is_clipped_by_its_own_norm() -> None:
    """Bit for bit what `clip_grad_norm_` over that adapter's parameters gives."""
    model, twin = build(), build()
    limits = {"a": 0.01, "b": 1e6}
    optimizers = make(model, max_grad_norm=limits)
    optimizers.backward(losses_of(model, batch(NAMES)))
    losses_of(twin, batch(NAMES)).total.backward()
    report = optimizers.step()
    for name in CONFIGS:
        own = list(adapter_parameters(twin, name).values())
        norm = nn.utils.clip_grad_norm_(own, limits.get(name, float("inf")))
        assert report.grad_norms[name] == norm.item()
        assert same(gradients(model, name), gradients(twin, name))
    assert report.grad_norms["a"] > limits["a"]


# ---------------------------------------------------------------------------------- not finite


def poison(model: Any, name: str, value: float = float("nan")) -> torch.Tensor:
    """Puts a value into an adapter's factor; returns what was there."""
    weight = model.base_model.model.q.lora_A[name].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = value
    return before


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    """The others' gradients are bit for bit as ever; its own from earlier batches stay."""
    model, twin = build(), build()
    optimizers, others = make(model), make(twin)
    for one, each in ((model, optimizers), (twin, others)):
        each.backward(losses_of(one, batch(["c", "a"], seed=1)))
    earlier = gradients(model, "c")
    healthy = poison(model, "c")
    losses = losses_of(model, batch(NAMES))
    assert losses.non_finite == ("c",) and losses.finite == ("b", "a", "d")
    optimizers.backward(losses)
    others.backward(losses_of(twin, batch(NAMES)))
    with torch.no_grad():
        model.base_model.model.q.lora_A["c"].weight.copy_(healthy)
    assert same(gradients(model, "c"), earlier)
    for name in ("a", "b", "d"):
        assert same(gradients(model, name), gradients(twin, name))
    report = optimizers.step()
    assert report.stepped == tuple(CONFIGS) and report.left_out == ("c",)
    assert optimizers.counts["c"].non_finite_losses == 1
    assert optimizers.counts["a"].non_finite_losses == 0
    optimizers.zero_grad()
    poison(model, "c")
    before = parameters(model, "a")
    optimizers.backward(losses_of(model, batch(["c", "c"])))
    report = optimizers.step()
    assert (report.stepped, report.skipped, report.left_out) == ((), (), ("c",))
    assert same(parameters(model, "a"), before)


def test_the_total_spoils_no_other_adapter() -> None:
    """Back-propagated without `AdapterOptimizers`, NaN stays in the adapter whose loss it is."""
    model, twin = build(), build()
    poison(model, "c")
    losses = losses_of(model, batch(NAMES))
    assert losses.total.item() == sum(losses.by_adapter[name] for name in losses.finite).item()
    losses.total.backward()
    losses_of(twin, batch(NAMES)).total.backward()
    for name in ("a", "b", "d"):
        assert same(gradients(model, name), gradients(twin, name))


def test_a_gradient_that_is_not_finite_skips_its_step() -> None:
    """That adapter's alone: parameters, optimizer state and schedule stay; it is named."""
    model, twin = build(), build()
    optimizers, others = make(model), make(twin)
    for one, each in ((model, optimizers), (twin, others)):
        run(one, each, [batch(NAMES, seed=1)])
        each.backward(losses_of(one, batch(NAMES)))
    next(iter(adapter_parameters(model, "a").values())).grad[0, 0] = float("inf")
    before, rate = parameters(model, "a"), optimizers.by_adapter["a"].param_groups[0]["lr"]
    report = optimizers.step()
    others.step()
    assert report.skipped == ("a",) and report.stepped == ("b", "c", "d")
    assert report.grad_norms["a"] == float("inf")
    assert same(parameters(model, "a"), before)
    assert optimizers.by_adapter["a"].param_groups[0]["lr"] == rate
    assert all(state["step"] == 1 for state in optimizers.by_adapter["a"].state.values())
    assert (optimizers.counts["a"].steps, optimizers.counts["a"].skipped_steps) == (1, 1)
    for name in ("b", "c", "d"):
        assert same(parameters(model, name), parameters(twin, name))


def test_each_adapter_has_its_own_loss_scale() -> None:
    """Powers of two change no bit; an overflow lowers the scale of its adapter alone."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=2.0**10, growth_interval=2)
    model, twin = build(), build()
    optimizers, plain = make(model, scaler=scaler), make(twin)
    steps = [batch(NAMES, seed) for seed in range(3)]
    run(model, optimizers, steps)
    run(twin, plain, steps)
    for name in CONFIGS:
        assert same(parameters(model, name), parameters(twin, name))
    optimizers.backward(losses_of(model, batch(NAMES)))
    next(iter(adapter_parameters(model, "b").values())).grad.fill_(float("inf"))
    assert optimizers.step().skipped == ("b",)
    scales = {name: state["scaler"]["scale"] for name, state in optimizers.state_dict().items()}
    # Grown after two good steps and four; halved in place of the second growth.
    assert scales == {"a": 2.0**12, "b": 2.0**10, "c": 2.0**12, "d": 2.0**12}


# --------------------------------------------------------------------------------------- state


def test_a_loss_without_its_scale_does_not_step() -> None:
    """Unscaled gradients would be divided by the scale all the same."""
    model = build()
    optimizers = make(model, scaler=partial(torch.amp.GradScaler, "cpu"))
    before = parameters(model, "a")
    losses_of(model, batch(["a", "b"])).total.backward()
    with pytest.raises(AdapterStateError, match="'a' was not multiplied by its loss scale"):
        optimizers.step(["a"])
    assert same(parameters(model, "a"), before)
    optimizers.zero_grad()
    optimizers.backward(losses_of(model, batch(["a", "b"])))
    assert set(optimizers.step().stepped) == {"a", "b"}


def test_the_norm_is_that_of_the_parameters_that_are_updated() -> None:
    """An optimizer may hold some of them; with a scaler, the others keep scaled gradients."""
    norms = []
    for scaler in (None, partial(torch.amp.GradScaler, "cpu", init_scale=2.0**10)):
        model = build()
        some = {"a": lambda own: SGD(own[:2], lr=0.1)}
        optimizers = AdapterOptimizers(model, some, scaler=scaler, max_grad_norm=1.0)
        optimizers.backward(losses_of(model, batch(["a", "a"])))
        norms.append(optimizers.step().grad_norms["a"])
        own = [*adapter_parameters(model, "a").values()][:2]
        clipped = torch.cat([p.grad.flatten() for p in own if p.grad is not None]).norm()
        assert norms[-1] > 1 and float(clipped) == pytest.approx(1.0, rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_dropout_seeds_are_each_adapters_own() -> None:
    """They depend on the adapter and its own forwards, and on nothing else in the batch."""
    one, other = make(build()), make(build())
    first = one.draw_seeds(["a", None, "b", "a", "__base__"])
    second = one.draw_seeds(["b"])
    assert first.keys() == {"a", "b"} and second.keys() == {"b"}
    assert len({*first.values(), *second.values()}) == 3
    assert other.draw_seeds(["b"]) == {"b": first["b"]}
    assert other.draw_seeds(["c", "b"])["b"] == second["b"]
    assert make(build(), seed=1).draw_seeds(["b"])["b"] not in (first["b"], second["b"])


def test_resuming_is_exact() -> None:
    """State and weights through a file, into new objects: the run goes on bit for bit."""
    steps = uneven_steps(8, torch.float32)
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=4.0, growth_interval=2)
    whole = build(dropout=0.1)
    optimizers = make(whole, scaler=scaler)
    run(whole, optimizers, steps[:5])
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizers.state_dict()), file)
    run(whole, optimizers, steps[5:])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = build(dropout=0.1)
    resumed.load_state_dict(weights)
    again = make(resumed, scaler=scaler, seed=5)
    again.load_state_dict(state)
    run(resumed, again, steps[5:])
    assert again.counts == optimizers.counts
    ends = [{n: s["scaler"] for n, s in o.state_dict().items()} for o in (again, optimizers)]
    assert ends[0] == ends[1]
    for name in CONFIGS:
        assert same(parameters(resumed, name), parameters(whole, name))


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    """Another rank, optimizer or schedule, and unknown names, are refused as a whole."""
    model = build()
    optimizers = make(model)
    run(model, optimizers, [batch(NAMES)])
    good = optimizers.state_dict()
    rank = {**good["b"], "kind": {**good["b"]["kind"], "parameters": [[2, 16], [24, 2]]}}
    raising: list[tuple[Any, type[Exception], str]] = [
        ({"a": good["a"], "b": rank}, CheckpointError, r"'b' has parameters \[\[2, 16\], \[24, 2"),
        ({"b": good["a"]}, CheckpointError, "optimizer AdamW; expected SGD"),
        ({"a": good["c"]}, CheckpointError, "scheduler LinearLR; expected ExponentialLR"),
        ({"a": {"kind": good["a"]["kind"]}}, CheckpointError, "has no 'optimizer'"),
        ({"a": good["a"], "e": good["a"]}, AdapterNotFoundError, "'e' has no optimizer; adapters"),
    ]
    fresh = make(build())
    for state, error, message in raising:
        with pytest.raises(error, match=message):
            fresh.load_state_dict(state)
        assert fresh.counts["a"].steps == 0 and not fresh.by_adapter["a"].state


# ------------------------------------------------------------------------------------ adapters


def test_which_adapters_train() -> None:
    """Those named alone, two with their own head among them; the active adapter stays."""
    model = build()
    train_adapters(model, ["c", "d"])
    assert model.active_adapters == ["a"]
    for name in CONFIGS:
        trains = {p.requires_grad for p in adapter_parameters(model, name).values()}
        assert trains == {name in ("c", "d")}
    own = {k: p for k, p in model.named_parameters() if ".c." in k}
    assert adapter_parameters(model, "c").keys() == own.keys()
    assert sum(p.requires_grad for p in model.parameters()) == sum(
        len(adapter_parameters(model, name)) for name in ("c", "d")
    )


def test_shared_biases_train_alone() -> None:
    """An adapter that trains the base model's biases cannot share a batch."""
    config = fastlora.LoraConfig(r=2, target_modules=["q"], bias="all")
    model = fastlora.get_peft_model(TwoLayers(), config, adapter_name="a")
    model.add_adapter("b", fastlora.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(AdapterStateError, match="'a' has bias='all'.*all adapters share"):
        train_adapters(model, ["a", "b"])
    train_adapters(model, "a")
    assert model.base_model.model.head.bias.requires_grad
    assert any(key.endswith("head.bias") for key in adapter_parameters(model, "a"))


BAD_OPTIMIZERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"optimizers": {"aa": SGD}}, AdapterNotFoundError, "named 'aa'.*close names: a"),
    "none": ({"optimizers": {}}, ValueError, "no adapters were given"),
    "schedule": (
        {"schedulers": {"b": SCHEDULERS["a"]}},
        AdapterNotFoundError,
        "schedulers names adapter 'b', which has no optimizer",
    ),
    "norm_name": (
        {"max_grad_norm": {"b": 1.0}},
        AdapterNotFoundError,
        "max_grad_norm names adapter 'b'",
    ),
    "norm": ({"max_grad_norm": 0.0}, ValueError, "of adapter 'a' must be greater than 0, got 0.0"),
    "kind": ({"optimizers": {"a": list}}, TypeError, "returned list; expected a torch.optim.Op"),
    "closure": ({"optimizers": {"a": LBFGS}}, TypeError, r"'a': LBFGS.step\(\) requires closure"),
    "plateau": ({"schedulers": {"a": ReduceLROnPlateau}}, TypeError, "returned ReduceLROnPlateau"),
    "frozen": ({"optimizers": {"b": SGD}}, AdapterStateError, "adapter 'b' is frozen"),
}


@pytest.mark.parametrize("case", BAD_OPTIMIZERS)
def test_bad_optimizers_raise(case: str) -> None:
    """Unknown and frozen adapters, and what does not make an optimizer or a schedule."""
    arguments, error, message = BAD_OPTIMIZERS[case]
    model = build()
    train_adapters(model, "a")
    with pytest.raises(error, match=message):
        AdapterOptimizers(model, **{"optimizers": {"a": OPTIMIZERS["a"]}, **arguments})


def test_bad_steps_raise() -> None:
    """Parameters of others, half precision with a scaler, frozen or unknown adapters, no rows."""
    model = build()
    everything = {"a": lambda _: SGD(model.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match="'a' holds parameters that do not belong to the adapter"):
        AdapterOptimizers(model, everything)
    with pytest.raises(TypeError, match=r"lora_A.a.weight is torch.float16; expected torch.float3"):
        make(build(torch.float16), scaler=torch.amp.GradScaler)
    shared = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="scaler returned the same object twice"):
        make(model, scaler=lambda: shared)
    optimizers = AdapterOptimizers(model, {"a": OPTIMIZERS["a"], "b": OPTIMIZERS["b"]})
    losses = losses_of(model, batch(["a", "c"]))
    with pytest.raises(AdapterNotFoundError, match="'c' has no optimizer; adapters"):
        optimizers.backward(losses)
    with pytest.raises(AdapterNotFoundError, match="'c' has no optimizer; adapters"):
        optimizers.draw_seeds(["a", "c"])
    with pytest.raises(AdapterStateError, match="'b' has no gradients"):
        optimizers.step(["b"])
    losses = losses_of(model, batch(["a", "b"]))
    train_adapters(model, ["b"])
    with pytest.raises(AdapterStateError, match="adapter 'a' is frozen"):
        optimizers.backward(losses)
    assert all(gradient is None for n in CONFIGS for gradient in gradients(model, n).values())
    assert optimizers.counts["a"].forwards == 0
    assert optimizers.step().stepped == ()
