"""tuner/reference.py: the table follows distribution/reference's own cases."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import ConfigError
from tuner.reference import ImageReference, LayoutReference, names_registry, parse_destination, parse_reference

SHA256 = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("scratch", "docker.io/library/scratch:latest"),
        ("phi:1", "docker.io/library/phi:1"),
        ("org/phi", "docker.io/org/phi:latest"),
        ("docker.io/phi", "docker.io/library/phi:latest"),
        ("index.docker.io/phi:1", "docker.io/library/phi:1"),
        ("index.docker.io/org/phi", "docker.io/org/phi:latest"),
        ("acr.azurecr.io/phi:0.1", "acr.azurecr.io/phi:0.1"),
        ("ACR.azurecr.io/phi:0.1", "ACR.azurecr.io/phi:0.1"),
        ("localhost/a:1", "localhost/a:1"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
        ("myhost:5000/a:1", "myhost:5000/a:1"),
        ("myhost/a:1", "docker.io/myhost/a:1"),
        ("127.0.0.1:5000/docker/docker", "127.0.0.1:5000/docker/docker:latest"),
        ("[fc00::1]:5000/docker", "[fc00::1]:5000/docker:latest"),
        ("xn--n3h.com/myimage:xn--n3h", "xn--n3h.com/myimage:xn--n3h"),
        ("foo_bar.com:8080", "docker.io/library/foo_bar.com:8080"),
        ("a.b/c__d/e-f--g/h.i:V1_x.y-z", "a.b/c__d/e-f--g/h.i:V1_x.y-z"),
        (f"org/phi@{SHA256}", f"docker.io/org/phi@{SHA256}"),
        (f"a.b:443/phi:1@{SHA256}", f"a.b:443/phi:1@{SHA256}"),
    ],
)
def test_references_are_normalised(text: str, canonical: str) -> None:
    reference = parse_reference(text)
    assert str(reference) == canonical
    assert parse_reference(canonical) == reference


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        (" phi", "white space"),
        ("https://acr.azurecr.io/phi", "scheme"),
        ("acr.azurecr.io/Phi:1", "upper-case"),
        ("MyOrg/phi", "upper-case"),
        ("acr.azurecr.io//phi:1", "slashes"),
        ("acr.azurecr.io/a//b", "slashes"),
        ("docker///docker", "slashes"),
        ("acr.azurecr.io/a/", "slashes"),
        ("acr.azurecr.io/", "no repository"),
        (":1", "no repository"),
        ("acr.azurecr.io/phi:", "not a tag"),
        ("acr.azurecr.io/phi:-1", "not a tag"),
        ("acr.azurecr.io/phi:" + "a" * 129, "not a tag"),
        ("-docker.io/a/b", "not a registry host"),
        ("acr..io/a", "not a registry host"),
        ("host:port/a", "not a registry host"),
        ("fc00::1:5000/debian", "not a registry host"),
        ("[fe80::1%eth0]:5000/debian", "not a registry host"),
        ("-docker", "can not be part"),
        ("acr.azurecr.io/a b", "can not be part"),
        ("acr.azurecr.io/a___b", "can not be part"),
        ("acr.azurecr.io/phi@sha256:abc", "not a digest"),
        ("acr.azurecr.io/phi@", "not a digest"),
        ("acr.azurecr.io/phi@" + SHA256.upper(), "not a digest"),
        ("1a" * 32, "image id"),
        ("a.b/" + "a/" * 128 + "a", "at most 255"),
        ("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", "quick start"),
        ("mine.azurecr.io/IMAGE_NAME_HERE:0.0.1", "quick start"),
    ],
)
def test_bad_references_get_a_sentence(text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_reference(text)
    assert word in caught.value.message


def test_docker_hub_speaks_its_api_on_another_host() -> None:
    assert parse_reference("phi").api_host == "registry-1.docker.io"
    assert parse_reference("localhost:5000/phi").api_host == "localhost:5000"


def test_a_digest_replaces_the_tag() -> None:
    reference = parse_reference("a.b/phi:1")
    assert str(reference.with_digest(SHA256)) == f"a.b/phi@{SHA256}"


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("oci:out:v1", LayoutReference(Path("out"), "v1")),
        ("oci:out", LayoutReference(Path("out"), "latest")),
        ("oci:/a/b.c/d:v1", LayoutReference(Path("/a/b.c/d"), "v1")),
        ("oci:/a:b/c", LayoutReference(Path("/a:b/c"), "latest")),
        (f"oci:out:v1@{SHA256}", LayoutReference(Path("out"), "v1", SHA256)),
    ],
)
def test_layouts_on_disk_are_destinations(text: str, layout: LayoutReference) -> None:
    assert parse_destination(text) == layout
    assert parse_destination(str(layout)) == layout


@pytest.mark.parametrize("text", ["oci:", "oci::v1", "oci:out:", "oci:out:-v1", "oci:out:v1@sha256:12"])
def test_bad_layouts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_destination(text)


def test_a_destination_without_oci_is_a_reference() -> None:
    assert parse_destination("a.b/c:1") == ImageReference("a.b", "c", "1")


@pytest.mark.parametrize("text", ["acr.azurecr.io/phi", "localhost/phi:1", "localhost:5000/phi", "myhost:80/phi"])
def test_a_registry_host_makes_it_an_image(text: str) -> None:
    assert names_registry(text)


@pytest.mark.parametrize(
    "text", ["out", "out/adapter", "adapter.v2", "./a.b/c", "../a.b/c", "/a.b/c", "~/a.b", ".", "..", "oci:a/b:c"]
)
def test_anything_without_a_registry_host_is_a_directory(text: str) -> None:
    assert not names_registry(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "acr.azurecr.io/Support Answers:1",
            "repositories are lower case, and ' ' cannot be in one: write it like acr.azurecr.io/support-answers:1",
        ),
        ("acr.azurecr.io/a b/c", "' ' cannot be in one: write it like acr.azurecr.io/a-b/c"),
        ("acr.azurecr.io/a___b:v1", "joined by '.', '_', '__' or '-': write it like acr.azurecr.io/a_b:v1"),
        ("acr.azurecr.io/a:v 1+b", "does not begin with '.' or '-': write it like acr.azurecr.io/a:v-1-b"),
        ("acr.azurecr.io/a/---", "joined by '.', '_', '__' or '-'"),
        ("acr.azurecr.io/a:.", "does not begin with '.' or '-'"),
    ],
)
def test_a_hint_says_which_character_is_wrong_and_a_form_that_is_right(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_reference(text)
    assert str(caught.value.hint).endswith(hint)


@given(st.text(alphabet="aA0./:@_- é", max_size=30))
def test_what_a_hint_suggests_is_a_reference_or_has_another_fault(text: str) -> None:
    """That of the repository is found before that of its length, that of the tag before both."""
    for _ in range(3):
        try:
            parse_reference(text)
        except ConfigError as error:
            _, found, suggested = str(error.hint).partition(": write it like ")
            if not found:
                return
            assert suggested != text
            text = suggested
        else:
            return
    pytest.fail(f"{text!r} is suggested, and still wrong")


@given(st.text(alphabet="aA0./:@_-[]~ é", max_size=40))
def test_any_text_is_refused_or_has_a_canonical_form(text: str) -> None:
    try:
        reference = parse_reference(text)
    except ConfigError:
        return
    assert parse_reference(str(reference)) == reference
    assert reference.tag or reference.digest
