"""Which URLs may be fetched, and what of a URL may be shown.

The guard stands at two doors: `url_problem` when a Workspace is read and at every redirect, `ConnectionPolicy` on the
address that a connection is made to, before a byte goes out. Downloads and registries have an adapter each for that,
as they use two HTTP libraries.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from tuner.errors import ConfigError, did_you_mean
from tuner.folder import Use
from tuner.redaction import hide_url, is_secret_parameter, is_signed_in_path

Address = IPv4Address | IPv6Address
AddressRange = IPv4Network | IPv6Network

METADATA_HOSTS = frozenset(
    {
        "metadata",
        "metadata.google",
        "metadata.google.internal",
        "metadata.goog",
        "metadata.azure.internal",
        "metadata.azure.com",
        "metadata.tencentyun.com",
        "instance-data",
        "instance-data.ec2.internal",
        "rancher-metadata",
    }
)
LOCAL_HOSTS = frozenset({"localhost", "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback"})

# Where clouds hand out credentials to whoever asks. Nothing opens these.
NEVER: tuple[tuple[AddressRange, str], ...] = (
    (ip_network("168.63.129.16/32"), "Azure's platform address"),
    (ip_network("169.254.0.0/16"), "a link-local address, where clouds keep instance metadata"),
    (ip_network("100.100.100.200/32"), "a cloud's metadata address"),
    (ip_network("fe80::/10"), "a link-local address"),
    (ip_network("fd00:ec2::/32"), "a cloud's metadata address"),
    (ip_network("fd20:ce::/32"), "a cloud's metadata address"),
    (ip_network("0.0.0.0/8"), "an unspecified address"),  # Linux connects 0.0.0.0 to this machine
    (ip_network("::/128"), "an unspecified address"),
    (ip_network("224.0.0.0/4"), "a multicast address"),
    (ip_network("255.255.255.255/32"), "the broadcast address"),
    (ip_network("ff00::/8"), "a multicast address"),
)
LOOPBACK: tuple[AddressRange, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))

# IPv6 addresses that carry an IPv4 address in their last 32 bits.
_IPV4_AT_END: tuple[IPv6Network, ...] = (
    IPv6Network("::ffff:0:0/96"),  # mapped
    IPv6Network("::ffff:0:0:0/96"),  # translated, RFC 2765
    IPv6Network("::/96"),  # compatible, RFC 4291
    IPv6Network("64:ff9b::/96"),  # NAT64, RFC 6052
    IPv6Network("64:ff9b:1::/48"),  # NAT64 of one's own, RFC 8215
)

# Short words that mean something else elsewhere: part of a signature only where there is one.
# fmt: off
_WITH_SIG = frozenset({
    "sv", "ss", "srt", "sr", "sp", "st", "se", "spr", "sip", "sdd", "si", "ses", "skoid", "sktid", "skt", "ske",
    "sks", "skv", "saoid", "suoid", "scid", "rscc", "rscd", "rsce", "rscl", "rsct",
})
# fmt: on
_WITH_SIGNATURE = frozenset({"expires", "policy", "hash-algorithm"})

# Where data lie that are not fetched by a plain GET: the URL's scheme → the package that reads it.
STORE_PACKAGES = {
    "hf": "huggingface_hub",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
# https://huggingface.co/docs/huggingface_hub/guides/hf_file_system
HUB_DATASET = re.compile(r"hf://datasets/(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>.*))?")

_HUB_HOST = "huggingface.co"
_MOST_WEIGHT = 100
_PIN = re.compile(r"[0-9a-f]{64}")
_BAD_CHARACTERS = re.compile(r"[\x00-\x20\\\x7f]")
# What the guard says. `{}` is filled in here, and by CEL in tuner/cluster/rules.py: the CRD says the same words.
INVALID = "invalid data source URL"
BAD_CHARACTER = f"{INVALID}: it has a space, a control character or a backslash"
BAD_SCHEME = "a data source URL must use HTTP or HTTPS"
NO_HOST = f"{INVALID}: it has no host"
LONG_HOST = f"{INVALID}: its host is too long"
USERINFO = "a data source URL must not hold a user name or password"
SIGNED_PATH = f"{INVALID}: what signs it stands in its path; it belongs into the query, which begins with a ?"
NOT_A_HOST = f"{INVALID}: {{}} is not a host name"
NOT_AN_ADDRESS = f"{INVALID}: {{}} is not an IP address in four decimal numbers"
WRAPPED = f"{INVALID}: write the IPv4 address itself, without IPv6 around it"
NEVER_A_HOST = "{} is a metadata endpoint; it is never fetched from"
NEVER_AN_ADDRESS = "{} is {}; it is never fetched from"
THIS_MACHINE = "{} is this machine; --allow-cidr 127.0.0.1/32 opens it"
LOOPBACK_ADDRESS = "{} is a loopback address; --allow-cidr {}/{} opens it"
PRIVATE_ADDRESS = "{} is a private or reserved address; --allow-cidr {}/{} opens it"

_AUTHORITY_CHARACTERS = 512  # twice what a name and a port can have

_UNSAFE_IN_NAME = re.compile(r"[^A-Za-z0-9._+=-]+")
_NAME_CHARACTERS = 100


# ── the guard ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Allowed:
    """What a run may reach beside public addresses.

    `cidrs` (--allow-cidr) opens exactly what it names, loopback included. `private` (--allow-private-urls) opens
    loopback and private ranges. Link-local and metadata addresses are opened by neither.
    """

    cidrs: tuple[AddressRange, ...] = ()
    private: bool = False

    @classmethod
    def of(cls, cidrs: Sequence[str], private: bool) -> "Allowed":
        """Parse --allow-cidr; ConfigError for what is no range, or one that is never opened."""
        return cls(tuple(_parse_cidr(cidr) for cidr in cidrs), private)

    def opens(self, address: Address) -> bool:
        return any(address in cidr for cidr in self.cidrs if cidr.version == address.version)

    def opens_some_loopback(self) -> bool:
        return self.private or any(
            loopback.version == cidr.version and loopback.overlaps(cidr) for cidr in self.cidrs for loopback in LOOPBACK
        )


def _parse_cidr(text: str) -> AddressRange:
    try:
        cidr = ip_network(text.strip(), strict=False)
    except ValueError as error:
        raise ConfigError(
            f"--allow-cidr {text}: not a range of IP addresses", hint="write it as 10.1.0.0/16 or fd12:3456::/32"
        ) from error
    for never, what in NEVER:
        if cidr.version == never.version and cidr.subnet_of(never):  # type: ignore[arg-type]  # same version
            raise ConfigError(f"--allow-cidr {text}: {what}; it is never opened")
    return cidr


def url_problem(url: str, allowed: Allowed, *, stores: bool = False) -> str | None:
    """One sentence on why this URL is not fetched, or None. The sentence holds neither query nor userinfo.

    A name that passes is not yet safe: where it resolves to is for `address_problem`. `stores`: hf://, s3://, gs://
    and az:// will do as well, which is so on a box only.
    """
    if url != url.strip() or _BAD_CHARACTERS.search(url):
        return BAD_CHARACTER
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    if len(authority) > _AUTHORITY_CHARACTERS:  # before anybody normalizes it, which takes the square of its length
        return LONG_HOST
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # .port raises for a bad one
    except ValueError:
        return INVALID
    if stores and parts.scheme in STORE_PACKAGES:
        return _store_problem(url)
    if parts.scheme not in ("http", "https"):
        return BAD_SCHEME
    if not host:
        return NO_HOST
    if "@" in parts.netloc:
        return USERINFO
    if is_signed_in_path(url):
        return SIGNED_PATH
    return _host_problem(host, allowed)


def is_hub_url(url: str) -> bool:
    """Whether it is the Hugging Face Hub that is asked for this URL, and so gets the user's token with it."""
    parts = urlsplit(url)
    return parts.scheme == "hf" or (parts.scheme, parts.hostname, parts.port or 443) == ("https", _HUB_HOST, 443)


def address_problem(address: str, allowed: Allowed, *, by_name: bool) -> str | None:
    """One sentence on why no connection is made to this address, or None.

    `by_name`: a host name resolved to it. Private ranges are then open (Private Link, MinIO); loopback is not.
    """
    try:
        written = ip_address(address)
    except ValueError:
        return f"{address} is not an IP address that we read"  # a zone id, say
    real = _unwrapped(written)
    shown = str(written) if real == written else f"{written} ({real})"
    for never, what in NEVER:
        if real in never:
            return NEVER_AN_ADDRESS.format(shown, what)
    if allowed.opens(real) or allowed.opens(written):
        return None
    if any(real in loopback for loopback in LOOPBACK):
        return None if allowed.private else LOOPBACK_ADDRESS.format(shown, real, real.max_prefixlen)
    if real.is_global or by_name or allowed.private:
        return None
    return PRIVATE_ADDRESS.format(shown, real, real.max_prefixlen)


def literal_address(host: str) -> str | None:
    """The address that a URL's host is; None for a name."""
    try:
        return str(ip_address(host.strip("[]")))
    except ValueError:
        return None


@dataclass(frozen=True)
class ConnectionPolicy:
    """Where connections may go: to what is `allowed`, and to `trusted_host`, which the user named, wherever it is."""

    allowed: Allowed
    trusted_host: str | None = None

    def refusal(self, host: str, address: str) -> str | None:
        """One sentence on why there is no connection to this address, which `host` is or resolved to; None: it may be.

        Whoever asks connects to this very address or is connected to it: asked again, a name may say another one.
        """
        if host.strip("[]") == self.trusted_host:
            return None
        by_name = literal_address(host) is None
        problem = address_problem(address, self.allowed, by_name=by_name)
        return f"{host} resolves to a forbidden address: {problem}" if problem and by_name else problem


class AddressRefusedError(Exception):
    """A policy's refusal on its way through an HTTP library."""


def _store_problem(url: str) -> str | None:
    if "?" in url:
        return "invalid data source URL: a store's URL has no query"
    if url.startswith("hf:"):
        return (
            None if HUB_DATASET.fullmatch(redacted(url)) else "write it as hf://datasets/OWNER/NAME[@REVISION][/PATH]"
        )
    parts = urlsplit(url)
    if "@" in parts.netloc:
        return USERINFO
    return None if parts.netloc and parts.path.strip("/") else "invalid data source URL: write bucket and path"


def _host_problem(host: str, allowed: Allowed) -> str | None:
    # Browsers and resolvers read 127。0。0。1 and full-width digits as plain ones, so we do too.
    name = unicodedata.normalize("NFKC", host).replace("。", ".").lower().rstrip(".")
    if ":" in name:
        return _ipv6_problem(name, allowed)
    if not name or "%" in name or ".." in name:
        return NOT_A_HOST.format(host)
    if name in METADATA_HOSTS:
        return NEVER_A_HOST.format(name)
    if name in LOCAL_HOSTS or name.endswith(".localhost"):
        return None if allowed.opens_some_loopback() else THIS_MACHINE.format(name)
    if _is_number(name.rsplit(".", 1)[-1]):
        literal = _ipv4_literal(name)
        if literal is None or (str(literal) != name and not _opened(literal, allowed)):
            return NOT_AN_ADDRESS.format(name)
        return address_problem(str(literal), allowed, by_name=False)
    return None


def _ipv6_problem(name: str, allowed: Allowed) -> str | None:
    try:
        real = _unwrapped(ip_address(name))
    except ValueError:
        return address_problem(name, allowed, by_name=False)
    if isinstance(real, IPv4Address) and not _opened(real, allowed):
        return WRAPPED
    return address_problem(name, allowed, by_name=False)


def _opened(address: Address, allowed: Allowed) -> bool:
    """An address in disguise (0x7f.1, ::ffff:7f00:1) is taken for what it is only where it is opened on purpose.

    Nobody needs the disguise, and CEL, which guards `kubectl apply`, cannot see through it.
    """
    return allowed.private or allowed.opens(address)


def _is_number(label: str) -> bool:
    return label.isdecimal() or re.fullmatch(r"0x[0-9a-f]*", label) is not None


def _ipv4_literal(host: str) -> IPv4Address | None:
    """127.0.0.1 from any form that inet_aton reads: 2130706433, 0x7f.1, 0177.0.0.1; None when it is none."""
    labels = host.split(".")
    if len(labels) > 4 or not all(_is_number(label) for label in labels):
        return None
    try:
        *heads, last = (_number(label) for label in labels)
    except ValueError:  # 08 is no octal number
        return None
    if any(head > 255 for head in heads) or last >= 256 ** (4 - len(heads)):
        return None
    return IPv4Address(sum(head << 8 * (3 - place) for place, head in enumerate(heads)) + last)


def _number(label: str) -> int:
    if label.startswith("0x"):
        return int(label[2:] or "0", 16)
    return int(label, 8 if label.startswith("0") else 10)


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, compatible, 6to4, NAT64, Teredo), else itself."""
    if isinstance(address, IPv4Address):
        return address
    if address.sixtofour:
        return address.sixtofour
    if address.teredo:
        return address.teredo[1]
    if int(address) > 1 and any(address in network for network in _IPV4_AT_END):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


# ── what of a URL may be shown and kept ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SourceOptions:
    """What stands after the `#` of a source: `sha256=HEX`, `rows=1000`, `weight=0.5`, `use=validation`, with & between.

    `rows` is how many of its rows are taken at most; `weight` how often each of them is.
    """

    sha256: str | None = None
    rows: int | None = None
    weight: float | None = None
    use: Use = "training"


_OPTION = re.compile(r"(sha256|rows|weight|use)=", re.IGNORECASE)


def split_options(text: str) -> tuple[str, SourceOptions]:
    """A source without its options, and these. Raises ConfigError for one that is malformed or not known."""
    bare, hash_sign, fragment = text.partition("#")
    if not hash_sign or "=" not in fragment:
        return (bare if "://" in text else text), SourceOptions()
    if "://" not in text and not _OPTION.match(fragment):
        return text, SourceOptions()  # a # in the name of a file
    return bare, _options(fragment, redacted(text))


def _options(fragment: str, shown: str) -> SourceOptions:
    found: dict[str, Any] = {}
    for part in fragment.split("&"):
        name, _, value = part.partition("=")
        name = name.lower()
        if name == "sha256":
            found[name] = _pin(value, shown)
        elif name == "rows":
            if not value.isdecimal() or not int(value):
                raise ConfigError(f"{shown}: #rows= wants a whole number of rows, at least 1")
            found[name] = int(value)
        elif name == "weight":
            found[name] = _weight(value, shown)
        elif name == "use":
            if value not in ("training", "validation"):
                raise ConfigError(f"{shown}: #use= is training or validation")
            found[name] = value
        else:
            known = ("sha256", "rows", "weight", "use")
            raise ConfigError(
                f"{shown}: what stands after its # is not known there",  # nor shown: it may be secret
                hint=did_you_mean(name, known) or "known are sha256=HEX, rows=NUMBER, weight=NUMBER and use=validation",
            )
    if found.get("use") == "validation" and found.get("weight") is not None:
        raise ConfigError(f"{shown}: a weight is of rows that are trained on", hint="#rows=… takes some of them")
    return SourceOptions(**found)


def _weight(value: str, shown: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= _MOST_WEIGHT:
        raise ConfigError(f"{shown}: #weight= wants a number above 0, up to {_MOST_WEIGHT}")
    return weight


@dataclass(frozen=True)
class SplitUrl:
    """A URL taken apart by who may see what. Only `url`, `options` and `name` may be shown.

    `query` is secret. `public_query` lacks the parameters of a signature and decides, as a digest, what is fetched.
    """

    url: str
    query: str = field(repr=False)
    public_query: str = field(repr=False)
    options: SourceOptions
    name: str

    @property
    def query_sha256(self) -> str:
        """What UrlSource.query_sha256 holds: "" for a URL whose query only signs."""
        return hashlib.sha256(self.public_query.encode()).hexdigest() if self.public_query else ""


def split_url(text: str) -> SplitUrl:
    """A URL in its parts; ConfigError for one that does not parse or whose `#sha256=` is malformed."""
    hide_url(text)
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{redacted(text)}: invalid data source URL") from error
    return SplitUrl(
        url=redacted(text),
        query=parts.query,
        public_query=_without_signature(parts.query),
        options=split_options(text)[1],
        name=unquote(parts.path.rstrip("/").rsplit("/", 1)[-1]),
    )


def redacted(url: str) -> str:
    """The URL without userinfo, query and fragment: fit for a message."""
    bare = url.split("#", 1)[0].split("?", 1)[0]
    scheme, separator, rest = bare.partition("://")
    if not separator:
        return bare
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rsplit('@', 1)[-1]}{slash}{path}"


def source_name(index: int, url: str) -> str:
    """`0003-train.parquet`: the file name of the index-th source (from 0), so that equal basenames do not meet."""
    name = _UNSAFE_IN_NAME.sub("_", unquote(redacted(url).partition("://")[2].partition("/")[2].rsplit("/", 1)[-1]))
    if len(name) > _NAME_CHARACTERS:
        endings = re.search(r"(\.[A-Za-z0-9]{1,8}){1,2}$", name)
        ending = endings.group() if endings else ""
        name = name[: _NAME_CHARACTERS - len(ending)] + ending
    return f"{index:04d}-{name.lstrip('.') or 'data'}"


def _without_signature(query: str) -> str:
    """The query less what signs or authorises it, in its order: a renewed SAS names the same data.

    `key` stays: it is as often the name of an object as it is a secret.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    names = {name.lower() for name, _ in pairs}
    dropped: set[str] = set()
    if "sig" in names:
        dropped |= _WITH_SIG
    if "signature" in names:
        dropped |= _WITH_SIGNATURE
    return urlencode(
        [(name, value) for name, value in pairs if name.lower() not in dropped and not is_secret_parameter(name)]
    )


def _pin(value: str, shown: str) -> str:
    if not _PIN.fullmatch(value.lower()):
        raise ConfigError(
            f"{shown}: #sha256= wants 64 hexadecimal digits, not these {len(value)} characters",
            hint="`sha256sum FILE` prints them",
        )
    return value.lower()
