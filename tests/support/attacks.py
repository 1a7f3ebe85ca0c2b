"""Clients that attack a server on this machine, as a program: ``attacks.py NAME PORT FOLDER``.

It runs until its input ends, and at most `MOST_SECONDS`. At the end it prints the statuses of the
answers that it got, each with the model of the request, as JSON; 0 stands for none. It imports
nothing but the standard library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_SECONDS = 180.0
ANSWER_SECONDS = 20.0
ADDRESS = "127.0.0.1"
# Names of adapters that a server must refuse with status 422.
REJECTED = "refused-"
# Both take ``re`` longer than any test may take, on names of ten characters already. PCRE2 finds at
# once that no name has the last character of the second one.
SLOW_PATTERN = r"(\w|\w|\w|.|.|.|..)*[!?]"
BACKTRACKING = "(([a-z_.0-9]*)*)*!"


def pattern_fields(pattern: str) -> dict[str, dict[str, Any]]:
    """Returns every field of a config that can hold a pattern, with this one in it."""
    return {
        "target_modules": {"target_modules": pattern},
        "rank_pattern": {"rank_pattern": {pattern: 3}},
        "alpha_pattern": {"alpha_pattern": {pattern: 3}},
        "exclude_modules": {"exclude_modules": pattern},
        "layers_pattern": {"layers_to_transform": [0], "layers_pattern": [pattern]},
        "modules_to_save": {"modules_to_save": [pattern]},
    }


ODD = (
    *("evil\nfastlora: key accepted for tenantA", "a\rb", "\x1b[2Jx", "\u2028line", "-dash"),
    *(" ", "a b", "a'b", 'a"b', "a;b", "$(a)", "a%0Ab", "%s%n", "{0}", "..a", "base", "x" * 200),
    *("\u202eolleh", "日本", "a\\b"),
)
_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Attack:
    """What all attacks share: where the server is, how long they last, what they got."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder = port, folder
        self.end = time.monotonic() + MOST_SECONDS
        self.stopped = threading.Event()
        self.statuses: list[tuple[str, int]] = []

    @property
    def runs(self) -> bool:
        """Whether the attack goes on."""
        return not self.stopped.is_set() and time.monotonic() < self.end

    def hold(self, count: int, first: bytes = b"", drip: bytes = b"") -> None:
        """Keeps connections open that send ``first`` and then a byte now and then.

        Twenty of those that the server closed come again each tenth of a second.
        """
        held: list[socket.socket] = []
        while self.runs:
            for connection in list(held):
                try:
                    gone = connection.recv(1 << 16) == b""
                    if drip and not gone:
                        connection.send(drip)
                except BlockingIOError:
                    gone = False
                    if drip:
                        with contextlib.suppress(OSError):
                            connection.send(drip)
                except OSError:
                    gone = True
                if gone:
                    connection.close()
                    held.remove(connection)
            begin = not held
            for _ in range(min(count - len(held), count if begin else 20)):
                connection = socket.socket()
                connection.setblocking(False)
                connection.connect_ex((ADDRESS, self.port))
                held.append(connection)
            if first:
                _, writable, _ = select.select([], held[-20:] if not begin else held, [], 0.1)
                for connection in writable:
                    with contextlib.suppress(OSError):
                        connection.send(first)
            self.stopped.wait(0.1)
        for connection in held:
            connection.close()

    def ask(self, clients: int, bodies: list[Any], pause: float) -> None:
        """Sends completions for the bodies in turn, from several clients."""

        def client(number: int) -> None:
            turn = number
            while self.runs:
                body = bodies[turn % len(bodies)]
                self.statuses.append((body["model"], self._status(body)))
                turn += 1
                self.stopped.wait(pause)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _status(self, body: Any) -> int:
        http_client = http.client.HTTPConnection(ADDRESS, self.port, timeout=ANSWER_SECONDS)
        with contextlib.closing(http_client) as connection:
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                answer = connection.getresponse()
                answer.read()
                return answer.status
            except (OSError, http.client.HTTPException):
                return 0 if self.runs else 400  # the server was ended under the attack

    def ask_for(self, names: list[str], clients: int = 2) -> None:
        """Sends short completions of adapters."""
        bodies = [{"model": name, "prompt": "hi", "max_tokens": 1} for name in names]
        self.ask(clients, bodies, 0.2)

    def copy(self, name: str, **changes: Any) -> Path:
        """Makes an adapter like ``ash`` with another config; `clean` removes it."""
        hidden, folder = self.folder / f".{len(name)}", self.folder / name
        shutil.copytree(self.folder / "ash", hidden)
        config = json.loads((hidden / _FILES[0]).read_text())
        (hidden / _FILES[0]).write_text(json.dumps(config | changes))
        hidden.rename(folder)
        return folder

    def clean(self) -> None:
        """Removes what the attack made."""
        for entry in self.folder.iterdir():
            if entry.name != "ash":
                shutil.rmtree(entry)


def idle_sockets(attack: Attack) -> None:
    """500 connections that send nothing."""
    attack.hold(500)


def slow_headers(attack: Attack) -> None:
    """100 connections with a byte of a header each tenth of a second."""
    attack.hold(100, b"POST /v1/completions HTTP/1.1\r\nX-Slow: ", b"a")


def slow_bodies(attack: Attack) -> None:
    """100 connections with a byte of a body each tenth of a second."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    attack.hold(100, head + b"Content-Length: 100000\r\n\r\n{", b" ")


def long_prompts(attack: Attack) -> None:
    """Six clients with prompts of 1 MB."""
    attack.ask(6, [{"model": "ash", "prompt": "ab c" * 250_000}], 1.0)


def patterns(attack: Attack) -> None:
    """An adapter for each field of a config that may be a pattern, with two that backtrack."""
    names = []
    config = json.loads((attack.folder / "ash" / _FILES[0]).read_text())
    # A full name is exempt from layers_pattern.
    leaves = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    for kind, pattern in ((REJECTED, SLOW_PATTERN), ("decided-", BACKTRACKING)):
        for field, changes in pattern_fields(pattern).items():
            names.append(f"{kind}{field}")
            attack.copy(names[-1], **{"target_modules": leaves, **changes})
    attack.ask_for(names, clients=4)


def sparse_adapter(attack: Attack) -> None:
    """Adapters of rank 1,000,000 in files that hold a header alone."""
    for number in range(2):
        folder = attack.copy(f"{REJECTED}sparse{number}", r=1_000_000, target_modules=["q_proj"])
        header: dict[str, Any] = {}
        end = 0
        for layer in range(2):
            module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            for name, shape in (("lora_A", [1_000_000, 64]), ("lora_B", [64, 1_000_000])):
                begin, end = end, end + 4 * 64_000_000
                entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
                header[f"{module}.{name}.weight"] = entry
        text = json.dumps(header).encode()
        with (folder / _FILES[1]).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    attack.ask_for([f"{REJECTED}sparse{number}" for number in range(2)])


def links(attack: Attack) -> None:
    """Files and folders that are links out of the served folder."""
    outside = attack.folder.parent / "outside"
    shutil.copytree(attack.folder / "ash", outside, dirs_exist_ok=True)
    for number, name in enumerate(_FILES):
        folder = attack.copy(f"{REJECTED}link{number}")
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
    attack.ask_for([f"{REJECTED}link{number}" for number in range(2)])


def fifos(attack: Attack) -> None:
    """Files that are FIFOs, which nobody writes into."""
    for number, name in enumerate(_FILES):
        folder = attack.copy(f"{REJECTED}fifo{number}")
        (folder / name).unlink()
        os.mkfifo(folder / name)
    attack.ask_for([f"{REJECTED}fifo{number}" for number in range(2)])


def odd_names(attack: Attack) -> None:
    """20 names that folders, log lines, messages or paths may treat in a special way."""
    for name in ODD:
        attack.copy(name)
    attack.ask_for([*ODD, "../ash", "a\x00b"])


ATTACKS: dict[str, Callable[[Attack], None]] = {
    own.__name__: own
    for own in (
        *(idle_sockets, slow_headers, long_prompts, patterns, sparse_adapter, links, fifos),
        *(odd_names, slow_bodies),
    )
}


def main(name: str, port: str, folder: str) -> None:
    """Runs an attack."""
    attack = Attack(int(port), Path(folder))

    def until_the_input_ends() -> None:
        sys.stdin.read()
        attack.stopped.set()

    threading.Thread(target=until_the_input_ends, daemon=True).start()
    try:
        ATTACKS[name](attack)
    finally:
        attack.clean()
    sys.stdout.write(json.dumps(attack.statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
