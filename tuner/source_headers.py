"""Headers for private data sources: a JSON text that says which URLs get which, as a docker config does for registries.

{"https://data.example/team/": {"bearer": "…"},
 "https://files.example": {"username": "me", "password": "…"},
 "https://*.blob.core.windows.net": {"headers": {"Authorization": "Bearer …", "x-ms-version": "2023-11-03"}}}
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from tuner.errors import ConfigError, Problem
from tuner.redaction import hide_header, hide_url
from tuner.urls import redacted

SOURCES_KEY = "sources.json"  # in a Secret

_PORTS = {"http": 80, "https": 443}
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*")
# They decide which bytes come and when an answer ends: not for others to set.
_OURS = re.compile(
    r"(?i)host|range|accept-encoding|connection|te|trailer|transfer-encoding|upgrade|if-.*|content-.*|proxy-.*"
)
_SHAPES = '{"bearer": …}, {"username": …, "password": …} or {"headers": {…}}'


@dataclass(frozen=True)
class SourceHeaders:
    """What is sent with every request below a URL. `host` may hold `*`, which stays between two dots."""

    scheme: str
    host: str
    port: int
    path: str  # without a slash at its end
    headers: Mapping[str, str] = field(repr=False)

    def __post_init__(self) -> None:
        for value in self.headers.values():
            hide_header(value)

    def match(self, parts: SplitResult) -> bool:
        pattern = re.escape(self.host).replace(r"\*", r"[^.]*")
        return (
            parts.scheme == self.scheme
            and (parts.port or _PORTS.get(parts.scheme)) == self.port
            and re.fullmatch(pattern, _plain_host(parts)) is not None
            and f"{_plain_path(parts.path)}/".startswith(f"{self.path}/")
        )


def headers_for(url: str, entries: Sequence[SourceHeaders]) -> dict[str, str]:
    """Those of the most exact entry: the longest path, then a host without `*`, then the first."""
    parts = urlsplit(url)
    fitting = [entry for entry in entries if entry.match(parts)]
    best = max(fitting, key=lambda entry: (len(entry.path), "*" not in entry.host), default=None)
    return dict(best.headers) if best else {}


def parse_source_headers(text: str, origin: str) -> tuple[SourceHeaders, ...]:
    """The entries of a sources.json. Raises ConfigError with every problem at once and no word of a secret."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ConfigError(f"{origin}: not a JSON object", hint=f"URL prefix → {_SHAPES}")
    entries: list[SourceHeaders] = []
    problems: list[Problem] = []
    for key, value in document.items():
        hide_url(key)
        try:
            entries.append(_parse_entry(key, value))
        except ValueError as error:
            problems.append(Problem(f"{redacted(key)}: {error}", file=origin))
    if problems:
        raise ConfigError.of(problems)
    return tuple(entries)


def _parse_entry(key: str, value: Any) -> SourceHeaders:
    """ValueError with a sentence that shows nothing of the value."""
    parts = _parse_key(key if "://" in key else f"https://{key}")
    return SourceHeaders(
        scheme=parts.scheme,
        host=_plain_host(parts),
        port=parts.port or _PORTS[parts.scheme],
        path=_plain_path(parts.path),
        headers=_parse_headers(value),
    )


def _parse_key(key: str) -> SplitResult:
    try:
        parts = urlsplit(key)
        _ = parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError("must be the beginning of an http or https URL")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be a URL without user, query and fragment")
    labels = _plain_host(parts).split(".")
    if "*" in "".join(labels[-2:]):  # a secret for *.com would be one for everybody
        raise ValueError("may have * only left of the last two names of a host")
    return parts


def _parse_headers(value: Any) -> dict[str, str]:
    match value:
        case {"bearer": str(token)} if len(value) == 1:
            headers = {"Authorization": f"Bearer {token.strip()}"}
        case {"username": str(user), "password": str(password)} if len(value) == 2 and ":" not in user:
            credential = base64.b64encode(f"{user}:{password}".encode()).decode()
            headers = {"Authorization": f"Basic {credential}"}
        case {"headers": dict(headers)} if len(value) == 1:
            pass
        case _:
            raise ValueError(f"must be {_SHAPES}")
    for name, content in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError("a header's name has characters that no header's name has")
        if _OURS.fullmatch(name):
            raise ValueError(f"the header {name} is not for you to set")
        if not isinstance(content, str) or not _HEADER_VALUE.fullmatch(content):
            raise ValueError(f"the value of {name} must be text without line breaks and without letters beyond ASCII")
    return headers


def _plain_host(parts: SplitResult) -> str:
    host = (parts.hostname or "").rstrip(".")
    try:
        return host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError:
        return host


def _plain_path(path: str) -> str:
    """Without a slash at its end. Of a path that climbs nothing is known but its host."""
    segments = unquote(path).replace("\\", "/").split("/")
    return "" if {".", ".."} & set(segments) else path.rstrip("/")
