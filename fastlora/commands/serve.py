"""``fastlora serve``: an OpenAI-compatible server for a model and a folder of adapters.

Clients name an adapter as the model, or the base model. It speaks HTTP without encryption, and to
this machine only unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import ipaddress
import logging
import platform
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import env
from fastlora.commands.models import CommandError, load_base, load_tokenizer, step
from fastlora.validation import ConfigError

# glibc's numbers of mallopt's parameters, and what a server gives them.
_MALLOPT = {
    -3: 4 << 20,  # M_MMAP_THRESHOLD: above most activations, below most adapters
    -1: 64 << 20,  # M_TRIM_THRESHOLD: a step's activations stay for the next one
    -8: 2,  # M_ARENA_MAX
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.add_argument("model", metavar="MODEL", help="folder of the base model")
    parser.add_argument(
        "--adapters",
        type=Path,
        metavar="DIR",
        help="folder whose subfolders are PEFT adapters; it is watched, so they may come and go",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="what clients call the base model (default: its folder's)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port (default: 8000); 0 takes a free one"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must send as a bearer token (default: $FASTLORA_API_KEY, or none)",
    )
    parser.add_argument(
        "--max-adapters",
        type=int,
        default=16,
        metavar="N",
        help="adapters on the device, and so of one batch; others wait in CPU memory or on disk",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=32,
        metavar="N",
        help="requests that run at once (default: 32)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer together (default: the model's, at most 2048)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=128,
        metavar="N",
        help="requests that may wait; further ones get status 429",
    )
    parser.add_argument(
        "--max-body", type=int, default=1 << 20, metavar="BYTES", help="the most bytes of a request"
    )
    parser.add_argument(
        "--cpu-mib",
        type=int,
        metavar="N",
        help="memory for adapters that are not on the device (default: as much as they take)",
    )
    parser.add_argument(
        "--watch",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="time between two looks into the folder of adapters; 0 looks once",
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time that requests have to end after SIGTERM",
    )
    parser.add_argument(
        "--dtype", default="auto", help="dtype of the base model (default: its own)"
    )
    parser.add_argument("--cpu", action="store_true", help="don't use an accelerator")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and serves until a signal ends it."""
    parser = argparse.ArgumentParser(
        prog="fastlora serve", description=__doc__.split("\n")[0].partition(": ")[2]
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    _check(args)
    try:
        import uvicorn

        from fastlora.serve import app as _  # noqa: F401 - before the model takes its time
    except ImportError as error:
        raise CommandError(
            f"serve needs {error.name or 'more'}; install it with: "
            "pip install 'fastlora-triton[serve]'"
        ) from error
    logging.basicConfig(format="fastlora: %(message)s", level=logging.WARNING)
    _keep_memory_level()
    with _bound(args.host, args.port) as listening:
        app, names = build(args)
        # Each full collection would look at what stays anyway, for tenths of a second.
        gc.collect()
        gc.freeze()
        host, port = listening.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        step(f"serving {args.name} with {len(names)} adapters" + (f": {listed}" if names else ""))
        if not _is_local(args.host) and not args.api_key:
            step(f"anybody who reaches {args.host} may use it; --api-key asks for a key")
        step(f"ready at http://{where}:{port}/v1")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(args.drain)),
            server_header=False,
        )
        with _signals_end():
            uvicorn.Server(config).run([listening])
        gc.unfreeze()  # a library would take what is frozen at the end for leaks
    step("all requests have ended")
    return 0


def _keep_memory_level() -> None:
    """Has the system get back what adapters leave, where glibc allocates memory.

    By itself glibc puts blocks of up to 32 MiB into heaps, as soon as one of that size was freed,
    and each thread that reads adapters has a heap of its own. What adapters leave lies between what
    stays, so heaps grow while the memory in use does not.

    A user's own settings of the allocator stand. It acts on the whole process, so only the program
    calls it.
    """
    if platform.libc_ver()[0] != "glibc" or env.sets_allocator():
        return
    mallopt = ctypes.CDLL(None).mallopt
    for number, value in _MALLOPT.items():
        mallopt(number, value)


def build(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """Returns the application for checked arguments, and the names of the adapters there are."""
    import fastlora
    from fastlora.serve.adapters import ServedAdapters
    from fastlora.serve.app import Settings, make_app
    from fastlora.serve.engine import Engine
    from fastlora.serve.prompts import Prompts

    model, tokenizer = load_base(args.model, args.dtype, "serve"), load_tokenizer(args.model)
    if torch.cuda.is_available() and not args.cpu:
        model = model.to("cuda")
    model.eval()
    pool = fastlora.AdapterPool(
        model,
        max_adapters=args.max_adapters,
        cpu_bytes=None if args.cpu_mib is None else args.cpu_mib << 20,
    )
    adapters = ServedAdapters(pool, args.adapters, reserved=("base", args.name))
    adapters.scan()
    engine = Engine(
        model,
        copy.deepcopy(tokenizer),  # the engine's thread decodes while others encode
        adapters,
        rows=args.max_batch,
        length=args.max_length,
        most_waiting=args.max_queue,
    )
    settings = Settings(args.name, args.api_key, args.max_body, args.watch)
    vocabulary = model.get_input_embeddings().num_embeddings
    return make_app(engine, adapters, Prompts(tokenizer, vocabulary), settings), adapters.names


def _check(args: argparse.Namespace) -> None:
    """Completes the arguments; raises `ConfigError` where one is out of its range."""
    for name in ("max_adapters", "max_batch", "max_queue", "max_body"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be at least 1, got {getattr(args, name)}")
    if args.max_length is not None and args.max_length < 2:
        raise ConfigError(f"--max-length must be at least 2, got {args.max_length}")
    if args.cpu_mib is not None and args.cpu_mib < 0:
        raise ConfigError(f"--cpu-mib must be at least 0, got {args.cpu_mib}")
    for name in ("watch", "drain"):
        if not 0.0 <= getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name} must be at least 0, got {getattr(args, name)}")
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port must be from 0 to 65535, got {args.port}")
    if args.adapters is not None and not args.adapters.is_dir():
        raise CommandError(f"{args.adapters}: no such folder, expected one that holds adapters")
    args.name = args.name or Path(args.model).expanduser().resolve().name
    args.api_key = args.api_key or env.api_key()


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Takes the port before the model is loaded, and so says at once where it is taken.

    Who connects meanwhile waits: a port that nobody listens to could be bound twice.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise CommandError(f"--host {host}: no such address ({error.strerror})") from error
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(128)
        except OSError as error:
            raise CommandError(f"cannot listen on {host}:{port} ({error.strerror})") from error
        yield listening


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _signals_end() -> Iterator[None]:
    """Makes signals that uvicorn has obeyed, and raises again behind it, end in exit code 0."""
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
