"""Who may do what: the API key, the admin key, and where both come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastlora.commands import serve
from fastlora.serve.keys import ApiKeys, CallerRole
from fastlora.validation import ConfigError

CHANGES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
BODY = {"lora_name": "mine", "lora_path": "birch"}


def keys_of(*options: object) -> ApiKeys:
    """The keys that a command line gives."""
    keys: ApiKeys = serve.parse_args(["tiny", *map(str, options)]).keys
    return keys


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTLORA_API_KEY", "FASTLORA_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("which", ["api", "admin"])
def test_an_empty_key_is_rejected(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E10: an option, a file or a variable that holds no key must not open the server."""
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match=f"--{which}-key is empty"):
        keys_of(f"--{which}-key", "")
    with pytest.raises(ConfigError, match=f"--{which}-key-file .*empty is empty"):
        keys_of(f"--{which}-key-file", tmp_path / "empty")
    variable = f"FASTLORA_{which.upper()}_KEY"
    monkeypatch.setenv(variable, "")
    with pytest.raises(ConfigError, match=rf"\${variable} is empty"):
        keys_of()


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E10: an option goes before a variable; a newline at the end of a file is not read."""
    assert keys_of() == ApiKeys(None, None)
    for end in ("", "\n", "\r\n"):
        (tmp_path / "key").write_bytes(b"s3cret" + end.encode())
        assert keys_of("--api-key-file", tmp_path / "key").client == "s3cret"
    monkeypatch.setenv("FASTLORA_API_KEY", "of the environment")
    monkeypatch.setenv("FASTLORA_ADMIN_KEY", "0perator")
    assert keys_of() == ApiKeys("of the environment", "0perator")
    assert keys_of("--api-key-file", tmp_path / "key") == ApiKeys("s3cret", "0perator")
    assert keys_of("--admin-key", "other") == ApiKeys("of the environment", "other")


def test_keys_that_are_rejected(tmp_path: Path) -> None:
    """E9, E10: no message contains a key."""
    file = tmp_path / "key"
    cases: list[tuple[bytes, tuple[object, ...], str]] = [
        (b"s3cret\n\n", (), "trailing whitespace, or contains non-printable characters"),
        (b"s3cret \n", (), "the key in --api-key-file .* has leading or trailing whitespace"),
        (b"\xffs3cret", (), "is not valid UTF-8"),
        (b"s3cret" * 1000, (), "is larger than 4096 bytes"),
        (b"s3cret", ("--api-key", "s3cret"), "both --api-key and --api-key-file are given"),
        (b"s3cret", ("--admin-key", "s3cret"), "the admin key must differ from the API key"),
    ]
    for content, options, said in cases:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=said) as raised:
            keys_of("--api-key-file", file, *options)
        assert "s3cret" not in str(raised.value)
    for path, said in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file")):
        with pytest.raises(ConfigError, match=said):
            keys_of("--api-key-file", path)


def test_who_a_key_names() -> None:
    """E10: the scheme's case does not matter, as in RFC 9110; the key's does."""
    both = ApiKeys("s3cret", "0perator")
    for scheme in (b"Bearer", b"bearer", b"BEARER"):
        assert both.identify_caller(scheme + b" s3cret") is CallerRole.CLIENT
        assert both.identify_caller(scheme + b"  0perator") is CallerRole.ADMIN
    for given in (b"", b"s3cret", b"Basic s3cret", b"Bearer", b"Bearer S3CRET", b"Bearer\xff s"):
        assert both.identify_caller(given) is CallerRole.STRANGER
        assert ApiKeys(None, "0perator").identify_caller(given) is CallerRole.CLIENT
        assert ApiKeys().identify_caller(given) is CallerRole.CLIENT
    assert ApiKeys("s3cret").identify_caller(b"Bearer 0perator") is CallerRole.STRANGER


def answer(keys: ApiKeys, method: str, path: str, sent: str | None, **options: Any) -> Any:
    """What a server of these keys answers; it has no adapter, and unloads nothing."""
    import asyncio

    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from fastlora.serve.app import AppSettings, Server

    adapters: Any = SimpleNamespace(usable_names=["ash"], unload=lambda name: None)
    engine: Any = SimpleNamespace(length=8)
    app = Server(engine, adapters, SimpleNamespace(), AppSettings(base="tiny", keys=keys)).app  # type: ignore

    async def ask() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            headers = {} if sent is None else {"Authorization": f"Bearer {sent}"}
            return await http.request(method, path, headers=headers, **options)

    return asyncio.run(ask())


def test_only_the_admin_key_changes_adapters() -> None:
    """E9: a client's key reads; loading and unloading needs the other one, which reads too."""
    both, open_to_all = ApiKeys("s3cret", "0perator"), ApiKeys(None, "0perator")
    for keys, sent, status in (
        (both, None, 401),
        (both, "s3cret", 403),
        (both, "0perator", 200),
        (open_to_all, None, 403),
        (open_to_all, "wrong", 403),
        (open_to_all, "0perator", 200),
    ):
        found = answer(keys, "POST", CHANGES[1], sent, json={"lora_name": "ash"})
        assert found.status_code == status, (keys, sent)
        if status == 403:
            assert found.json()["error"]["code"] == "admin_key_required"
    # A route also matches a path that ends in a newline.
    for path in (f"{CHANGES[1]}%0A", f"{CHANGES[1]}/"):
        found = answer(both, "POST", path, "s3cret", json={"lora_name": "ash"})
        assert found.status_code in (307, 403, 404)
    assert answer(both, "GET", "/v1/models", "0perator").status_code == 200
    assert answer(both, "GET", "/v1/models", "s3cret").json()["data"][1]["id"] == "ash"


def test_without_an_admin_key_nobody_changes_adapters() -> None:
    """E9: the paths are unknown ones then, with and without a client's key."""
    for keys, sent in ((ApiKeys(), None), (ApiKeys("s3cret"), "s3cret")):
        unknown = answer(keys, "POST", "/v1/nothing", sent, json=BODY)
        assert unknown.status_code == 404
        for path in CHANGES:
            found = answer(keys, "POST", path, sent, json=BODY)
            assert (found.status_code, found.text) == (404, unknown.text)
        assert "lora_adapter" not in answer(keys, "GET", "/openapi.json", sent).text


def test_close_names_are_for_the_admin(served: Any) -> None:
    """E9: a client that guesses at names learns none from an error."""
    body = {"model": "ashy", "prompt": "x"}
    for http, said in ((served.http, ""), (served.admin, "; close names: ash")):
        found = http.post("/v1/completions", json=body)
        assert found.status_code == 404
        assert found.json()["error"]["message"] == f"the model 'ashy' does not exist{said}"
