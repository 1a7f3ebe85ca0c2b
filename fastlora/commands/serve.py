"""``fastlora serve``: an OpenAI-compatible server for a model and a folder of adapters.

Clients select an adapter or the base model by the model name in a request. The server uses HTTP
without encryption. It listens on this machine only unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import ipaddress
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlora import env
from fastlora.commands import models
from fastlora.commands.models import CommandError, print_progress_message
from fastlora.commands.options import Option, parse_options
from fastlora.model.warm_up import check_kernel_cache_writable, reason_without_kernels
from fastlora.serve.keys import ApiKeys, resolve_key
from fastlora.serve.log import log_warnings_to_stderr
from fastlora.validation import ConfigError

if TYPE_CHECKING:
    import uvicorn

    from fastlora.serve.connections import ConnectionLimits
    from fastlora.serve.loading import LoadingApp

# Parameters of mallopt by their numbers in glibc, and the values that a server sets.
_MALLOPT = {
    -3: 4 << 20,  # M_MMAP_THRESHOLD: above most activations, below most adapters
    -1: 64 << 20,  # M_TRIM_THRESHOLD: keeps a step's activations allocated for the next step
    -8: 2,  # M_ARENA_MAX
}


OPTIONS = (
    *models.OPTIONS,
    Option(
        "--adapters",
        "folder with one PEFT adapter per subfolder; changes are picked up while the server runs",
        type=Path,
    ),
    Option(
        "--name",
        "name of the base model in the API (default: the name of its folder)",
        metavar="NAME",
    ),
    Option("--host", "address to listen on (default: this machine only)", "127.0.0.1"),
    Option("--port", "port to listen on; 0 picks a free port", 8000),
    Option(
        "--api-key",
        "API key that clients must send as a bearer token (default: $FASTLORA_API_KEY, or none)",
        metavar="KEY",
    ),
    Option("--api-key-file", "file to read the API key from", type=Path, metavar="FILE"),
    Option(
        "--admin-key",
        "key for loading and unloading adapters over HTTP, which is disabled without an admin key "
        "(default: $FASTLORA_ADMIN_KEY, or none)",
        metavar="KEY",
    ),
    Option("--admin-key-file", "file to read the admin key from", type=Path, metavar="FILE"),
    Option(
        "--max-adapters",
        "maximum number of adapters on the device, and in one batch; others stay in CPU memory or "
        "on disk",
        *(16, 1),
    ),
    Option("--max-batch", "maximum number of requests that run concurrently", 32, 1),
    Option(
        "--max-length",
        "maximum number of tokens in a prompt and its answer (default: the model's limit, at most "
        "2048)",
        *(None, 2, int),
    ),
    Option(
        "--max-connections",
        "maximum number of open connections; beyond it, a connection that is waiting for its "
        "client is closed (default: 1024, or less if the limit on open files requires it)",
        *(None, 1, int),
    ),
    Option(
        "--header-timeout",
        "time limit for receiving the headers of a request",
        10.0,
        0.01,
        metavar="SECONDS",
    ),
    Option(
        "--body-timeout",
        "time limit for receiving the body of a request",
        60.0,
        0.01,
        metavar="SECONDS",
    ),
    Option(
        "--idle-timeout",
        "time until a connection is closed that has no request, or a client that does not read",
        *(60.0, 0.01, float, "SECONDS"),
    ),
    Option(
        "--max-queue", "maximum number of waiting requests; further requests get status 429", 128, 1
    ),
    Option("--max-body", "maximum size of a request body", 1 << 20, 1, metavar="BYTES"),
    Option(
        "--max-rank",
        "maximum rank of an adapter; a larger one is rejected with status 422",
        *(256, 1),
    ),
    Option(
        "--max-adapter-mib",
        "maximum size of an adapter's tensor file; a larger one is rejected with status 422 before "
        "it is read",
        *(1024, 1),
    ),
    Option(
        "--device-mib",
        "MiB of device memory for adapters (default: enough for --max-adapters)",
        *(None, 1, int),
    ),
    Option(
        "--cpu-mib",
        "MiB of CPU memory for adapters; on a CPU, only for those that are not on the device "
        "(default: unlimited)",
        *(None, 0, int),
    ),
    Option(
        "--watch",
        "time between scans of the adapter folder; 0 scans it only once",
        *(2.0, 0, float, "SECONDS"),
    ),
    Option(
        "--no-warm-up",
        "accept requests before the GPU kernels are compiled; the first requests wait for them",
        False,
    ),
    Option(
        "--drain",
        "time for running requests to finish after SIGTERM, rounded to whole seconds, at least 1",
        *(30.0, 0, float, "SECONDS"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, run the server, and return the exit code.

    The server runs until a signal stops it.
    """
    args = parse_args(argv)
    import uvicorn  # noqa: F401 - reports a missing extra before the model loads

    from fastlora.serve import app as _  # noqa: F401 - as above
    from fastlora.serve.connections import raise_descriptor_limit
    from fastlora.serve.loading import LoadingApp

    log_warnings_to_stderr()
    if _warms_up(args):
        check_kernel_cache_writable()
    limits = connection_limits(args, raise_descriptor_limit())
    _make_malloc_return_memory()
    with _listening_socket(args.host, args.port) as listening:
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
        print_progress_message(
            f"listening at {url}; requests get status 503 until the model is loaded"
        )
        app = LoadingApp()
        server = make_uvicorn_server(app, args, limits)
        loading = _LoadingThread(args, app, server, url)
        with _exit_cleanly_on_signals():
            server.run([listening])
        gc.unfreeze()  # a library would report objects frozen at exit as leaks
    if loading.error is not None:
        raise loading.error
    print_progress_message("server stopped; no requests are running")
    if loading.is_alive():
        # The thread runs code of other libraries, which cannot be interrupted.
        sys.stdout.flush()
        os._exit(0)
    return 0


class _LoadingThread(threading.Thread):
    """Thread that loads the model and its adapters while the server starts.

    The thread starts with the server's event loop, and the server is already listening while the
    thread runs. If loading fails, the server stops.

    Attributes:
        error: The exception with which loading failed, or None.
    """

    def __init__(
        self, args: argparse.Namespace, app: LoadingApp, server: uvicorn.Server, url: str
    ) -> None:
        super().__init__(name="fastlora-loading", daemon=True)
        self._args, self._app, self._server, self._url = args, app, server, url
        self.error: BaseException | None = None
        app.on_startup = self.start

    def run(self) -> None:
        """Run the thread, which loads the model and starts serving it.

        The method also loads the adapters. The server is already listening before the model is
        loaded. If loading fails, the exception is stored in `error` and the server is stopped,
        unless the server is already stopping.
        """
        try:
            self._load()
        except BaseException as error:
            if not self._server.should_exit:  # otherwise, the event loop may have been closed
                self.error = error
                self._server.should_exit = True

    def _load(self) -> None:
        args = self._args
        app, names = build_app_and_adapter_names(args)
        # Freeze the objects: each full collection would otherwise scan them for tenths of a second.
        gc.collect()
        gc.freeze()
        self._app.start_app_and_forward_requests(app)
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        print_progress_message(
            f"serving {args.name} with {len(names)} adapter{'' if len(names) == 1 else 's'}"
            + (f": {listed}" if names else "")
        )
        if not _is_local(args.host) and args.keys.client is None:
            print_progress_message(
                f"anyone who can reach {args.host} can use this server; set --api-key to prevent it"
            )
        print_progress_message(f"ready at {self._url}")


def _warms_up(args: argparse.Namespace) -> bool:
    """Return whether the server warms up the kernels before it serves requests.

    The warm-up compiles the kernels before the server accepts requests. The server skips the
    warm-up if the arguments include ``--no-warm-up`` or ``--cpu``, if there is no GPU, or if
    compiled kernels do not run on the GPU.
    """
    if args.no_warm_up or args.cpu or not torch.cuda.is_available():
        return False
    return not reason_without_kernels(torch.device("cuda"))


def _make_malloc_return_memory() -> None:
    """Make the memory allocator return freed memory to the operating system.

    The allocator is that of glibc, and the memory is that of removed adapters. By default, once a
    block of up to 32 MiB has been freed, glibc allocates blocks of this size in heaps, and each
    thread that reads adapters has its own heap. The memory of removed adapters lies between blocks
    that are still in use. The heaps therefore grow although the memory in use does not.

    The user's own allocator settings take precedence. The settings affect the whole process, so
    only the program calls this function.
    """
    if platform.libc_ver()[0] != "glibc" or env.user_configured_malloc():
        return
    mallopt = ctypes.CDLL(None).mallopt
    for number, value in _MALLOPT.items():
        mallopt(number, value)


def connection_limits(args: argparse.Namespace, descriptors: int | None) -> ConnectionLimits:
    """Compute the connection limits from the arguments and the limit on file descriptors.

    The limits that the options set are adapted to the limit on open files.
    """
    from fastlora.serve.connections import limits_for_descriptors

    return limits_for_descriptors(
        descriptors,
        args.max_connections,
        header_seconds=args.header_timeout,
        body_seconds=args.body_timeout,
        idle_seconds=args.idle_timeout,
    )


def make_uvicorn_server(
    app: Any, args: argparse.Namespace, limits: ConnectionLimits
) -> uvicorn.Server:
    """Create a uvicorn server for an application."""
    import uvicorn

    from fastlora.serve.connections import LongBacklogServer, OpenConnections

    connections = OpenConnections(limits)
    config = uvicorn.Config(
        app,
        http=connections.create_protocol,  # type: ignore[arg-type] # it is called like a class
        ws="none",  # an upgraded connection would have no deadline
        backlog=limits.backlog,
        timeout_keep_alive=max(1, round(limits.idle_seconds)),
        log_config=None,  # `log_warnings_to_stderr` formats the lines
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(args.drain)),
        server_header=False,
    )
    return LongBacklogServer(config, connections)


def build_app_and_adapter_names(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """Build the HTTP application, and return it with the names of its adapters."""
    import fastlora
    from fastlora.serve.adapters import ServedAdapters
    from fastlora.serve.app import AppSettings, Server
    from fastlora.serve.engine import Engine
    from fastlora.serve.prompt_tokenizer import PromptTokenizer
    from fastlora.serve.running_batch import PREFILL_TOKENS

    model, tokenizer = models.load_base_model_and_tokenizer(args)
    pool = fastlora.AdapterPool(
        model,
        max_adapters=args.max_adapters,
        max_rank=args.max_rank,
        max_adapter_bytes=args.max_adapter_mib << 20,
        device_bytes=None if args.device_mib is None else args.device_mib << 20,
        cpu_bytes=None if args.cpu_mib is None else args.cpu_mib << 20,
        root=args.adapters,
    )
    if args.no_warm_up:
        print_progress_message("no kernels are compiled before the first request (--no-warm-up)")
    elif reason := reason_without_kernels(pool.device):
        print_progress_message(f"no kernels to compile: {reason}")
    else:
        print_progress_message("compiling kernels")
        rows = max(PREFILL_TOKENS, args.max_batch)
        print_progress_message(str(fastlora.warm_up(model, rows=rows, adapters=args.max_adapters)))
    adapters = ServedAdapters(pool, args.adapters, reserved=("base", args.name))
    adapters.sync_with_folder()
    engine = Engine(
        model,
        copy.deepcopy(tokenizer),  # the engine's thread decodes while other threads encode
        adapters,
        rows=args.max_batch,
        length=args.max_length,
        max_waiting=args.max_queue,
    )
    settings = AppSettings(
        base=args.name,
        keys=args.keys,
        max_body_bytes=args.max_body,
        scan_interval_seconds=args.watch,
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    server = Server(
        engine, adapters, PromptTokenizer(tokenizer, vocabulary, engine.length), settings
    )
    return server.app, adapters.usable_names


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of the serve command.

    If an argument is invalid, raise `ConfigError` or `CommandError`.
    """
    text = "Serve a model and a folder of adapters with an OpenAI-compatible API."
    args = parse_options("fastlora serve", text, OPTIONS, argv)
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port must be between 0 and 65535, got {args.port}")
    if args.adapters is not None and not args.adapters.is_dir():
        raise CommandError(f"{args.adapters}: no such folder; expected a folder of adapters")
    args.name = args.name or Path(args.model).expanduser().resolve().name
    api = ("--api-key", args.api_key, args.api_key_file, "FASTLORA_API_KEY", env.server_api_key())
    admin = ("--admin-key", args.admin_key, args.admin_key_file)
    args.keys = ApiKeys(
        resolve_key(*api), resolve_key(*admin, "FASTLORA_ADMIN_KEY", env.server_admin_key())
    )
    return args


@contextlib.contextmanager
def _listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Open a listening socket, and yield it.

    An error for a port in use is raised before the model loads. The socket has to listen, because a
    port without a listener could be bound twice.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise CommandError(
            f"--host {host}: cannot resolve this address ({error.strerror})"
        ) from error
    # asyncio sets TCP_NODELAY only if the protocol is given.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
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
def _exit_cleanly_on_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the server cleanly during a ``with`` block.

    The process then exits with code 0. uvicorn stops the server and raises the signal again, which
    would end the process, but is ignored here. The previous handlers are restored after the block.
    """
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
