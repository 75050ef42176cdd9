"""`registry/repository:tag@digest` ⇄ ImageReference, and `oci:DIR:TAG` ⇄ LayoutReference.

The grammar and its normalisation are distribution/reference's, the one KAITO, Docker and containerd use:
https://github.com/distribution/reference. One deliberate difference: `MyOrg/model` is refused, where the
original takes `MyOrg` for a host name.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from tuner.errors import ConfigError

_ALPHANUMERIC = r"[a-z0-9]+"
PATH_COMPONENT = re.compile(rf"{_ALPHANUMERIC}(?:(?:\.|_|__|-+){_ALPHANUMERIC})*")
_HOST_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
REGISTRY = re.compile(rf"(?:{_HOST_LABEL}(?:\.{_HOST_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
IMAGE_ID = re.compile(r"[0-9a-f]{64}")

REPOSITORY_CHARACTERS = 255  # the specification's limit
_DOCKER_HUB = "docker.io"
_PLACEHOLDERS = ("ACR_REPO_HERE", "IMAGE_NAME_HERE")
_EXAMPLE = "write it like myregistry.azurecr.io/adapters/phi-3:v1"

# What `parse_reference` says; tuner/cluster/rules.py has CEL say the same. The first {} is the text as written.
BLANK = "image reference {}: empty, or with white space around it"
NOT_A_DIGEST = "image reference {}: {} is not a digest"
NOT_A_TAG = "image reference {}: {} is not a tag"
NOT_A_REGISTRY = "image reference {}: {} is not a registry host"
NO_REPOSITORY = "image reference {}: no repository"
UPPER_CASE = "image reference {}: the repository {} has upper-case letters"
EMPTY_PART = "image reference {}: an empty part between slashes in {}"
NOT_A_PART = "image reference {}: {} can not be part of a repository name"
TOO_LONG = f"image reference: the repository is too long; at most {REPOSITORY_CHARACTERS} characters"
AN_IMAGE_ID = "image reference {}: this is an image id, not a name"


@dataclass(frozen=True)
class ImageReference:
    """An image in a registry; at least one of `tag` and `digest` is set.

    `tag_is_implied`: nobody wrote the tag, `latest`.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None
    tag_is_implied: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"

    @property
    def name(self) -> str:
        """`registry/repository`, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def is_docker_official(self) -> bool:
        """Whether it is one of Docker Hub's own images, which is what a name without a registry means."""
        return self.registry == _DOCKER_HUB and self.repository.startswith("library/")

    @property
    def short(self) -> str:
        """Without `docker.io/library/` and without a tag that nobody wrote."""
        text = self.name if self.tag_is_implied else str(self)
        return text.removeprefix(f"{_DOCKER_HUB}/library/")

    @property
    def api_host(self) -> str:
        """The host (and port) that speaks the registry's API: Docker Hub's is not the one in its names."""
        return "registry-1.docker.io" if self.registry == _DOCKER_HUB else self.registry

    def with_digest(self, digest: str) -> "ImageReference":
        """`registry/repository@digest`, without the tag: what can not move."""
        return replace(self, tag=None, digest=digest)


@dataclass(frozen=True)
class LayoutReference:
    """An image in an OCI image layout, a directory on disk."""

    path: Path
    tag: str
    digest: str | None = None

    def __str__(self) -> str:
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{digest}"

    @property
    def name(self) -> str:
        """`oci:DIR:TAG`, without the digest."""
        return f"oci:{self.path}:{self.tag}"

    def with_digest(self, digest: str) -> "LayoutReference":
        """The same, and it must be exactly this image."""
        return replace(self, digest=digest)


def parse_reference(text: str) -> ImageReference:
    """The reference in its normal form: `phi:1` is `docker.io/library/phi:1`, no tag and no digest is `latest`.

    Raises ConfigError with one sentence on the first thing that is wrong.
    """
    if not text or text != text.strip():
        raise ConfigError(BLANK.format(repr(text)), hint=_EXAMPLE)
    for placeholder in _PLACEHOLDERS:
        if placeholder in text:
            raise ConfigError(
                f"image reference {text!r}: {placeholder} is the placeholder of KAITO's quick start",
                hint=f"put your own registry and image name there; {_EXAMPLE}",
            )
    if "://" in text:
        raise ConfigError(f"image reference {text!r}: a reference has no scheme", hint=_EXAMPLE)
    rest, at, digest = text.partition("@")
    if at:
        _check_digest(text, digest)
    rest, tag = _split_tag(rest)
    if tag is not None and not TAG.fullmatch(tag):
        valid = re.sub(r"[^\w.-]+", "-", tag, flags=re.ASCII).lstrip(".-")[:128]
        raise ConfigError(
            NOT_A_TAG.format(repr(text), repr(tag)),
            hint="a tag is 1 to 128 letters, digits, '_', '.' or '-', and does not begin with '.' or '-'"
            + (f": write it like {_put(text, len(rest) + 1, tag, valid)}" if TAG.fullmatch(valid) else ""),
        )
    registry, repository = _split_registry(rest)
    if not REGISTRY.fullmatch(registry):
        raise ConfigError(NOT_A_REGISTRY.format(repr(text), repr(registry)), hint=_EXAMPLE)
    _check_repository(text, len(rest) - len(repository), repository)
    if registry == f"index.{_DOCKER_HUB}":
        registry = _DOCKER_HUB
    if registry == _DOCKER_HUB and "/" not in repository:
        if IMAGE_ID.fullmatch(rest):
            raise ConfigError(AN_IMAGE_ID.format(repr(text)), hint=_EXAMPLE)
        repository = f"library/{repository}"
    implied = tag is None and not at
    return ImageReference(registry, repository, "latest" if implied else tag, digest or None, tag_is_implied=implied)


def parse_destination(text: str) -> ImageReference | LayoutReference:
    """`oci:DIR[:TAG][@DIGEST]` is a layout on disk (TAG is `latest` when left out), anything else a reference."""
    if not text.startswith("oci:"):
        return parse_reference(text)
    rest, at, digest = text.removeprefix("oci:").partition("@sha")
    if at:
        digest = f"sha{digest}"
        _check_digest(text, digest)
    directory, tag = _split_tag(rest)
    if not directory:
        raise ConfigError(f"{text!r}: no directory", hint="write oci:DIR:TAG, for example oci:out/adapter:v1")
    if tag is not None and not TAG.fullmatch(tag):
        raise ConfigError(f"{text!r}: {tag!r} is not a tag", hint="write oci:DIR:TAG, for example oci:out/adapter:v1")
    return LayoutReference(Path(directory).expanduser(), tag or "latest", digest or None)


def names_registry(text: str) -> bool:
    """Whether the text begins with a registry host, so that `--output` takes it for an image, not a directory.

    A host has a '.' or a ':' or is localhost, and something follows it: `acr.azurecr.io/x`, `localhost:5000/x`.
    """
    host, slash, _ = text.partition("/")
    if not slash or text.startswith(("/", "~", "./", "../", "oci:")):
        return False
    return _looks_like_host(host)


def _looks_like_host(component: str) -> bool:
    return "." in component or ":" in component or component == "localhost"


def _split_tag(text: str) -> tuple[str, str | None]:
    """A colon after the last slash begins the tag; one before it begins a port."""
    before, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:
        return text, None
    return before, tag


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if slash and _looks_like_host(first):
        return first, rest
    return _DOCKER_HUB, name


def _check_repository(text: str, begin: int, repository: str) -> None:
    """`begin`: where in the text it stands."""
    if not repository:
        raise ConfigError(NO_REPOSITORY.format(repr(text)), hint=_EXAMPLE)
    wrong = ", ".join(map(repr, dict.fromkeys(re.findall(r"[^A-Za-z0-9._/-]", repository))))
    valid = re.sub(r"[^a-z0-9._/-]+", "-", repository.lower())
    valid = "/".join(re.sub(r"([._-])[._-]*", r"\1", part).strip("._-") for part in valid.split("/"))
    is_name = all(PATH_COMPONENT.fullmatch(part) for part in valid.split("/"))
    like = f": write it like {_put(text, begin, repository, valid)}" if is_name else ""
    if repository != repository.lower():
        raise ConfigError(
            UPPER_CASE.format(repr(text), repr(repository)),
            hint=f"repositories are lower case{f', and {wrong} cannot be in one' if wrong else ''}{like}",
        )
    if "//" in repository or repository.startswith("/") or repository.endswith("/"):
        raise ConfigError(
            EMPTY_PART.format(repr(text), repr(repository)),
            hint="leave out the slash that is too many",
        )
    for component in repository.split("/"):
        if not PATH_COMPONENT.fullmatch(component):
            raise ConfigError(
                NOT_A_PART.format(repr(text), repr(component)),
                hint=f"{wrong} cannot be in one{like}"
                if wrong
                else f"parts are lower-case letters and digits, joined by '.', '_', '__' or '-'{like}",
            )
    if len(repository) > REPOSITORY_CHARACTERS:
        raise ConfigError(TOO_LONG)


def _put(text: str, begin: int, wrong: str, valid: str) -> str:
    """The text with `valid` in the place of `wrong`, which begins there."""
    return text[:begin] + valid + text[begin + len(wrong) :]


def _check_digest(text: str, digest: str) -> None:
    if not DIGEST.fullmatch(digest):
        raise ConfigError(
            NOT_A_DIGEST.format(repr(text), repr(digest)),
            hint="a digest is sha256: and 64 lower-case hexadecimal digits",
        )
