"""What every test run shares: offline, one thread, and the real model, loaded when a test asks."""

from __future__ import annotations

import gc
import os
import tempfile

# Read when torch and the tokenizers start, so before the first import of them. Threads that spin
# while they wait make small operations several times slower on a shared machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# torch keys compiled graphs by the names of operators, so those of another checkout would be found.
_compiled = tempfile.TemporaryDirectory(prefix="fastlora-inductor-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiled.name)

# Their assertions too show what they compared.
pytest.register_assert_rewrite("tests.support")


def pytest_configure(config: pytest.Config) -> None:
    """One intra-op thread, unless OMP_NUM_THREADS asks for more: results and times that repeat."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    text = "drawn(share): a large table of cases, of which FASTLORA_CASES=drawn takes a share"
    config.addinivalue_line("markers", text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the cases that the commit draws, as the lanes ask; a file run alone runs whole."""
    from tests.support.drawn import draw, is_drawn

    if not is_drawn():
        return

    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("drawn") is not None:
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[str] = set()
    for name, cases in tables.items():
        mark = cases[0].get_closest_marker("drawn")
        assert mark is not None
        ids = [item.nodeid for item in cases]
        left_out |= set(ids) - draw(ids, *mark.args, name)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def pytest_collection_finish() -> None:
    """What is imported stays: collections need not look through it, a tenth of a run's time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries that count their objects at the end find them collected."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Dynamo without graphs and with its counters at zero; for `pytest.mark.usefixtures`."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors (converted on the first use on a machine)."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from fastlora.commands import smollm2

    try:
        return smollm2.converted_smollm2_dir(progress=False)
    except smollm2.ModelWheelNotFoundError as error:
        if os.environ.get("CI"):
            raise  # there, a run without the real model proves too little to be green
        pytest.skip(f"the real model is not here: {error}")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir: Path) -> Any:
    """The tokenizer of SmolLM2-135M-Instruct."""
    from fastlora.commands import smollm2

    return smollm2.load_tokenizer(smollm2_dir)


@pytest.fixture(scope="session")
def fresh_smollm2(smollm2_dir: Path) -> Callable[..., Any]:
    """``fresh_smollm2(dtype=torch.float32, layers=30)`` gives a new model that the test owns.

    Its first ten layers have every shape and pattern that all of them have, in a third of the time.
    """
    from fastlora.commands import smollm2

    def make(dtype: torch.dtype = torch.float32, layers: int = 30) -> Any:
        model = smollm2.load_model(smollm2_dir, dtype)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        return model

    return make
