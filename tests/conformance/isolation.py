"""Rows, adapters, threads and blocks that have nothing to do with each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.testing import assert_within_budget
from tests.support.conformance_cases import SEEDS, Case
from tests.support.conformance_models import SHAPES, Subject, direction
from tests.support.conformance_suite import invariant
from tests.support.conformance_truth import check, read_masks, results


def in_thread(run: Callable[[], Any]) -> Any:
    """What a function gives in another thread."""
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(run()))
    thread.start()
    thread.join()
    assert got, "the thread failed"
    return got[0]


def values_of(case: Case, turn: int) -> list[float]:
    """NaN and infinity; in Triton's interpreter, where a step takes a second, one of them."""
    both = [float("nan"), float("inf")]
    return both[turn % 2 :][:1] if case.impl == "triton" else both


@invariant(lambda case: case.source != "function", per=("source", "rows", "base", "feature"))
def nan_in_other_factors(case: Case) -> None:
    """NaN or infinity in an adapter's weights reaches its own rows, and nothing else."""
    if case.rows == "several" or (case.rows == "single" and case.source == "pool"):
        case = case._replace(rows="single", source="layer")
    subject = Subject(case)
    x, ids = subject.x(2), subject.ids()
    clean = subject.step(x)
    truth = results(subject, x, torch.float64, read_masks(subject, x))
    subject.net.eval()
    with torch.no_grad():
        plain, exact = subject.forward(x), results(subject, x, torch.float64, {})["y"]
    own = [i for i, name in enumerate(ids or []) if name == "fr"]
    others = [i for i in range(6) if i not in own]
    for index, end in enumerate(("A", "B", "bias", "m")):
        name = f"q.fr.{end}"
        if name not in subject.values:
            continue
        for value in values_of(case, index):
            poisoned = Subject(case)
            poisoned.values[name][-1].fill_(value)
            if case.trains:
                poisoned.put()
            else:
                poisoned.load("fr")
            found = poisoned.step(x)
            for key in ("y", "x"):
                rows = (t[key][others] for t in (found, clean, truth))
                assert_within_budget(*rows, f"{key} beside {name}")
            if own and value != value:  # tanh makes one of infinity
                assert found["y"][own].isnan().all()
            for key, gradient in found.items():
                if key.count(".") == 2 and ".fr." not in key:
                    assert_within_budget(gradient, clean[key], truth[key], key)
            with torch.no_grad():
                poisoned.net.eval()
                for _ in range(case.forwards):
                    y = poisoned.forward(x)[others]
                    assert_within_budget(y, plain[others], exact[others])


@invariant(per=("source", "rows", "base", "feature"))
def nan_in_own_row(case: Case) -> None:
    """NaN in a row of x stays in that row, and is not hidden there."""
    subject = Subject(case)
    x = subject.x(2)
    masks = read_masks(subject, x)
    clean, truth = subject.step(x), results(subject, x, torch.float64, masks)
    others = [0, 1, 3, 4, 5]
    for value in values_of(case, 0):
        bad = x.clone()
        bad[2] = value  # a row of "en"
        found = subject.step(bad)
        assert found["y"][2].isnan().all()
        for key in ("y", "x"):
            rows = (t[key][others] for t in (found, clean, truth))
            assert_within_budget(*rows, key)
        if case.rows == "mixed":
            for key, gradient in found.items():
                if key.count(".") == 2 and ".en." not in key:
                    assert_within_budget(gradient, clean[key], truth[key], key)
        subject.net.eval()
        with torch.no_grad():
            plain, exact = subject.forward(x), results(subject, x, torch.float64, {})["y"]
            for _ in range(case.forwards):
                y = subject.forward(bad)
                assert y[2].isnan().all()
                assert_within_budget(y[others], plain[others], exact[others])
        subject.net.train(case.drops)


@invariant(lambda case: case.rows == "mixed")
def joint_is_solo(case: Case) -> None:
    """Each adapter's rows and gradients are those of its rows alone, dropout included."""
    subject = Subject(case)
    x, ids = subject.x(), case.ids
    masks = read_masks(subject, x)
    joint = subject.step(x)
    check(subject, joint, x, masks=masks)
    for name in dict.fromkeys(ids):
        rows = [i for i, own in enumerate(ids) if own == name]
        alone, own_ids = x[rows], [name] * len(rows)
        dy = direction(joint["y"])[rows]
        # With the masks that the adapter had in the joint batch.
        check(subject, subject.step(alone, own_ids, dy), alone, own_ids, dy=dy, masks=masks)


@invariant(lambda case: case.drops, per=("source", "rows", "base", "feature"))
def dropout(case: Case) -> None:
    """The same seed drops the same, another one does not; layers differ; the rate is p."""
    subject = Subject(case)
    x = subject.x(12 if case.impl == "triton" else 40)
    known = {n: s for n, s in SEEDS.items() if n in subject.adapters}
    seeds = {"seeds": known} if case.rows == "mixed" else {}
    masks, again = (read_masks(subject, x, **seeds) for _ in range(2))
    for key, mask in masks.items():
        p = subject.adapters[key[1]].get("lora_dropout", 0.0)
        assert torch.equal(mask, again[key])
        kept, sigma = (mask != 0).double().mean(), (p * (1 - p) / mask.numel()) ** 0.5
        assert abs(kept - (1 - p)) <= 5 * sigma, key
        if key[0] == "q" and ("k", key[1]) in masks and p:
            apart = ((mask != 0) != (masks["k", key[1]] != 0)).double().mean()
            assert apart > p * (1 - p), key
    if case.rows == "several" and ("q", "fr") in masks:  # one does not drop what another drops
        assert ((masks["q", "fr"] != 0) & (masks["q", "en"] == 0)).any()
    x = subject.x()
    drawn = subject.forward(x, **seeds)
    assert torch.equal(drawn, subject.forward(x, **seeds))
    if seeds:
        other = subject.forward(x, seeds={**known, "fr": 5})
        own = [i for i, name in enumerate(case.ids) if name == "fr"]
        changed = [i for i in range(6) if not torch.equal(other[i], drawn[i])]
        drops = [n for n, c in subject.adapters.items() if n == "fr" and "lora_dropout" in c]
        assert changed == (own if drops else [])
    else:
        with torch.no_grad():
            assert not torch.equal(subject.call(x), subject.call(x))


@invariant(lambda case: case.rows == "mixed" and case.trains, per=("source", "base", "feature"))
def unused_adapters(case: Case) -> None:
    """An adapter without rows gets no gradient, or zeros where they are asked for."""
    subject = Subject(case)
    x = subject.x()
    for ids in (["en"] * 6, ["fr", None] * 3, [None] * 6):
        masks = read_masks(subject, x, ids)
        check(subject, subject.step(x, ids), x, ids, masks=masks)
        found = subject.step(x, ids, unused_gradients=True)
        check(subject, found, x, ids, zeros=True, masks=masks)


@invariant(per=("source", "rows", "base", "feature"))
def checkpoints_and_threads(case: Case) -> None:
    """A forward that is done again, outside its block and in another thread, does the same."""
    subject = Subject(case)
    mixes = [case.ids, case.ids[::-1]] if case.rows == "mixed" else [subject.ids()] * 2

    def run(kind: str) -> list[dict[str, torch.Tensor]]:
        leaves, outputs = [subject.x().requires_grad_() for _ in mixes], []
        for leaf, ids in zip(leaves, mixes, strict=True):
            with subject.block(ids):
                if kind == "plain":
                    outputs.append(subject.call(leaf))
                else:
                    reentrant = kind.startswith("reentrant")
                    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
                        outputs.append(checkpoint(subject.call, leaf, use_reentrant=reentrant))
        found = []
        for leaf, y in zip(leaves, outputs, strict=True):  # both were pending
            in_thread(lambda y=y: y.backward(direction(y)) or True)
            found.append({"y": y.detach(), "x": leaf.grad, **subject.gradients()})
        return found

    x = subject.x()
    masks = [read_masks(subject, x, ids) for ids in mixes]
    kinds = ["reentrant", "not reentrant"]
    if case.impl == "eager":
        kinds.append("plain")
    if case.dtype == "float32" and case.impl == "eager":
        kinds += ["reentrant, autocast", "not reentrant, autocast"]
    for kind in kinds:
        dtype = torch.bfloat16 if "autocast" in kind else None
        for found, ids, own in zip(run(kind), mixes, masks, strict=True):
            check(subject, found, x, ids, masks=own, dtype=dtype)


@invariant(lambda case: case.rows == "mixed", per=("source", "base"))
def blocks(case: Case) -> None:
    """Blocks nest, end with errors, and belong to a thread; names and slots say the same."""
    subject, other = Subject(case), Subject(case)
    subject.net.eval()
    other.net.eval()
    x, ids = subject.x(), case.ids
    reverse = ids[::-1]

    def right(y: torch.Tensor, ids: list[str | None]) -> None:
        check(subject, {"y": y}, x, ids, masks={})

    plain = None if case.source == "pool" else other.call(x)
    with pytest.raises(KeyError), subject.block(ids):
        with subject.block(reverse):
            right(subject.call(x), reverse)
            right(in_thread(lambda: subject.forward(x, ids)), ids)
        right(subject.call(x), ids)
        with other.block(reverse):  # each model follows its own innermost block
            right(other.call(x), reverse)
            right(subject.call(x), ids)
        if plain is not None:  # another model, another thread: the active adapter
            assert torch.equal(other.call(x), plain)
            assert torch.equal(in_thread(lambda: subject.call(x)), plain)
        raise KeyError
    if plain is not None:
        assert torch.equal(subject.call(x), plain)
    if case.source == "pool":
        slots = [subject.handle.slot_of(n) if n else -1 for n in ids]
    else:
        known = list(subject.handle.peft_config)
        slots = [known.index(n) if n else -1 for n in ids]
    by_sample = torch.tensor(slots)
    right(subject.forward(x, by_sample), ids)
    right(subject.forward(x, by_sample.repeat_interleave(x.shape[1])), ids)
    alternating = torch.tensor([slots[0], slots[2], -1] * 6)
    rows = [None if s < 0 else ids[slots.index(s)] for s in alternating.tolist()]
    right(subject.forward(x, alternating), rows)


@invariant(lambda case: case.rows == "mixed", per=("source", "feature"))
def wrong_ids(case: Case) -> None:
    """Each kind of wrong ids raises one typed error that names it, and changes nothing."""
    from fastlora.validation import AdapterNotFoundError

    subject = Subject(case)
    subject.net.eval()
    x = subject.x()
    unsupported: list[tuple[Any, type[Exception], str]] = [
        (["en", "frr"] * 3, AdapterNotFoundError, "'frr'"),
        (torch.tensor([0, 99] * 3), AdapterNotFoundError, "slot 99"),
        (torch.tensor([0, -2] * 3), AdapterNotFoundError, "slot -2"),
        ([], ValueError, "0 adapter ids"),
        (["en"] * 5, ValueError, "5 adapter ids"),
        ("en", TypeError, "got the string 'en'"),
        (["en", 3] * 3, TypeError, "contains 3; expected a sequence"),
        ([["en"], "fr"] * 3, TypeError, r"contains \['en'\]; expected a sequence"),
        ({"en", "fr"}, TypeError, "must be a sequence .*, got a set"),
        (torch.zeros(6, dtype=torch.complex64), TypeError, "an integer dtype, got torch.complex64"),
        (torch.tensor([0.5] * 6), TypeError, "an integer dtype, got torch.float32"),
        (torch.zeros(1, 6, dtype=torch.int64), ValueError, "must have one dimension"),
    ]
    for ids, error, message in unsupported:
        with pytest.raises(error, match=message), fastlora.adapters(subject.handle, ids):
            subject.call(x)
        check(subject, {"y": subject.forward(x)}, x, masks={})
    for seeds in ([1, 2], {"en": 1.5}, {"en": None}):
        with pytest.raises(TypeError, match="seed"), subject.block(seeds=seeds):
            subject.call(x)
    with pytest.raises((ValueError, RuntimeError), match="shape|16"):
        subject.forward(torch.zeros(6, 3, SHAPES["q"][1] + 1, dtype=case.x_dtype))
    check(subject, {"y": subject.forward(x)}, x, masks={})
