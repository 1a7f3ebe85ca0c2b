"""Bodies that the schema allows, and others, cause no status of 500 or more.

The schema is the application's own; `make soak-serve` asks for more of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.served import make_adapter, make_base, serving

EXAMPLES = int(os.environ.get("FASTLORA_FUZZ_EXAMPLES", "8"))
PATHS = ("completions", "chat/completions", "load_lora_adapter", "unload_lora_adapter")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """A server whose adapters nobody can unload for good: the folder is looked into again."""
    for library in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(library, reason="the server needs it")
    root = tmp_path_factory.mktemp("fuzz")
    make_adapter(root / "adapters" / "ash", 0)
    options = ("--adapters", str(root / "adapters"), "--max-length", "32", "--watch", "0.1")
    options += ("--admin-key", "adm1n")
    with serving(make_base(root / "tiny"), *options) as found:
        yield found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_status_of_500_or_more(server: tuple[str, Any], path: str, mode: str) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    url, app = server
    schema = schemathesis.openapi.from_dict(app.openapi())
    schema.config.update(base_url=url)
    operation = schema[f"/v1/{path}"]["POST"]
    modes = schemathesis.GenerationMode
    statuses: set[int] = set()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(data=hypothesis.strategies.data())
    def ask(data: Any) -> None:
        case = data.draw(operation.as_strategy(generation_mode=modes(mode)))
        if isinstance(case.body, dict) and data.draw(hypothesis.strategies.booleans()):
            case.body |= {"model": "ash", "lora_name": "b", "lora_path": "ash"}
            for name in set(case.body) - known if mode == "positive" else ():
                del case.body[name]
        answer = case.call(headers={"Authorization": "Bearer adm1n"})
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text

    body = app.openapi()["paths"][f"/v1/{path}"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    known = set(app.openapi()["components"]["schemas"][reference]["properties"])
    ask()
    assert 400 in statuses or 404 in statuses
    import httpx

    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
