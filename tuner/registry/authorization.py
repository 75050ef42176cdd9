"""What a registry's challenge asks for, and the request that gets a token for it. Pure: transport.py sends it.

Challenges: RFC 9110 §11.6.1. Tokens: https://distribution.github.io/distribution/spec/auth/token/ and .../oauth/.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from tuner.errors import DeniedError, ServiceError
from tuner.redaction import hide
from tuner.registry.credentials import REFRESH_TOKEN_USER, Credential
from tuner.urls import Allowed, url_problem

CLIENT_ID = "tuner"
TOKEN_REPLY_BYTES = 64 << 10
_DEFAULT_LIFETIME_S = 60.0  # what the token specification says when `expires_in` is missing

_PARAMETER = re.compile(r'([\w!#$%&\'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME = re.compile(r"[\w!#$%&'*+.^`|~-]+(?=[\s,]|$)")
_SEPARATORS = re.compile(r"[\s,]+")
_REST = re.compile(r"[^,]*")


@dataclass(frozen=True)
class Challenge:
    """One way in that the registry offers; `scheme` and the parameters' names are lower case."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class TokenRequest:
    """How to ask a token server. `form` is the body of a POST; without one it is a GET."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    form: Mapping[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Token:
    value: str = field(repr=False)
    lifetime_s: float

    def __post_init__(self) -> None:
        hide(self.value)


def parse_challenges(header: str) -> list[Challenge]:
    """All challenges of a WWW-Authenticate header, values quoted or bare; what is malformed is passed over."""
    challenges: list[tuple[str, dict[str, str]]] = []
    position = 0
    while position < len(header):
        if separators := _SEPARATORS.match(header, position):
            position = separators.end()
        elif parameter := _PARAMETER.match(header, position):
            name, quoted, bare = parameter.groups()
            if challenges:
                value = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                challenges[-1][1].setdefault(name.lower(), value)
            position = parameter.end()
        elif scheme := _SCHEME.match(header, position):
            challenges.append((scheme.group().lower(), {}))
            position = scheme.end()
        else:
            rest = _REST.match(header, position)
            position = max(position + 1, rest.end() if rest else 0)
    return [Challenge(scheme, parameters) for scheme, parameters in challenges]


def basic_header(username: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"


def token_scopes(wanted: str, challenged: str) -> list[str]:
    """The scopes to ask for: what the whole job needs and what this challenge adds to it.

    A scope is `repository:NAME:ACTION,ACTION`. Asking only for what is challenged gets a token that reads, is kept,
    and fails at the first write. What is newly challenged stands first: some registries read only one.
    """
    scopes = [wanted]
    resource, _, actions = wanted.rpartition(":")
    for scope in challenged.split():
        other_resource, _, other_actions = scope.rpartition(":")
        if other_resource == resource:
            more = [action for action in other_actions.split(",") if action not in actions.split(",")]
            scopes[-1] = f"{resource}:{','.join([actions, *more])}"
        else:
            scopes.insert(0, scope)
    return scopes


def token_requests(challenge: Challenge, credential: Credential, scopes: Sequence[str]) -> list[TokenRequest]:
    """The requests to try in order. The second one is for token servers that know no POST."""
    realm = challenge.parameters.get("realm", "")
    service = challenge.parameters.get("service", "")
    query = [("service", service)] if service else []
    query += [("scope", scope) for scope in scopes]
    get_url = _with_query(realm, query)
    if credential.identity_token:
        form = {
            "grant_type": "refresh_token",
            "service": service,
            "client_id": CLIENT_ID,
            "scope": " ".join(scopes),
            "refresh_token": credential.identity_token,
        }
        user = credential.username or REFRESH_TOKEN_USER
        return [
            TokenRequest(realm, {}, form),
            TokenRequest(get_url, {"Authorization": basic_header(user, credential.identity_token)}),
        ]
    if credential.username or credential.password:
        return [TokenRequest(get_url, {"Authorization": basic_header(credential.username, credential.password)})]
    return [TokenRequest(get_url, {})]


def parse_token(body: bytes, host: str) -> Token:
    """The token of a token server's reply, called `token` or `access_token`."""
    try:
        reply = json.loads(body)
        value = reply.get("token") or reply.get("access_token")
        lifetime_s = float(reply.get("expires_in") or _DEFAULT_LIFETIME_S)
    except (ValueError, AttributeError, TypeError):
        value, lifetime_s = None, 0.0
    if not isinstance(value, str) or not value.isprintable() or not value.isascii():
        raise ServiceError(f"{host}: the token server's reply has no token in it")
    return Token(value, lifetime_s)


def same_origin(url: str, other: str) -> bool:
    """Equal scheme, host and port: only there a credential may go."""
    return _origin(url) == _origin(other)


def check_address(url: str, registry_url: str, what: str, allowed: Allowed) -> str:
    """The URL, when a registry may send us there. Raises DeniedError for a downgrade to http, and for another host
    that is this machine, a private address or a metadata service and is not in `allowed`."""
    registry = urlsplit(registry_url)
    allowed_schemes = ("http", "https") if registry.scheme == "http" else ("https",)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # .port raises for a bad one
    except ValueError:
        raise DeniedError(f"{registry.netloc}: what the registry names as its {what} is not a URL") from None
    problem = None
    if parts.scheme not in allowed_schemes:
        problem = f"{parts.scheme or 'no scheme'} instead of {registry.scheme}"
    elif host != registry.hostname or "@" in parts.netloc:
        problem = url_problem(url, allowed)
    if problem:
        raise DeniedError(
            f"{registry.netloc}: not going to {host!r}, which the registry names as its {what}: {problem}",
            hint="ask who runs the registry; nothing was sent to that address",
        )
    return url


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _with_query(url: str, query: Sequence[tuple[str, str]]) -> str:
    parts = urlsplit(url)
    joined = "&".join(part for part in (parts.query, urlencode(query)) if part)
    return urlunsplit(parts._replace(query=joined, fragment=""))
