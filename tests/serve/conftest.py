"""One server for the tests of a file, with four adapters over two slots of its pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.served import LENGTH, Alone, make_adapter, make_base, serving

NAMES = ("ash", "birch", "cedar", "dogwood")
ADMIN_KEY = "adm1n"


class Served(NamedTuple):
    """A server: its URL, its clients, its folder, and what adapters say alone.

    ``admin`` sends the admin key, ``http`` and ``client`` do not.
    """

    url: str
    client: Any
    http: Any
    admin: Any
    folder: Path
    alone: Alone


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running server; its folder of adapters is looked into every twentieth of a second."""
    for library in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(library, reason="the server needs it")
    openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
    root = tmp_path_factory.mktemp("serve")
    base, folder = make_base(root / "tiny"), root / "adapters"
    for seed, name in enumerate(NAMES):
        make_adapter(folder / name, seed, r=2 + seed % 2)
    options = ("--adapters", folder, "--max-adapters", 2, "--max-batch", 6, "--max-length", LENGTH)
    options += ("--admin-key", ADMIN_KEY, "--max-queue", 40, "--max-body", 20_000, "--watch", 0.05)
    with serving(base, *map(str, options)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        admin_headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        with (
            httpx.Client(base_url=url, timeout=30) as http,
            httpx.Client(base_url=url, timeout=30, headers=admin_headers) as admin,
        ):
            yield Served(url, client, http, admin, folder, Alone(base, folder))
