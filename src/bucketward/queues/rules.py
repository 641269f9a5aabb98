"""What is the same for every queue: which bodies it takes, and what its URL may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from bucketward.errors import ConfigError, Unsupported
from bucketward.model import Reason

MAX_BODY = 256 * 1024
"""In bytes of UTF-8."""

_N = TypeVar("_N", int, float)


def check_bodies(bodies: Sequence[str], backend: str) -> None:
    """Raise `Unsupported` if any of `bodies` is too large, or no text."""
    for body in bodies:
        try:
            size = len(body.encode())
        except UnicodeEncodeError as error:
            raise Unsupported(
                "a message has to be Unicode text; this one has a lone surrogate",
                backend=backend,
                reason=Reason.UNSUPPORTED,
            ) from error
        if size > MAX_BODY:
            raise Unsupported(
                f"a message of {size:,} bytes is over the 256 KiB that a queue takes",
                backend=backend,
                reason=Reason.TOO_LARGE,
            )


@dataclass(frozen=True, slots=True)
class Address:
    """A queue's URL, taken apart; `path` is decoded."""

    scheme: str
    host: str
    path: str
    options: Mapping[str, str]

    def seconds(self, name: str, default: float) -> float:
        """Return an option that is a number of seconds above 0."""
        return self._number(name, float, default, 0.001)

    def count(self, name: str, default: int) -> int:
        """Return an option that is a whole number, 0 included."""
        return self._number(name, int, default, 0)

    def _number(self, name: str, kind: type[_N], default: _N, lowest: float) -> _N:
        text = self.options.get(name)
        try:
            value = default if text is None else kind(text)
        except ValueError:
            value = kind(-1)
        if not lowest <= value < math.inf:
            raise ConfigError(
                f"the option {name} in a queue's URL is {text!r}; it has to be a number, at "
                f"least {lowest}",
                backend=self.scheme,
            )
        return value


def parse_url(url: str, scheme: str, options: frozenset[str]) -> Address:
    """Take a queue's URL apart; `ConfigError` for whatever it should not have."""
    try:
        parts = urlsplit(url)
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"the queue's {scheme} URL cannot be read", backend=scheme) from error
    if parts.scheme != scheme:
        raise ConfigError(f"a URL of this queue begins with {scheme}://", backend=scheme)
    if "@" in parts.netloc or parts.fragment:
        raise ConfigError(
            f"a {scheme} URL names a queue and nothing else: take the user name, password and "
            "fragment out of it",
            backend=scheme,
        )
    if unknown := sorted({name for name, _ in given} - options):
        raise ConfigError(
            f"a {scheme} URL has no option {unknown[0]!r}; it has "
            f"{', '.join(sorted(options)) or 'none'}",
            backend=scheme,
        )
    return Address(scheme, parts.netloc, unquote(parts.path), dict(given))
