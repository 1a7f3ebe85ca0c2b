"""Adapters come, go, change and are damaged while the server runs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.serve.adapters import ServedAdapters
from tests.support.pool_adapters import SLOW_FIELDS, make_sparse_folder, peak_memory
from tests.support.served import Alone, make_adapter, wait_for
from tests.support.tiny import tiny_llama

GREEDY: dict[str, Any] = {"prompt": "the sea", "temperature": 0, "max_tokens": 12}


def said(served: Any, name: str, **options: Any) -> str:
    """The likeliest answer of an adapter."""
    answer = served.client.completions.create(model=name, **(GREEDY | options))
    return str(answer.choices[0].text)


def names(served: Any) -> list[str]:
    """The adapters that are listed."""
    return [model["id"] for model in served.http.get("/v1/models").json()["data"]][1:]


def loads(served: Any) -> float:
    """How often the server has read an adapter."""
    (line,) = re.findall(
        r"^fastlora_adapter_loads_total (.+)$", served.http.get("/metrics").text, re.M
    )
    return float(line)


def post(served: Any, what: str, status: int, **body: Any) -> str:
    """Loads or unloads; returns what the server says."""
    headers = {"Content-Type": "application/json"}
    answer = served.admin.post(
        f"/v1/{what}_lora_adapter", content=json.dumps(body), headers=headers
    )
    assert answer.status_code == status, answer.text
    return str(answer.text)


def test_a_folder_comes_and_changes_and_goes(served: Any) -> None:
    folder = served.folder / "elm"
    make_adapter(served.folder.parent / "elm", 11).rename(folder)
    wait_for(lambda: "elm" in names(served))
    first = said(served, "elm")
    assert first == Alone(served.alone._base, served.folder).text("the sea", "elm", 12)

    shutil.copytree(served.folder / "ash", folder, dirs_exist_ok=True)
    ash = served.alone.text("the sea", "ash", 12)

    def is_ash() -> bool:
        answer = served.http.post("/v1/completions", json={"model": "elm", **GREEDY})
        if answer.status_code == 422:  # half of the copy was there, and the watch came by
            return False
        return bool(answer.json()["choices"][0]["text"] == ash)

    wait_for(is_ash)

    def is_gone() -> bool:
        status = served.http.post("/v1/completions", json={"model": "elm", **GREEDY}).status_code
        assert status in (404, 422)  # 422: the watch came by while half of the folder was there
        return bool(status == 404)

    shutil.rmtree(folder)
    wait_for(lambda: "elm" not in names(served))
    wait_for(is_gone)


def test_a_damaged_folder_fails_its_own_requests(served: Any) -> None:
    """A cut file, a config that is none, another model's adapter: others answer meanwhile."""
    for name in ("cut", "odd", "other"):
        shutil.copytree(served.folder / "ash", served.folder.parent / name)
    cut, odd, other = (served.folder.parent / name for name in ("cut", "odd", "other"))
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (odd / "adapter_config.json").write_text('{"peft_type": "LORA", "r": -3}')
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({k: v.repeat(1, 2) for k, v in tensors.items()}, other / "adapter_model.safetensors")
    for folder in (cut, odd, other):
        folder.rename(served.folder / folder.name)
    ash = served.alone.text("the sea", "ash", 12)

    def known(name: str) -> bool:
        return served.http.get(f"/v1/models/{name}").status_code != 404 or name == "odd"

    wait_for(lambda: known("cut") and known("other"))
    for name in ("cut", "other", "cut"):
        answer = served.http.post("/v1/completions", json={"model": name, **GREEDY})
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["code"] == "adapter_damaged"
        assert f"adapter {name!r} cannot be used: {name}" in answer.json()["error"]["message"]
        assert str(served.folder) not in answer.text
        assert said(served, "ash") == ash
    answer = served.http.post("/v1/completions", json={"model": "odd", "stream": True, **GREEDY})
    assert answer.status_code == 422, answer.text
    assert "r must be a positive integer" in answer.json()["error"]["message"]
    assert not {"cut", "odd", "other"} & set(names(served))

    for name in ("cut", "odd"):  # mended
        shutil.copytree(served.folder / "ash", served.folder / name, dirs_exist_ok=True)
    wait_for(lambda: {"cut", "odd"} <= set(names(served)))
    assert said(served, "cut") == said(served, "odd") == ash
    for folder in ("cut", "odd", "other"):
        shutil.rmtree(served.folder / folder)


def check_rejected_when_it_comes(served: Any, folder: Path, why: str, code: str) -> None:
    """Moves a folder to the server's, which refuses it with status 422 within a second.

    It refuses a request and a load; both messages contain ``why``.
    """
    name = folder.name
    folder.rename(served.folder / name)
    body = {"model": name, **GREEDY}
    wait_for(lambda: served.http.post("/v1/completions", json=body).status_code != 404)
    answer = served.http.post("/v1/completions", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == code
    assert why in answer.json()["error"]["message"]
    seconds = []
    for _ in range(3):  # each reads the folder anew; the machine may be busy at some
        start = time.monotonic()
        assert why in post(served, "load", 422, lora_name="other", lora_path=name)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1


@pytest.mark.parametrize("field", SLOW_FIELDS)
def test_a_pattern_that_backtracks_stops_nobody(served: Any, field: str) -> None:
    """E2: its own requests get status 422 within a second. The server answers others meanwhile."""
    folder = served.folder.parent / field
    shutil.copytree(served.folder / "ash", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = [name.rpartition(".")[2] for name in config["target_modules"]]
    (folder / "adapter_config.json").write_text(json.dumps(config | SLOW_FIELDS[field]))
    code = "adapter_unsupported" if field == "modules_to_save" else "adapter_damaged"
    check_rejected_when_it_comes(served, folder, field, code)
    assert said(served, "ash") == served.alone.text("the sea", "ash", 12)
    shutil.rmtree(served.folder / field)


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}]
)
def test_an_adapter_that_pools_do_not_support(served: Any, fields: dict[str, Any]) -> None:
    (field,) = fields
    folder = served.folder.parent / f"with_{field}"
    shutil.copytree(served.folder / "ash", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    check_rejected_when_it_comes(served, folder, field, "adapter_unsupported")
    shutil.rmtree(served.folder / folder.name)


@pytest.mark.parametrize("option", ["--max-rank", "--max-adapter-mib"])
def test_an_adapter_over_a_limit_is_rejected_unread(served: Any, option: str) -> None:
    """E4: a file that is sparse claims gigabytes. Neither the request nor the load reads it."""
    name = option.strip("-")
    size = (
        {"rank": 1_000_000, "r": 1_000_000} if "rank" in name else {"rank": 2, "width": 50_000_000}
    )
    folder = make_sparse_folder(served.folder.parent / name, served.folder / "ash", **size)
    assert (folder / "adapter_model.safetensors").stat().st_size > 1_500_000_000
    with peak_memory(50 << 20):
        check_rejected_when_it_comes(served, folder, option, "adapter_too_large")
    shutil.rmtree(served.folder / name)


def test_numbers_that_are_not_finite_stay_in_their_own_row(served: Any) -> None:
    """Nobody beside it sees them, and nobody who has its row later."""
    folder = served.folder.parent / "nan"
    shutil.copytree(served.folder / "ash", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for tensor in tensors.values():
        tensor[:1] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    folder.rename(served.folder / "nan")
    wait_for(lambda: "nan" in names(served))
    found: list[str] = []

    def others() -> None:
        found.extend(said(served, "ash", max_tokens=40) for _ in range(4))

    threads = [threading.Thread(target=others) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        answer = served.http.post("/v1/completions", json={"model": "nan", **GREEDY})
        assert answer.status_code == 422, answer.text
        assert (
            "'nan' cannot be used: it returns logits that are not finite"
            in answer.json()["error"]["message"]
        )
    for thread in threads:
        thread.join()
    assert found == [served.alone.text("the sea", "ash", 40)] * 12
    shutil.rmtree(served.folder / "nan")


def test_load_and_unload(served: Any, tmp_path: Path) -> None:
    """vLLM's endpoints: a name of one's own for a folder below the server's."""
    path = str(served.folder / "birch")
    assert "added successfully" in post(served, "load", 200, lora_name="mine", lora_path=path)
    birch = served.alone.text("the sea", "birch", 12)
    assert said(served, "mine") == birch
    assert "is already loaded" in post(served, "load", 400, lora_name="mine", lora_path="cedar")
    post(served, "load", 200, lora_name="mine", lora_path="cedar", load_inplace=True)
    assert said(served, "mine") == served.alone.text("the sea", "cedar", 12)
    assert "removed successfully" in post(served, "unload", 200, lora_name="mine")
    assert "adapter 'mine' is not loaded" in post(served, "unload", 404, lora_name="mine")

    post(served, "unload", 200, lora_name="ash")  # stays away until its files change
    time.sleep(0.3)
    assert "ash" not in names(served)
    post(served, "load", 200, lora_name="ash", lora_path="ash")
    assert said(served, "ash") == served.alone.text("the sea", "ash", 12)


def test_an_answer_keeps_the_adapter_that_it_began_with(served: Any) -> None:
    """It is unloaded, and another one gets its name, between two tokens of a stream."""
    make_adapter(served.folder / "deep" / "x", 21)
    post(served, "load", 200, lora_name="x", lora_path="deep/x")
    alone = Alone(served.alone._base, served.folder / "deep").text("the sea", "x", 100)
    options = GREEDY | {"max_tokens": 100}
    stream = served.client.completions.create(model="x", stream=True, **options)
    pieces = [next(stream).choices[0].text]
    post(served, "unload", 200, lora_name="x")
    post(served, "load", 200, lora_name="x", lora_path="cedar")
    pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == alone
    assert said(served, "x") == served.alone.text("the sea", "cedar", 12)
    post(served, "unload", 200, lora_name="x")


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("y", "..", "is outside the server's adapter folder"),
        ("y", ".", "is outside the server's adapter folder"),
        ("y", "../outside", "is outside the server's adapter folder"),
        ("y", "/etc", "is outside the server's adapter folder"),
        ("y", "link", "is outside the server's adapter folder"),
        ("y", "ash/../../outside", "is outside the server's adapter folder"),
        ("y", "nowhere", "not an adapter folder"),
        ("y", "a\x00b", "no such path"),
        ("../y", "ash", "is not a valid adapter name"),
        (".y", "ash", "is not a valid adapter name"),
        ("", "ash", "is not a valid adapter name"),
        ("tiny", "ash", "is reserved for the base model"),
        ("base", "ash", "is reserved for the base model"),
        ("y", "\ud800", "lora_path"),
    ],
)
def test_loads_that_are_rejected(served: Any, name: str, path: str, said: str) -> None:
    outside = served.folder.parent / "outside"
    if not outside.exists():
        make_adapter(outside, 3)
        (served.folder / "link").symlink_to(outside)
    assert said in post(served, "load", 400, lora_name=name, lora_path=path)
    assert "link" not in names(served)


def test_a_damaged_folder_is_rejected_by_load(served: Any) -> None:
    folder = served.folder / "deep" / "broken"
    shutil.copytree(served.folder / "ash", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 50)
    error = post(served, "load", 422, lora_name="broken", lora_path="deep/broken")
    assert "deep/broken" in error
    assert str(served.folder) not in error
    assert served.http.get("/v1/models/broken").status_code == 404


def test_a_save_that_was_cut_off_is_served_whole(served: Any, tmp_path: Path) -> None:
    """R2: beside the old config, the watched folder's new weights answer with their own scaling."""
    make_adapter(tmp_path / "torn", 31, r=3)
    old = (tmp_path / "torn" / "adapter_config.json").read_bytes()
    make_adapter(tmp_path / "torn", 32, r=3, use_rslora=True)
    text = Alone(served.alone._base, tmp_path).text("the sea", "torn", 12)
    shutil.copytree(tmp_path / "torn", served.folder.parent / "torn").rename(served.folder / "torn")
    wait_for(lambda: "torn" in names(served))
    assert said(served, "torn") == text
    (served.folder / "torn" / "adapter_config.json").write_bytes(old)  # a change: it is read again
    before = loads(served)
    wait_for(lambda: bool(said(served, "torn")) and loads(served) > before)
    assert said(served, "torn") == text
    shutil.rmtree(served.folder / "torn")
    wait_for(lambda: "torn" not in names(served))


def test_files_outside_the_folder_are_not_served(served: Any) -> None:
    """E6: links out of the folder and FIFOs answer 422 and show nothing; links inside answer."""
    outside = make_adapter(served.folder.parent / "elsewhere", 5)
    secret = served.folder.parent / "secret.json"
    secret.write_text('{"r": "hunter2"}')
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    targets = {"l1": (config, secret), "l2": (weights, outside / weights), "l3": (weights, None)}
    targets["l4"] = (config, None)
    for name, (file, target) in targets.items():
        folder = shutil.copytree(served.folder / "ash", served.folder.parent / name)
        (folder / file).unlink()
        os.mkfifo(folder / file) if target is None else (folder / file).symlink_to(target)
        folder.rename(served.folder / name)
    inside = served.folder.parent / "l5"
    inside.mkdir()
    (inside / config).symlink_to(Path("..") / "birch" / config)
    (inside / weights).symlink_to(served.folder / "birch" / weights)
    inside.rename(served.folder / "l5")
    wait_for(lambda: "l5" in names(served))
    for name, (file, target) in targets.items():
        answer = served.http.post("/v1/completions", json={"model": name, **GREEDY})
        assert answer.status_code == 422, answer.text
        why = (
            "not a regular file"
            if target is None
            else "this path points to a file outside the folder of adapters"
        )
        assert f"{name}/{file}: {why}" in answer.json()["error"]["message"]
        assert "hunter2" not in answer.text and str(served.folder.parent) not in answer.text
    assert not {*targets} & {*names(served)}
    assert said(served, "l5") == served.alone.text("the sea", "birch", 12)
    for name in (*targets, "l5"):
        shutil.rmtree(served.folder / name)
    wait_for(lambda: "l5" not in names(served))


def test_a_file_that_becomes_a_link_after_the_listing(served: Any) -> None:
    """E6: what counts is what is opened when the adapter is read, not what was listed."""
    outside = make_adapter(served.folder.parent / "elsewhere", 5)
    folder = served.folder / "late"
    pool = fastlora.AdapterPool(tiny_llama(), root=served.folder)
    adapters = ServedAdapters(pool, served.folder, reserved=())
    shutil.copytree(served.folder / "ash", served.folder.parent / "late").rename(folder)
    adapters.sync_with_folder()
    assert "late" in adapters.usable_names
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / weights.name)
    version = adapters.acquire_version("late")
    read = threading.Event()
    adapters.read_in_background(version, read.set)
    assert read.wait(20)
    assert (
        str(version.error)
        == f"late/{weights.name}: this path points to a file outside the folder of adapters"
    )
    pool.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize("meanwhile", ["take", "load", "unload"])
def test_a_slow_registration_delays_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """The watch is still reading a config. What a client loads or unloads meanwhile counts."""
    make_adapter(tmp_path / "ash", 0)
    pool = fastlora.AdapterPool(tiny_llama())
    adapters = ServedAdapters(pool, tmp_path, reserved=())
    adapters.sync_with_folder()
    begun, goes_on = threading.Event(), threading.Event()
    register = pool.register_adapter

    def slow(entry: Any) -> None:
        begun.set()
        assert goes_on.wait(20)
        register(entry)

    monkeypatch.setattr(pool, "register_adapter", slow)
    changed = tmp_path / ("ash" if meanwhile == "unload" else "birch")
    make_adapter(changed, 1, r=3)
    watch = threading.Thread(target=adapters.sync_with_folder)
    watch.start()
    assert begun.wait(20)

    def client() -> None:
        if meanwhile == "take":
            adapters.release_version(adapters.acquire_version("ash"))
        elif meanwhile == "load":
            adapters.load("birch", "ash")
        else:
            adapters.unload("ash")

    request = threading.Thread(target=client)
    request.start()
    request.join(10)
    was_delayed = request.is_alive()
    goes_on.set()
    watch.join(20)
    request.join(20)
    assert not was_delayed
    found = {name: adapters.acquire_version(name) for name in adapters.usable_names}
    folders = {name: version.folder and version.folder.name for name, version in found.items()}
    assert (
        folders
        == {
            "take": {"ash": "ash", "birch": "birch"},
            "load": {"ash": "ash", "birch": "ash"},
            "unload": {},
        }[meanwhile]
    )
    assert sorted(pool.names) == sorted(version.name for version in found.values())


def metrics(served: Any) -> dict[str, float]:
    """The server's numbers by name."""
    lines = served.http.get("/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.removeprefix("fastlora_"): float(value) for name, value in pairs}


def test_nothing_is_left_in_the_pool(served: Any) -> None:
    """An adapter that is gone has left the pool, and nobody holds a lease."""
    folder = served.folder / "yew"
    make_adapter(served.folder.parent / "yew", 12).rename(folder)
    wait_for(lambda: "yew" in names(served))
    said(served, "yew")
    loaded = metrics(served)
    shutil.rmtree(folder)
    wait_for(lambda: "yew" not in names(served))
    left = metrics(served)
    assert loaded["adapter_loads_total"] >= 1
    assert left["adapters_on_device"] == loaded["adapters_on_device"] - 1
    assert left["adapters"] == loaded["adapters"] - 1 == len(names(served))
    assert left["requests_running"] == 0
    assert math.isfinite(left["forward_seconds_total"])
