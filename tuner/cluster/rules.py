"""The parser's rules as CEL, so that `kubectl apply` refuses what `tuner check` refuses, in the same words.

    a validator of tuner/workspace.py ──► Text, Rules: the schema of such a value ──► crd.py: at each field of its type

Sentences, patterns and limits are those of workspace.py, reference.py and urls.py: only the logic is written twice, and
tests/test_crd.py evaluates both on the same table.

What CEL cannot see is left to the controller: what a host name resolves to, hosts in letters other than ASCII, whether
an IPv6 literal parses. So is what takes long regexes: a signature in a URL's path. The API server refuses a CRD whose
rules might cost too much, estimated from the bounds of every string and list, and an object on which they did. So:
only functions that servers since 1.29 have (`find`, `matches`, `lowerAscii`; no `ip()`), no variables
(`[x].map(v, …)` has no size that the estimate knows), no numbers made text, and short regexes for URLs.
tests/crd_server.py estimates as the server does, which is recorded. Rules instead of `pattern`: they have sentences.
(A server of 1.36 shows whoever applies it the text that fails a rule, too: their own.)
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from typing import Any

from tuner import reference, urls, workspace
from tuner.workspace import MAX_TEXT_CHARACTERS, MAX_URL_CHARACTERS
from tuner.yaml_lines import UNFILLED_EXPRESSION

Cel = str  # an expression

# So much that the rules on so many URLs of that length stay within what the server spends on one object. More files
# go into an image or a volume; `tuner submit`, which makes no Workspace object, has no such limit.
MAX_URLS = 28
MAX_VALIDATION_URLS = 4
MAX_LABELS, MAX_LABEL_CHARACTERS = 64, 317  # a key has a prefix of up to 253 characters


@dataclass(frozen=True)
class Rule:
    """Where `holds` is false the API server refuses the object and says `says`.

    `in_words`: CEL that makes the sentence when it has a value in it; `says` is then what stays if that fails.
    `at`: the field that is named, below the one where the rule stands.
    """

    holds: Cel
    says: str
    in_words: Cel | None = None
    at: str | None = None

    def manifest(self) -> dict[str, Any]:
        """The item of `x-kubernetes-validations`."""
        written = {"rule": self.holds, "message": self.says, "messageExpression": self.in_words, "fieldPath": self.at}
        return {key: value for key, value in written.items() if value is not None}


Case = tuple[Cel, Cel]  # what is wrong, and the sentence on it


@dataclass(frozen=True)
class Text:
    """Strings of one kind: how long they may be, and what else is asked of them.

    `cases` are one rule, which says the first that applies, as the parser does.
    """

    characters: int
    cases: tuple[Case, ...] = ()
    says: str = "is not a value that fits here"

    def schema(self, *, may_be_empty: bool = False) -> dict[str, Any]:
        """The schema; `may_be_empty` where KAITO takes "" for a missing field."""
        rule = first_of(self.says, *UNFILLED, *self.cases)
        if may_be_empty:
            rule = replace(rule, holds=f"self == '' || ({rule.holds})")
        return {"type": "string", "maxLength": self.characters, "x-kubernetes-validations": [rule.manifest()]}


# ── writing CEL ──────────────────────────────────────────────────────────────────────────────────────────────────────


def literal(text: str) -> Cel:
    return json.dumps(text, ensure_ascii=False)


def pattern(regex: str) -> Cel:
    """A raw string, for RE2."""
    assert "'" not in regex
    return f"r'{regex}'"


def matches(regex: str, of: Cel = "self") -> Cel:
    return f"{of}.matches({pattern(regex)})"


def found(regex: str, of: Cel = "self") -> Cel:
    return f"{of}.find({pattern(regex)})"


def quoted(of: Cel) -> Cel:
    """As repr() shows a text without quotes in it."""
    return f'"\'" + {of} + "\'"'


def words(sentence: str, *values: Cel) -> Cel:
    """The sentence with each `{}` filled in by CEL."""
    first, *rest = sentence.split("{}")
    assert len(rest) == len(values), sentence
    parts = [literal(first)] if first else []
    for value, after in zip(values, rest, strict=True):
        parts += [value, literal(after)] if after else [value]
    return " + ".join(parts)


def first_of(says: str, *cases: Case) -> Rule:
    """One rule for all the cases: the sentence of the first that applies, else `says`."""
    return Rule(" && ".join(f"!({wrong})" for wrong, _ in cases), says, first_sentence(*cases))


def first_sentence(*cases: Case) -> Cel:
    """The sentence of the first case that applies; the last needs no asking."""
    in_words = cases[-1][1]
    for wrong, sentence in reversed(cases[:-1]):
        in_words = f"({wrong}) ? ({sentence}) : ({in_words})"
    return in_words


# ── what nobody has filled in ────────────────────────────────────────────────────────────────────────────────────────

_EXPRESSION = f"(?s){workspace.TEMPLATE_EXPRESSION.pattern}"
_PLACEHOLDER = workspace.PLACEHOLDER.pattern
_SEVERAL_PLACEHOLDERS = f"(?s){workspace.SEVERAL_PLACEHOLDERS.pattern}"
UNFILLED: tuple[Case, ...] = (
    (matches(_EXPRESSION), words(UNFILLED_EXPRESSION, found(_EXPRESSION))),
    (matches(_SEVERAL_PLACEHOLDERS), words(workspace.PLACEHOLDERS, found(_SEVERAL_PLACEHOLDERS))),
    (matches(_PLACEHOLDER), words(workspace.A_PLACEHOLDER, found(_PLACEHOLDER))),
)

# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_NAME = "self.metadata.name"
_WRONG_NAME = first_of(
    "must be a DNS-1123 label",
    (f"{_NAME}.size() > {workspace.LABEL_CHARACTERS}", literal(workspace.TOO_LONG.format(workspace.LABEL_CHARACTERS))),
    (f"!{matches(f'^{workspace.LABEL.pattern}$', _NAME)}", words(workspace.NOT_A_LABEL, quoted(_NAME))),
)
_OBJECT_NAME = f"^{workspace.SUBDOMAIN.pattern}$"
OBJECT_NAME = Text(
    workspace.OBJECT_NAME_CHARACTERS,
    ((f"!{matches(_OBJECT_NAME)}", literal(workspace.NOT_AN_OBJECT_NAME)),),
    says=workspace.NOT_AN_OBJECT_NAME,
)
REQUIRED_TEXT = Text(MAX_TEXT_CHARACTERS, (("self == ''", literal(workspace.EMPTY)),), says=workspace.EMPTY)
SECRET = Text(workspace.OBJECT_NAME_CHARACTERS)  # its name is checked one floor up, and only beside an image
LABEL = Text(MAX_LABEL_CHARACTERS)
ANY_TEXT = Text(MAX_TEXT_CHARACTERS)


def one_of(choices: Sequence[str]) -> Text:
    """Words, in any case."""
    listed = ", ".join(f"'{choice}'" for choice in choices)
    sentence = words(workspace.NOT_A_CHOICE.replace("{}", " or ".join(choices), 1), quoted("self"))
    said = workspace.NOT_A_CHOICE.partition(",")[0].format(" or ".join(choices))
    return Text(16, ((f"!(self.lowerAscii() in [{listed}])", sentence),), says=said)


# ── image references (reference.py) ──────────────────────────────────────────────────────────────────────────────────

# What str.strip() takes away.
_SPACE = r"[\s\x{1c}-\x{1f}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
_HOST = r"(?:localhost|[^/@]*[.:][^/@]*)/"  # a first part that is meant as one: reference.names_registry
_HAS_HOST = matches(f"^{_HOST}")
_REPOSITORY = f"({_HAS_HOST} ? {found(r'/[^:@]*')}.substring(1) : {found(r'^[^:@]*')})"
_PART = reference.PATH_COMPONENT.pattern
_TAG = r":[^:/]*$"
_NAME_AND_TAG = found(r"^[^@]*")
_IMAGE_CASES: tuple[Case, ...] = (
    ("self.contains('://')", literal(workspace.A_URL)),
    (matches(f"^$|^{_SPACE}|{_SPACE}$"), words(reference.BLANK, quoted("self"))),
    (
        f"self.contains('@') && !{matches(f'^[^@]*@(?:{reference.DIGEST.pattern})$')}",
        words(reference.NOT_A_DIGEST, quoted("self"), quoted(f"{found('(?s)@.*')}.substring(1)")),
    ),
    (
        f"{matches(_TAG, _NAME_AND_TAG)} && !{matches(f':{reference.TAG.pattern}$', _NAME_AND_TAG)}",
        words(reference.NOT_A_TAG, quoted("self"), quoted(f"{found(_TAG, _NAME_AND_TAG)}.substring(1)")),
    ),
    (
        f"{_HAS_HOST} && !{matches(f'^{reference.REGISTRY.pattern}/')}",
        words(reference.NOT_A_REGISTRY, quoted("self"), quoted(found(r"^[^/]*"))),
    ),
    (f"{_REPOSITORY} == ''", words(reference.NO_REPOSITORY, quoted("self"))),
    (matches("[A-Z]", _REPOSITORY), words(reference.UPPER_CASE, quoted("self"), quoted(_REPOSITORY))),
    (matches("//|^/|/$", _REPOSITORY), words(reference.EMPTY_PART, quoted("self"), quoted(_REPOSITORY))),
    (
        f"!{matches(f'^(?:{_HOST})?{_PART}(?:/{_PART})*(?::[^:/]*)?(?:@.*)?$')}",
        words(reference.NOT_A_PART, quoted("self"), quoted(_REPOSITORY)),
    ),
    (f"{_REPOSITORY}.size() > {reference.REPOSITORY_CHARACTERS}", literal(reference.TOO_LONG)),
    (matches(f"^{reference.IMAGE_ID.pattern}(?:@|$)"), words(reference.AN_IMAGE_ID, quoted("self"))),
)
IMAGE = Text(MAX_TEXT_CHARACTERS, _IMAGE_CASES, says="is not an image reference")
OUTPUT_IMAGE = Text(
    MAX_TEXT_CHARACTERS,
    (*_IMAGE_CASES, ("self.contains('@')", words(workspace.NAMES_DIGEST, quoted("self")))),
    says="is not an image reference that can be pushed to",
)

# ── URLs (urls.py) ───────────────────────────────────────────────────────────────────────────────────────────────────


def _number_between(low: int, high: int) -> str:
    """A regex for the decimal numbers from `low` to `high`: 16 to 31 is 1[6-9]|2[0-9]|3[0-1]"""
    by_ten: dict[int, list[int]] = {}
    for number in range(low, high + 1):
        by_ten.setdefault(number // 10, []).append(number % 10)
    return "|".join(f"{ten or ''}[{units[0]}-{units[-1]}]" for ten, units in by_ten.items())


def dotted(network: IPv4Network) -> str:
    r"""A regex for the network's addresses in dotted decimal: 172.16.0.0/12 is 172\.(1[6-9]|…)(\.\d+){2}"""
    parts: list[str] = []
    for low, high in zip(network.network_address.packed, network.broadcast_address.packed, strict=True):
        if (low, high) == (0, 255):
            break
        parts.append(str(low) if low == high else f"({_number_between(low, high)})")
    missing = 4 - len(parts)
    return r"\.".join(parts) + (rf"(\.\d+){{{missing}}}" if missing else "")


_SHARED = IPv4Network("100.64.0.0/10")
# Of what ipaddress calls private the ranges that networks are made of; the rest is left to the controller.
PRIVATE_IPV4 = (*map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")), _SHARED)
_HTTP = "(?i)^https?://"
_END = "([:/?#]|$)"  # of a host
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_HOST_AS_WRITTEN = found("//[^/?#:]*") + ".lowerAscii().substring(2)"
_SLASHES_AND_NAME = found("//[^/?#:]*[^/?#:.]") + ".lowerAscii()"  # without dots at its end; "" without a host
_HOST_NAME = f"{_SLASHES_AND_NAME}.substring(2)"  # where there is a host: the server takes no error for an answer
_IPV4 = found(r"//[\d.]*\d") + ".substring(2)"
_IPV6 = found(r"\[[^\]]*") + ".lowerAscii().substring(1)"


def _host(regex: str) -> Cel:
    """Whether the URL's host is this."""
    return matches(rf"{_HTTP}({regex})\.*{_END}")


def _in_ipv4(*networks: IPv4Network) -> Cel:
    return _host("|".join(map(dotted, networks)))


def _in_ipv6(beginning: str) -> Cel:
    return matches(rf"{_HTTP}\[({beginning})")


def _is_one_of(hosts: Collection[str]) -> Cel:
    return f"{_SLASHES_AND_NAME} in [{', '.join(literal(f'//{host}') for host in sorted(hosts))}]"


def _never(what: str, address: Cel) -> Cel:
    return words(urls.NEVER_AN_ADDRESS.format("{}", what), address)


def _opened_by_flag(sentence: str, address: Cel, bits: int) -> Cel:
    return words(sentence.format("{}", "{}", bits), address, address)


_SCHEME = "^[A-Za-z][A-Za-z0-9+.-]+:"  # without one it is a path: workspace.is_local_file
_BAD_CHARACTER = r"(?s:.*)[\x00-\x20\x7f\\]"
_IS_TEXT = matches(r"\S")
_IS_FILE = matches("(?i)^file:")
_IS_HTTP = matches("(?i)^https?:")
_AUTHORITY = matches(_HTTP + r"([^][/?#:@]+|\[[0-9A-Fa-f:.]+\])(:0*\d{0,5})?([/?#]|$)")
_BAD_PORT = matches(r"^[^/]*//[^/?#]*:0*(6553[6-9]|655[4-9]\d|65[6-9]\d\d|6[6-9]\d{3}|[7-9]\d{4})([/?#]|$)")
_NO_NAME = rf"{_HTTP}([^/?#:@[]*(%|\.\.+[^/?#:.])|\.+{_END})"
_BELOW_LOCALHOST = r"[^/?#:]*\.localhost"
_BEFORE_QUERY = found("^[^?]*")  # a placeholder in a signed query is none
_NUMBER = r"([^/?#:@%]*\.)?(0x[0-9a-f]*|\d+)"
_FOUR_NUMBERS = matches(rf"^[^/]*//({_BYTE}(\.|\b)){{4}}\.*{_END}")
(_LOOPBACK_IPV4,) = (network for network in urls.LOOPBACK if isinstance(network, IPv4Network))
_LOOPBACK_IPV6 = r"(0{0,4}:)+0{0,3}1\]"
_CLOUD_IPV6 = "fd00:0?ec2:|fd20:(00)?ce:"
_NEVER_IPV4 = [(network, what) for network, what in urls.NEVER if isinstance(network, IPv4Network)]
_NEVER_OF_SHARED = [network for network, _ in _NEVER_IPV4 if network.subnet_of(_SHARED)]
_NEVER_IPV6 = {
    "fe[89ab][0-9a-f]:": "a link-local address",
    _CLOUD_IPV6: "a cloud's metadata address",
    r"[0:]+\]": "an unspecified address",
    "ff[0-9a-f]{2}:": "a multicast address",
}

_NEVER_FETCHED = (
    Rule(f"!{matches(_EXPRESSION, _BEFORE_QUERY)}", UNFILLED_EXPRESSION.format("render the file first")),
    Rule(f"!{matches(_PLACEHOLDER, _BEFORE_QUERY)}", workspace.A_PLACEHOLDER.format("it")),
    Rule(_IS_TEXT, workspace.EMPTY),
    Rule(f"!{_IS_TEXT} || ({matches(_SCHEME)} && !{_IS_FILE})", workspace.LOCAL_FILE),
    Rule(f"!{matches(_SCHEME + _BAD_CHARACTER)}", urls.BAD_CHARACTER),
    Rule(f"!{matches(_SCHEME)} || {_IS_HTTP} || {_IS_FILE}", urls.BAD_SCHEME),
    Rule(
        f"!{_IS_HTTP} || {_AUTHORITY}",
        urls.INVALID,
        f"{matches(_HTTP + '([^/?#]*@)?([:/?#]|$)')} || !{matches(_HTTP)} ? {literal(urls.NO_HOST)}"
        f" : {matches(_HTTP + '[^/?#]*@')} ? {literal(urls.USERINFO)} : {literal(urls.INVALID)}",
    ),
    Rule(f"!{_BAD_PORT}", urls.INVALID),
    Rule(
        f"!{matches(_NO_NAME)}",
        urls.NOT_A_HOST.format("this"),
        words(urls.NOT_A_HOST, _HOST_AS_WRITTEN),
    ),
    Rule(
        f"!({_is_one_of(urls.METADATA_HOSTS)})",
        urls.NEVER_A_HOST.format("the host"),
        words(urls.NEVER_A_HOST, _HOST_NAME),
    ),
    Rule(
        f"!{_in_ipv4(*(network for network, _ in _NEVER_IPV4))}",
        urls.NEVER_AN_ADDRESS.format("the host", "a metadata, link-local, unspecified or multicast address"),
        first_sentence(*((_in_ipv4(network), _never(what, _IPV4)) for network, what in _NEVER_IPV4)),
    ),
    Rule(
        f"!{_in_ipv6('|'.join(_NEVER_IPV6))}",
        urls.NEVER_AN_ADDRESS.format("the host", "a metadata, link-local, unspecified or multicast address"),
        first_sentence(*((_in_ipv6(beginning), _never(what, _IPV6)) for beginning, what in _NEVER_IPV6.items())),
    ),
)
_UNLESS_OPENED = (
    Rule(
        f"!{_host(_NUMBER)} || {_FOUR_NUMBERS}",
        urls.NOT_AN_ADDRESS.format("the host"),
        words(urls.NOT_AN_ADDRESS, _HOST_NAME),
    ),
    Rule(
        f"!({_is_one_of(urls.LOCAL_HOSTS)} || {_host(_BELOW_LOCALHOST)})",
        urls.THIS_MACHINE.format("the host"),
        words(urls.THIS_MACHINE, _HOST_NAME),
    ),
    Rule(
        f"!{_in_ipv4(_LOOPBACK_IPV4, *PRIVATE_IPV4)} || {_in_ipv4(*_NEVER_OF_SHARED)}",
        urls.PRIVATE_ADDRESS.format("the host", "ADDRESS", 32),
        first_sentence(
            (_in_ipv4(_LOOPBACK_IPV4), _opened_by_flag(urls.LOOPBACK_ADDRESS, _IPV4, 32)),
            ("", _opened_by_flag(urls.PRIVATE_ADDRESS, _IPV4, 32)),
        ),
    ),
    Rule(
        f"!{_in_ipv6('(0*:)+([0-9a-f.]+:)*[1-9a-f][0-9a-f.]+|0{0,2}64:ff9b:|2002:|2001:0*:')}"
        f" || {_in_ipv6(_LOOPBACK_IPV6)}",
        urls.WRAPPED,
    ),
    Rule(
        f"!{_in_ipv6(f'{_LOOPBACK_IPV6}|f[cd]|2001:0?db8:')} || {_in_ipv6(_CLOUD_IPV6)}",
        urls.PRIVATE_ADDRESS.format("the host", "ADDRESS", 128),
        first_sentence(
            (_in_ipv6(_LOOPBACK_IPV6), _opened_by_flag(urls.LOOPBACK_ADDRESS, _IPV6, 128)),
            ("", _opened_by_flag(urls.PRIVATE_ADDRESS, _IPV6, 128)),
        ),
    ),
)


def url(*, opened: bool) -> dict[str, Any]:
    """The schema of an item of `urls`. `opened`: the controller has an --allow-cidr; what that opens it alone knows."""
    rules = _NEVER_FETCHED if opened else (*_NEVER_FETCHED, *_UNLESS_OPENED)
    return {
        "type": "string",
        "maxLength": MAX_URL_CHARACTERS,
        "x-kubernetes-validations": [rule.manifest() for rule in rules],
    }


# ── volumes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _kinds_named(kinds: Iterable[str]) -> Cel:
    """How many of these kinds of volume `self` has."""
    return f"[{', '.join(f'has(self.{kind})' for kind in sorted(kinds))}].filter(named, named).size()"


VOLUME = (
    Rule(f"{_kinds_named(workspace.VOLUME_KINDS)} > 0", workspace.NO_VOLUME),
    Rule(f"{_kinds_named(workspace.VOLUME_KINDS)} < 2", workspace.SEVERAL_VOLUMES),
    *(
        Rule(
            f"!has(self.{kind}) || (has(self.{kind}.{key}) && self.{kind}.{key} != '')",
            workspace.INCOMPLETE_VOLUME.format(kind, key),
        )
        for kind, key in workspace.REQUIRED_OF_VOLUME.items()
    ),
)
OUTPUT_VOLUME = (
    *VOLUME,
    *(
        Rule(f"!has(self.{kind})", workspace.READ_ONLY_VOLUME.format(kind))
        for kind in sorted(workspace.READ_ONLY_VOLUME_KINDS)
    ),
)

# ── rules that look at more than one field ───────────────────────────────────────────────────────────────────────────


_IS_WRITTEN = {
    "image": "has(self.image) && self.image != ''",
    "urls": "has(self.urls) && self.urls.size() > 0",
    "volumeSource": "has(self.volumeSource)",
}


def _exactly_one(keys: Iterable[str], sentence: str) -> tuple[Rule, ...]:
    """ "" and [] are as good as not written, as in KAITO."""
    count = " + ".join(f"({_IS_WRITTEN[key]} ? 1 : 0)" for key in keys)
    return Rule(f"{count} > 0", sentence), Rule(f"{count} < 2", workspace.ANOTHER_ONE.format(sentence))


def unchanged(key: str, sentence: str) -> Rule:
    """`key` is as it was; a dotted key has parents that may be missing."""
    names = key.split(".")
    before = [f"self.{'.'.join(names[: depth + 1])}" for depth in range(len(names))]
    there = " && ".join(f"has({each})" for each in before)
    old = there.replace("self.", "oldSelf.")
    return Rule(f"({there}) == ({old}) && (!({there}) || self.{key} == oldSelf.{key})", sentence, at=f".{key}")


_WITH_TUNING = "!has(self.tuning) || !has(self.resource)"
WHOLE = (
    replace(_WRONG_NAME, at=".metadata.name"),
    Rule("has(self.inference) || has(self.tuning)", workspace.NOT_NEITHER),
    Rule("!(has(self.inference) && has(self.tuning))", workspace.NOT_BOTH, at=".inference"),
    Rule(
        f"{_WITH_TUNING} || !has(self.resource.count) || self.resource.count <= 1",
        workspace.ONE_NODE,
        at=".resource.count",
    ),
    Rule(f"{_WITH_TUNING} || !has(self.resource.partition)", workspace.NO_PARTITION, at=".resource.partition"),
    Rule("has(self.tuning) == has(oldSelf.tuning)", "tuning cannot be added or removed; make another Workspace"),
    unchanged("resource.count", "the number of nodes cannot be changed"),
    unchanged("resource.labelSelector", "the label selector cannot be changed; make another Workspace"),
    Rule(
        "!has(oldSelf.resource) || !has(oldSelf.resource.instanceType) || oldSelf.resource.instanceType == ''"
        " || (has(self.resource) && has(self.resource.instanceType)"
        " && self.resource.instanceType == oldSelf.resource.instanceType)",
        "the instance type cannot be changed once it is set; make another Workspace",
        at=".resource.instanceType",
    ),
)
TUNING = (
    Rule(
        "self.method.lowerAscii() == oldSelf.method.lowerAscii()",
        "the method cannot be changed; make another Workspace",
        at=".method",
    ),
    Rule("self.preset == oldSelf.preset", "the preset cannot be changed; make another Workspace", at=".preset"),
)


def _secret(key: str, right: Cel) -> Rule:
    """Names of Secrets count only beside an image."""
    image = _IS_WRITTEN["image"]
    return Rule(f"!({image}) || !has(self.{key}) || {right}", workspace.NOT_AN_OBJECT_NAME, at=f".{key}")


def _is_object_name(of: Cel) -> Cel:
    return f"({matches(_OBJECT_NAME, of)} || {matches(_PLACEHOLDER, of)} || {matches(_EXPRESSION, of)})"


INPUT = (
    *_exactly_one(workspace.INPUT_VARIANTS, workspace.EXACTLY_ONE["tuning", "input"]),
    _secret("imagePullSecrets", f"self.imagePullSecrets.all(name, {_is_object_name('name')})"),
    unchanged("name", "the name of the input cannot be changed"),
)
OUTPUT = (
    *_exactly_one(workspace.OUTPUT_VARIANTS, workspace.EXACTLY_ONE["tuning", "output"]),
    Rule(
        f"!({_IS_WRITTEN['image']}) || (has(self.imagePushSecret) && self.imagePushSecret != '')",
        workspace.NO_PUSH_SECRET,
        at=".imagePushSecret",
    ),
    _secret("imagePushSecret", f"self.imagePushSecret == '' || {_is_object_name('self.imagePushSecret')}"),
)
