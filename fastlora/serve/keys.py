"""The keys of a server: where they come from, and who a request is from."""

from __future__ import annotations

import enum
import hmac
from dataclasses import dataclass
from pathlib import Path

from fastlora.validation import ConfigError, FastLoraError

_MOST_BYTES = 4096  # of a key's file


class AdminKeyError(FastLoraError):
    """A request lacks the admin key."""


class Caller(enum.Enum):
    """Who sent a request."""

    STRANGER = "stranger"
    CLIENT = "client"
    ADMIN = "admin"


@dataclass(frozen=True)
class Keys:
    """The bearer tokens that a server accepts.

    Attributes:
        client: Allows every request but those that change adapters; None allows them to everyone.
        admin: Allows every request; without one the paths that change adapters do not exist.

    Raises:
        ConfigError: Both keys are the same.
    """

    client: str | None = None
    admin: str | None = None

    def __post_init__(self) -> None:
        if self.admin is not None and self.admin == self.client:
            raise ConfigError("the admin key must differ from the API key")

    def caller(self, authorization: bytes) -> Caller:
        """Returns who sends an ``Authorization`` header; the comparison takes constant time."""
        scheme, _, token = authorization.partition(b" ")
        given = token.strip(b" ") if scheme.lower() == b"bearer" else b""
        is_client, is_admin = (
            key is not None and hmac.compare_digest(given, key.encode())
            for key in (self.client, self.admin)
        )
        if is_admin:
            return Caller.ADMIN
        return Caller.CLIENT if is_client or self.client is None else Caller.STRANGER


def read_key(
    option: str, given: str | None, file: Path | None, variable: str, otherwise: str | None
) -> str | None:
    """Returns the key that an option, its file or an environment variable gives, in this order.

    Args:
        option: The option, such as ``--api-key``; its file is the option ``--api-key-file``.
        given: The option's value.
        file: The file's path. One newline at its end is no part of the key.
        variable: The name of the environment variable, for messages.
        otherwise: The variable's value.

    Raises:
        ConfigError: The key is empty, an HTTP header cannot carry it, the file cannot be read, or
            both options are given. The message does not contain the key.
    """
    source, key = option, given
    if file is not None:
        if given is not None:
            raise ConfigError(f"{option} and {option}-file are both given; expected one of them")
        source, key = f"{option}-file {file}", _content(option, file)
    elif given is None:
        source, key = f"${variable}", otherwise
    if key is None:
        return None
    if not key:
        raise ConfigError(f"{source} is empty, expected a key; leave it out for a server without")
    if key != key.strip() or not key.isprintable():
        raise ConfigError(f"{source} has spaces around the key or unprintable characters")
    return key


def _content(option: str, file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{option}-file {file}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{option}-file {file} has more than {_MOST_BYTES} bytes, expected a key")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ConfigError(f"{option}-file {file} is not UTF-8, expected a key") from None
