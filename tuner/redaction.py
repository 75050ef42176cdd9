"""The one place that takes secrets out of what is said.

    hide(password)       whoever learns a secret says so: from then on no sentence of this process shows it
    redact(sentence)     fit for a terminal, a log, an error or an object of a cluster

A secret that is hidden is found in every spelling that servers and libraries give it: percent-coded, in JSON or HTML,
in base64 or as a part of something longer in it. Besides, what looks like a secret is not shown, whoever it is of: the
query, user and fragment of a URL, a parameter that signs, an Authorization header.

The values that hold secrets hide them when they are made (Credential, Token, Secrets, SourceHeaders), and whatever
speaks redacts by itself (TunerError, StageResult, Talk, the objects that the controller writes): nobody between them
has to think of it.
"""

import base64
import html
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import quote, quote_plus, unquote

_SHOWN = "…"
_LEAST_CHARACTERS = 4  # what is shorter is a part of every other word, and no secret
_LEAST_OF_VALUE = 8  # `true` and `2024` stand in queries and variables, too
_LEAST_OF_UNNAMED = 16  # in a parameter whose name says nothing
_MOST_PARAMETERS = 50  # of a URL; no signature has so many
_MOST_SECRETS = 4096  # a controller hears of new ones for as long as it runs

# fmt: off
_SECRET_PARAMETERS = frozenset({
    "sig", "signature", "token", "access_token", "accesstoken", "id_token", "auth", "authorization", "auth_token",
    "apikey", "api_key", "api-key", "password", "passwd", "secret", "client_secret", "credential", "credentials",
    "jwt", "sas", "hmac", "private_token", "job_token", "awsaccesskeyid", "googleaccessid", "ossaccesskeyid",
    "key-pair-id", "x-ms-token", "refresh_token", "identitytoken", "registrytoken", "client_assertion", "sessionid",
    "jsessionid",
})
# fmt: on
_SIGNATURE_PREFIXES = ("x-amz-", "x-goog-", "x-oss-", "x-obs-", "x-cos-", "q-sign", "q-ak", "q-key-time")


def is_secret_parameter(name: str) -> bool:
    """Whether a parameter of this name, in a URL's query, signs or authorises."""
    return name.lower() in _SECRET_PARAMETERS or name.lower().startswith(_SIGNATURE_PREFIXES)


# ── by their looks ───────────────────────────────────────────────────────────────────────────────────────────────────

_NAME = "|".join(
    [
        *sorted(map(re.escape, _SECRET_PARAMETERS), key=len, reverse=True),
        *(re.escape(prefix) + "[a-z-]*" for prefix in _SIGNATURE_PREFIXES),
    ]
)
_PERCENT = "%(?:25)*"  # coded once or more often
_EQUALS = f"(?:=|{_PERCENT}3D)"
# Where a URL's secret part begins: a query or a fragment, and in its path what only looks like one to us.
_PATH_PARAMETER = f"(?:[;&,]|{_PERCENT}(?:3F|3B|26))(?=(?:{_NAME}){_EQUALS})"
_SECRET_PART = re.compile(f"[?#]|{_PATH_PARAMETER}|{_PERCENT}3F(?=[^/]*{_EQUALS})", re.IGNORECASE)
_SIGNED_PATH = re.compile(f"(?:[^a-z0-9]|{_PERCENT}[0-9A-F]{{2}})(?:{_NAME}){_EQUALS}", re.IGNORECASE)
# One slash: a URL that somebody took for a path. A layout (oci:/DIR:TAG@sha256:…) is none.
_URL = re.compile(r"(?<![\w.+-])((?!oci:)[a-z][a-z0-9+.-]+:/{1,3}|(?<![:/])//)(?=[^\s/])(\S+)", re.IGNORECASE)
_QUERY = re.compile(r"(?<=[\w/])\?(?=[\w.%~-]+=)[^\s\"'<>]+")  # behind a path alone
_CLOSED_BY = {"'": "'", '"': '"', "`": "`", "(": ")", "[": "]", "<": ">"}
_USER = re.compile(r"(?<![\w/@.%+~-])[\w.%+~-]+:[^\s@/'\"]+@(?!sha\d+:)(?=[\w\[])")
# A tokenizer's tokens (eos_token=…) are none of ours.
_ASSIGNED = re.compile(
    rf"(?<![A-Za-z0-9])(?<!(?:eos|bos|pad|unk)_)({_NAME})({_EQUALS})(?!{_SHOWN})[^\s&;,\"'<>)]+", re.IGNORECASE
)
_QUOTE = r"\\*[\"']"
_MEMBER = re.compile(rf"({_QUOTE}(?:{_NAME}){_QUOTE}\s*:\s*{_QUOTE})(?!{_SHOWN})[^\"'\\]+", re.IGNORECASE)
_AUTHORIZATION = re.compile(rf"(\bauthorization:\s+\w+\s+)(?!{_SHOWN})[^\s\"',;]+", re.IGNORECASE)
_HEADER = re.compile(r"\b(basic|bearer)(\s+)([A-Za-z0-9._~+/-]{8,}=*)", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with `…` for whatever of it is secret, or may be."""
    text = _hidden.out_of(text)
    text = _URL.sub(_shown_url, text)
    text = _QUERY.sub(f"?{_SHOWN}", text)
    text = _USER.sub(f"{_SHOWN}@", text)
    text = _ASSIGNED.sub(rf"\1\2{_SHOWN}", text)
    text = _MEMBER.sub(rf"\1{_SHOWN}", text)
    text = _AUTHORIZATION.sub(rf"\1{_SHOWN}", text)
    return _HEADER.sub(_shown_header, text)


def is_signed_in_path(url: str) -> bool:
    """Whether something that signs stands in the URL's path, where it would be taken for the name of a file."""
    _, rest = _taken_apart(url)
    return _SIGNED_PATH.search(re.split("[?#]", rest)[0]) is not None


def _shown_url(match: re.Match[str]) -> str:
    """`https://host/path?…`; as it stands when nothing of it is secret."""
    begin, run = match.groups()
    closing = _CLOSED_BY.get(match.string[match.start() - 1 : match.start()], "")
    end = run.rfind(closing) if closing else -1
    written, after = (run[:end], run[end:]) if end >= 0 else (run, "")
    user, rest = _taken_apart("//" + written)
    secret = _SECRET_PART.search(rest)
    host = user.rpartition("@")[2]
    if secret is None:
        return match[0] if host == user else f"{begin}{host}{rest}{after}"
    if begin.lower() in ("http:/", "https:/"):
        begin += "/"
    sign = "" if secret[0] == "#" else f"?{_SHOWN}"
    of_sentence = written[len(written.rstrip("\"'`)]>:,;.")) :]
    return f"{begin}{host}{rest[: secret.start()]}{sign}{of_sentence}{after}"


def _taken_apart(url: str) -> tuple[str, str]:
    """The authority (user and host) and what follows it, ("", url) without one. A password may hold a slash."""
    begin = re.match("(?:[A-Za-z][A-Za-z0-9+.-]*:)?//", url)
    if begin is None:
        return "", url
    after = url[begin.end() :]
    end = len(re.split("[/?#]", after)[0])
    port = re.search(r":([^:\]]*)$", after[:end])
    if "@" not in after[:end] and "@" in after and port and not port[1].isdecimal():
        end = after.rindex("@") + 1
        end += len(re.split("[/?#]", after[end:])[0])
    return after[:end], after[end:]


def _shown_header(match: re.Match[str]) -> str:
    scheme, space, value = match.groups()
    is_token = len(value) >= _LEAST_OF_UNNAMED and any(character.isdigit() for character in value)
    is_login = False
    with suppress(ValueError):
        is_login = b":" in base64.b64decode(value.rstrip("=") + "==")
    return f"{scheme}{space}{_SHOWN}" if (is_token if scheme.lower() == "bearer" else is_login) else match[0]


# ── by name ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Hidden:
    """The secrets of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spellings_of: dict[str, tuple[str, ...] | None] = {}  # None until something is to be said
        self._longest_first: tuple[str, ...] | None = ()

    def add(self, secret: str) -> None:
        with self._lock:
            known = self._spellings_of.pop(secret, None)
            self._spellings_of[secret] = known  # the newest stands last
            if len(self._spellings_of) > _MOST_SECRETS:
                del self._spellings_of[next(iter(self._spellings_of))]
            if known is None:
                self._longest_first = None

    def out_of(self, text: str) -> str:
        with self._lock:
            if self._longest_first is None:
                # Only now: a file may name more secrets than are kept, and each takes time.
                spelt = {secret: known or tuple(_spellings(secret)) for secret, known in self._spellings_of.items()}
                self._spellings_of.update(spelt)
                every = {spelling for spellings in spelt.values() for spelling in spellings}
                self._longest_first = tuple(sorted(every, key=len, reverse=True))
            spellings = self._longest_first
        for spelling in spellings:
            if spelling in text:
                text = text.replace(spelling, _SHOWN)
        return text

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """For tests: what is hidden in the block is unknown again after it."""
        before = dict(self._spellings_of)
        try:
            yield
        finally:
            self._spellings_of, self._longest_first = before, None


_hidden = _Hidden()
forgotten = _hidden.forgotten


def hide(secret: str | None) -> None:
    """From now on no sentence shows it; what is too short to be a secret is left as it is."""
    for each in {secret or "", (secret or "").strip(), "".join(filter(str.isprintable, secret or ""))}:
        if len(each) >= _LEAST_CHARACTERS:
            _hidden.add(each)


def hide_login(username: str, password: str) -> None:
    """The password, and what is sent for both."""
    if password:
        hide(password)
        hide(base64.b64encode(f"{username}:{password}".encode()).decode())


def hide_header(value: str) -> None:
    """A header's value, and of an Authorization what is in it."""
    scheme, space, token = value.partition(" ")
    if len(value) >= _LEAST_OF_VALUE:
        hide(token if space and scheme.lower() in ("basic", "bearer", "token") else value)
    if space and scheme.lower() == "basic":
        with suppress(ValueError):
            username, _, password = base64.b64decode(token).decode().partition(":")
            hide_login(username, password)


_PIN = re.compile("(?<=[#&])sha256=[0-9a-f]{64}(?=&|$)", re.IGNORECASE)  # a digest is for all to see


def hide_url(url: str) -> None:
    """What of a URL is secret, in whatever shape it was written."""
    authority, rest = _taken_apart(url)
    user, at, _ = authority.rpartition("@")
    if at:
        username, colon, password = user.partition(":")
        hide(password if colon else username)
        hide_login(unquote(username), unquote(password) if colon else "")
    rest = _PIN.sub("", rest)
    secret = _SECRET_PART.search(rest)
    public = f"{authority}{rest[: secret.start()] if secret else rest}"
    for part in re.split("[?#]", rest[secret.start() :]) if secret else ():
        for written in {part, unquote(part), unquote(unquote(part))}:
            if len(written) >= _LEAST_OF_VALUE:
                hide(written)
            parameters = re.split("[&;,]", written, maxsplit=_MOST_PARAMETERS)
            for name, equals, value in (each.partition("=") for each in parameters):
                if equals and len(value) >= _least_of(name) and value not in public:
                    hide(value)


def _least_of(parameter: str) -> int:
    """Characters. Of what belongs to a signature much is no secret: X-Amz-SignedHeaders=host."""
    if parameter.lower() in _SECRET_PARAMETERS:
        return _LEAST_CHARACTERS
    return _LEAST_OF_VALUE if is_secret_parameter(parameter) else _LEAST_OF_UNNAMED


def hide_arguments(arguments: Sequence[str]) -> None:
    """The secrets in the URLs of a command line."""
    for argument in arguments:
        for match in _URL.finditer(argument):
            hide_url(match[0])


_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|CONNECTION_STRING|SAS")
# Where one is, or how an object that holds it is called: our own say the names of a pod's Secrets.
_PLACE_VARIABLE = re.compile(r"^TUNER_|(_FILE|_PATH|_DIR|_DIRECTORY|_NAME|_URL|_APPLICATION_CREDENTIALS)$")


def hide_environment(environment: Mapping[str, str]) -> None:
    """What is in variables that are called like secrets, and the users in addresses, of proxies above all."""
    for name, value in environment.items():
        upper = name.upper()
        if "@" in value and (upper.endswith("_PROXY") or "://" in value):
            hide_url(value if "://" in value else f"http://{value}")
        elif _SECRET_VARIABLE.search(upper) and not _PLACE_VARIABLE.search(upper) and len(value) >= _LEAST_OF_VALUE:
            hide(value)


def _spellings(secret: str) -> Iterator[str]:
    plain = {secret, *(json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False))}
    plain |= {html.escape(secret), html.escape(secret, quote=False), secret.encode("unicode_escape").decode()}
    coded = {quote(secret, safe=safe) for safe in ("", "/", "/~", "/+=:,~")} | {quote_plus(secret)}
    coded |= {quote(each, safe="") for each in set(coded)}
    coded |= {re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), each) for each in set(coded)}
    bits = secret.encode()
    coded |= {bits.hex(), bits.hex().upper()}
    for letters in _in_base64(bits):
        coded |= {letters, quote(letters, safe="")}
    every = plain | coded
    return iter(every | {each.replace("/", "\\/") for each in every})


def _in_base64(bits: bytes) -> Iterator[str]:
    """The letters that are the secret's alone in the base64 of anything that holds it, in both alphabets."""
    for before in range(3):  # bytes that share letters with it
        letters = base64.b64encode(bytes(before) + bits).decode().rstrip("=")
        inner = letters[-(-before * 8 // 6) : len(letters) if (before + len(bits)) % 3 == 0 else -1]
        if len(inner) >= _LEAST_OF_VALUE:
            yield inner
            yield inner.translate(str.maketrans("+/", "-_"))
