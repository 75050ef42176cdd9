"""The texts of image pull secrets and Docker configurations → the credentials that fit a repository.

Three shapes are read: `.dockerconfigjson` and `config.json` (`{"auths": {KEY: ENTRY}}`) and the older
`.dockercfg` (`{KEY: ENTRY}`). Keys match as kubelet and containers-auth.json(5) do it: a host, a host with a path
prefix, `https://host/v2/`, `*.azurecr.io`. Where a config.json says that a helper keeps them, the helper is asked, as
the docker CLI does: https://github.com/docker/docker-credential-helpers. Nothing here prints a secret: reprs, messages
and descriptions have the key and the user's name only.
"""

import base64
import binascii
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict, ValidationError

from tuner.errors import ConfigError, Problem
from tuner.redaction import hide, hide_login, redact
from tuner.reference import ImageReference
from tuner.registry.azure import WorkloadIdentity

_DOCKER_HUB_HOSTS = ("docker.io", "index.docker.io", "registry-1.docker.io")
_ENTRY_FIELDS = ("auth", "username", "password", "identitytoken", "registrytoken")
_TOKEN_USER = "<token>"  # whose secret is an identity token
REFRESH_TOKEN_USER = "00000000-0000-0000-0000-000000000000"  # ACR's user for "the password is a refresh token"
_HELPER_S = 60.0  # it may ask the person to unlock a keychain
_REMAKE = "make the secret again with kubectl create secret docker-registry, or run docker login"


@dataclass(frozen=True)
class Credential:
    """One way to identify oneself. The kinds exclude each other, the strongest that is there counts: a registry token
    (sent as it is), an identity token (traded for one), a user with a password, a workload identity, nobody."""

    key: str
    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    workload_identity: WorkloadIdentity | None = None

    def __post_init__(self) -> None:
        hide_login(self.username, self.password)
        for token in (self.identity_token, self.registry_token):
            hide(token)
            hide_login(self.username or REFRESH_TOKEN_USER, token)

    @property
    def is_anonymous(self) -> bool:
        return self == Credential(self.key)

    def describe(self) -> str:
        """Key and user name, for people."""
        if self.workload_identity:
            return f"the Azure workload identity {self.workload_identity.client_id}"
        if self.is_anonymous:
            return "no credential"
        who = f"user {self.username!r}" if self.username else "a token"
        return redact(f"{who} (key {self.key!r} of the secret)")


ANONYMOUS = Credential(key="")


@dataclass(frozen=True)
class CredentialStore:
    """All credentials of several texts, in the order of the texts; beside them each text's helpers: by registry, and
    under "" for all others."""

    texts: tuple[tuple[Credential, ...], ...] = ()
    helpers: tuple[Mapping[str, str], ...] = ()

    def find(self, reference: ImageReference) -> list[Credential]:
        """All that match the repository, best first: by text, then a helper's, then the longest path, then exact host
        before glob."""
        found: list[Credential] = []
        for number, credentials in enumerate(self.texts):
            if (helper := self._helper(number, reference)) and (kept := _ask_helper(helper, reference)):
                found.append(kept)
            ranked = [
                (rank, credential)
                for credential in credentials
                if (rank := _match(credential.key, reference)) is not None
            ]
            ranked.sort(key=lambda pair: pair[0], reverse=True)  # stable: equals stay in the file's order
            found.extend(credential for _, credential in ranked)
        return found

    def missing_helper(self, reference: ImageReference) -> str | None:
        """The program that would have to be asked for this registry, and is not installed."""
        named = (self._helper(number, reference) for number in range(len(self.texts)))
        return next((program for program in named if program and not shutil.which(program)), None)

    def _helper(self, number: int, reference: ImageReference) -> str | None:
        helpers = self.helpers[number] if number < len(self.helpers) else {}
        return helpers.get(_server_of(reference)) or helpers.get(reference.registry) or helpers.get("")

    def describe(self) -> str:
        """The keys that are there, for the sentence that none of them matches."""
        keys = [credential.key for credentials in self.texts for credential in credentials]
        return f"credentials for {', '.join(keys)}" if keys else "no credentials"


class _Entry(BaseModel):
    """One value of `auths`. Unknown keys are other people's (email, …)."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None
    registrytoken: str | None = None


def parse_credentials(texts: Sequence[str]) -> CredentialStore:
    """The credentials of all texts. Raises ConfigError with every problem, never with a word of the content."""
    problems: list[Problem] = []
    parsed: list[tuple[Credential, ...]] = []
    helpers: list[Mapping[str, str]] = []
    for number, text in enumerate(texts, start=1):
        name = "docker config" if len(texts) == 1 else f"docker config {number} of {len(texts)}"
        credentials = [
            _parse_entry(key, entry, name, problems) for key, entry in _parse_text(text, name, problems).items()
        ]
        # `{}` stands where a credential helper keeps the secret.
        parsed.append(tuple(credential for credential in credentials if not credential.is_anonymous))
        helpers.append(_helpers_of(text))
    if problems:
        raise ConfigError.of(problems)
    return CredentialStore(tuple(parsed), tuple(helpers))


def expires_at(credential: Credential) -> datetime | None:
    """When the credential ends, if it is a JWT that says so: ACR's refresh and access tokens do."""
    for token in (credential.registry_token, credential.identity_token, credential.password):
        if token:
            return _jwt_expiry(token)
    return None


def _helpers_of(text: str) -> Mapping[str, str]:
    """Registry → program, from `credHelpers`; under "" that of `credsStore`."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}  # _parse_text says so
    written = document.get("credHelpers") if isinstance(document, dict) else None
    names = {**written} if isinstance(written, dict) else {}
    names[""] = document.get("credsStore") if isinstance(document, dict) else None
    return {
        registry: f"docker-credential-{name}"
        for registry, name in names.items()
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name, re.ASCII)
    }


def _server_of(reference: ImageReference) -> str:
    return "https://index.docker.io/v1/" if reference.registry == "docker.io" else reference.registry


def _ask_helper(program: str, reference: ImageReference) -> Credential | None:
    """What the helper keeps for the registry, or None. Its words may hold a secret and are never shown."""
    path = shutil.which(program)
    if path is None:
        return None
    server = _server_of(reference)
    try:
        done = subprocess.run([path, "get"], input=server, capture_output=True, text=True, timeout=_HELPER_S)
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("Secret"), str) or not answer["Secret"]:
        return None
    user, secret = str(answer.get("Username") or ""), answer["Secret"]
    key = f"{server} in {program}"
    if user == _TOKEN_USER:
        return Credential(key, identity_token=secret)
    return Credential(key, username=user, password=secret)


def _parse_text(text: str, name: str, problems: list[Problem]) -> Mapping[str, object]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):  # the message is harmless, but a ValueError carries the whole text
        document = None
    if not isinstance(document, dict):
        problems.append(Problem("not a JSON object", file=name, hint=_REMAKE))
        return {}
    entries = document["auths"] if "auths" in document else _legacy_entries(document)
    if not isinstance(entries, dict):
        problems.append(Problem("not a JSON object", path="auths", file=name, hint=_REMAKE))
        return {}
    return entries


def _legacy_entries(document: Mapping[str, object]) -> dict[str, object]:
    """The entries of a .dockercfg; a config.json without `auths` has other objects, which are none."""
    return {
        key: value
        for key, value in document.items()
        if isinstance(value, dict) and any(name in value for name in _ENTRY_FIELDS)
    }


def _parse_entry(key: str, value: object, name: str, problems: list[Problem]) -> Credential:
    path = f'auths["{key}"]'
    try:
        entry = _Entry.model_validate(value)
    except ValidationError as error:
        for fault in error.errors(include_input=False, include_url=False, include_context=False):
            where = ".".join((path, *(str(part) for part in fault["loc"])))
            problems.append(Problem(fault["msg"], path=where, file=name, hint=_REMAKE))
        return ANONYMOUS
    username, password = entry.username or "", entry.password or ""
    if entry.auth:
        hide(entry.auth)
        pair = _decode_auth(entry.auth)
        if pair is None:
            problems.append(
                Problem("not the base64 form of user:password", path=f"{path}.auth", file=name, hint=_REMAKE)
            )
            return ANONYMOUS
        username, password = pair
    return Credential(key, username, password, entry.identitytoken or "", entry.registrytoken or "")


def _decode_auth(auth: str) -> tuple[str, str] | None:
    unpadded = auth.strip().rstrip("=")
    try:
        decoded = base64.b64decode(unpadded + "=" * (-len(unpadded) % 4), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    username, colon, password = decoded.partition(":")
    # Some clients of old padded the password with NULs.
    return (username, password.rstrip("\0")) if colon else None


def _match(key: str, reference: ImageReference) -> tuple[int, bool] | None:
    """How well a key fits: (length of its path, whether its host is exact), or None."""
    host, path = _split_key(key)
    registry = reference.registry.lower()
    if path and not f"{reference.repository}/".startswith(f"{path}/"):
        return None
    if host == registry or (registry == "docker.io" and host in _DOCKER_HUB_HOSTS):
        return len(path), True
    return (len(path), False) if _glob_matches(host, registry) else None


def _split_key(key: str) -> tuple[str, str]:
    """Host (lower case, with port) and path, without scheme and without the API's own `v1/`, `v2/`."""
    _, _, rest = key.rpartition("://")
    host, _, path = rest.partition("/")
    for version in ("v1", "v2"):
        if path == version or path.startswith(f"{version}/"):
            path = path[len(version) :]
            break
    return host.lower(), path.strip("/")


def _glob_matches(pattern: str, host: str) -> bool:
    """Label by label, so that `*` stays between two dots; the port must be the same."""
    if "*" not in pattern and "?" not in pattern:
        return False
    pattern_name, _, pattern_port = pattern.partition(":")
    host_name, _, host_port = host.partition(":")
    pattern_labels, host_labels = pattern_name.split("."), host_name.split(".")
    return (
        pattern_port == host_port
        and len(pattern_labels) == len(host_labels)
        and all(fnmatchcase(label, glob) for label, glob in zip(host_labels, pattern_labels, strict=True))
    )


def _jwt_expiry(token: str) -> datetime | None:
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return datetime.fromtimestamp(claims["exp"], UTC)
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
        return None  # opaque tokens may well have two dots
