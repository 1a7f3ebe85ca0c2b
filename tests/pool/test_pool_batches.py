"""`fastlora.adapters` over a pool: rows are their adapters', whatever the pool does meanwhile.

In float64, so that equal means equal in every digit that matters.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora import AdapterPool, LoraModel, adapters
from tests.support.pool_adapters import Blocks, make_folder

COUNT = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters of different ranks, scalings and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(COUNT):
        make_folder(
            folder / f"a{i}",
            seed=i,
            r=(1, 3, 4, 8)[i % 4],
            use_rslora=i % 3 == 0,
            lora_bias=i % 4 == 1,
            target_modules=["q", "v"] if i % 2 else ["q"],
        )
    return folder


def make(root: Path, **limits: Any) -> tuple[Blocks, AdapterPool]:
    """The same model at every call, and its pool with all adapters registered."""
    torch.manual_seed(0)
    model = Blocks().double().eval()
    pool = AdapterPool(model, target_modules=["q", "v"], **limits)
    pool.register_folder(root)
    return model, pool


class Alone:
    """Each adapter alone, through `LoraModel`."""

    def __init__(self, root: Path) -> None:
        self._models: dict[str | None, Any] = {}
        self._root = root

    def __call__(self, ids: torch.Tensor, names: list[str | None]) -> torch.Tensor:
        """Rows of ``ids``, each with its own adapter."""
        with torch.no_grad():
            rows = [self._model(n)(ids[i : i + 1]) for i, n in enumerate(names)]
        return torch.cat(rows)

    def _model(self, name: str | None) -> Any:
        if name not in self._models:
            torch.manual_seed(0)
            model: Any = Blocks()
            if name is not None:
                model = LoraModel.from_pretrained(model, self._root / name)
            self._models[name] = model.double().eval()
        return self._models[name]


@pytest.fixture(scope="module")
def alone(root: Path) -> Alone:
    return Alone(root)


def random_names(seed: int, batch: int = 6, most: int = 4) -> list[str | None]:
    """A batch of at most so many adapters, with base rows."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(COUNT, generator=generator)[:most].tolist()
    drawn = torch.randint(-1, most, (batch,), generator=generator).tolist()
    return [None if i < 0 else f"a{chosen[i]}" for i in drawn]


def test_a_swap_waits_for_no_one_and_disturbs_no_one(root: Path, alone: Alone) -> None:
    """In the block the adapter is what it was; the next block has the new one."""
    model, pool = make(root, max_adapters=4)
    ids = torch.randint(0, 11, (2, 5))
    before = alone(ids, ["a1", "a2"])
    after = alone(ids, ["a7", "a2"])
    with torch.no_grad():
        with adapters(pool, ["a1", "a2"]):
            thread = threading.Thread(target=pool.load, args=("a1", root / "a7"))
            thread.start()
            thread.join()
            for _ in range(3):
                torch.testing.assert_close(model(ids), before)
        with adapters(pool, ["a1", "a2"]):
            for _ in range(3):
                torch.testing.assert_close(model(ids), after)


def test_threads_with_their_own_batches(root: Path, alone: Alone) -> None:
    """Four threads, more adapters than slots, swaps and unloads in between: no wrong row."""
    model, pool = make(root, max_adapters=5)
    ids = torch.randint(0, 11, (4, 5))
    truths = {seed: alone(ids, random_names(seed, 4, 3)) for seed in range(10)}
    failures: list[BaseException] = []

    def serve(worker: int) -> None:
        try:
            for step in range(40):
                seed = (3 * worker + step) % 10
                with torch.no_grad(), adapters(pool, random_names(seed, 4, 3)):
                    torch.testing.assert_close(model(ids), truths[seed])
                if step % 8 == worker:  # the same adapter, read again
                    pool.load(f"a{worker}", root / f"a{worker}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.stats().evictions > 0


def test_a_default_device_does_not_matter(root: Path, alone: Alone) -> None:
    """Adapters are loaded, looked up, and evicted the same."""
    model, pool = make(root, max_adapters=3)
    ids = torch.randint(0, 11, (4, 5))
    for seed in range(6):
        names = random_names(seed, 4, 3)
        expected = alone(ids, names)
        with torch.no_grad(), torch.device("meta"):
            with adapters(pool, names):
                torch.testing.assert_close(model(ids), expected)
                slots = [-1 if name is None else pool.slot_of(name) for name in names]
            with adapters(pool, torch.tensor(slots, device="cpu")):
                torch.testing.assert_close(model(ids), expected)
