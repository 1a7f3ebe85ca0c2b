"""Read the API keys of a server, and identify callers by the keys that they send."""

from __future__ import annotations

import enum
import hmac
from dataclasses import dataclass
from pathlib import Path

from fastlora.validation import ConfigError, FastLoraError

_MOST_BYTES = 4096  # maximum size of a key file


class AdminKeyRequiredError(FastLoraError):
    """Raised when a request that requires the admin key does not provide it."""


class CallerRole(enum.Enum):
    """The role of the caller that sent a request.

    The key in the request determines the role.
    """

    STRANGER = "stranger"
    CLIENT = "client"
    ADMIN = "admin"


@dataclass(frozen=True)
class ApiKeys:
    """The API keys that a server accepts.

    A client sends its key as a bearer token, and `identify_caller` compares this token with the
    keys of the server.

    Attributes:
        client: Key for all requests except those that change adapters. With None, these requests
            need no key.
        admin: Key for all requests. With None, the paths that change adapters do not exist.

    Raises:
        ConfigError: Both keys are the same.
    """

    client: str | None = None
    admin: str | None = None

    def __post_init__(self) -> None:
        if self.admin is not None and self.admin == self.client:
            raise ConfigError("the admin key must differ from the API key")

    def identify_caller(self, authorization: bytes) -> CallerRole:
        """Return the role of the caller that an ``Authorization`` header identifies.

        The keys are compared in constant time.
        """
        scheme, _, token = authorization.partition(b" ")
        given = token.strip(b" ") if scheme.lower() == b"bearer" else b""
        is_client, is_admin = (
            key is not None and hmac.compare_digest(given, key.encode())
            for key in (self.client, self.admin)
        )
        if is_admin:
            return CallerRole.ADMIN
        return CallerRole.CLIENT if is_client or self.client is None else CallerRole.STRANGER


def resolve_key(
    option: str,
    given: str | None,
    file: Path | None,
    variable_name: str,
    variable_value: str | None,
) -> str | None:
    """Return the key from an option, a key file, or an environment variable.

    The environment variable is used only if neither the option nor the file is given.

    Args:
        option: Name of the option, such as ``--api-key``. The option for the file is
            ``--api-key-file``.
        given: Value of the option.
        file: Path of the file. One newline at its end is not part of the key.
        variable_name: Name of the environment variable, for messages.
        variable_value: Value of the environment variable.

    Returns:
        The key, or None if none is given.

    Raises:
        ConfigError: The key is empty, an HTTP header cannot contain it, the file cannot be read, or
            both options are given. The message does not contain the key.
    """
    source, key = option, given
    if file is not None:
        if given is not None:
            raise ConfigError(f"both {option} and {option}-file are given; pass only one of them")
        source, key = f"{option}-file {file}", _read_key_file(option, file)
    elif given is None:
        source, key = f"${variable_name}", variable_value
    if key is None:
        return None
    if not key:
        raise ConfigError(f"{source} is empty, expected a key; leave it unset to run without a key")
    if key != key.strip() or not key.isprintable():
        raise ConfigError(
            f"the key in {source} has leading or trailing whitespace, or contains non-printable "
            "characters"
        )
    return key


def _read_key_file(option: str, file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{option}-file {file}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(
            f"{option}-file {file} is larger than {_MOST_BYTES} bytes, the maximum size of a key "
            "file; it must contain only the key"
        )
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{option}-file {file} is not valid UTF-8; it must contain only the key"
        ) from None
