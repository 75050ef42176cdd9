import re

import pytest

from tuner.errors import ConfigError
from tuner.urls import (
    Allowed,
    ConnectionPolicy,
    SourceOptions,
    address_problem,
    is_hub_url,
    redacted,
    source_name,
    split_options,
    split_url,
    url_problem,
)

NOTHING = Allowed()


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/train.parquet",
        "http://example.com:8080/a/b.jsonl?download=true#part",
        "https://account.blob.core.windows.net/c/t.parquet?sig=a%2Bb",
        "http://8.8.8.8/t.parquet",
        "http://[2606:4700::1111]/t.parquet",
        "http://minio.data.svc.cluster.local:9000/t.parquet",
    ],
)
def test_public_urls_pass(url: str) -> None:
    assert url_problem(url, NOTHING) is None


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("ftp://example.com/t", "HTTP or HTTPS"),
        ("file:///etc/passwd", "HTTP or HTTPS"),
        ("train.parquet", "HTTP or HTTPS"),
        ("http:///t.parquet", "no host"),
        ("http://example.com:99999/t", "invalid"),
        ("http://[::1/t", "invalid"),
        ("http://example.com/a b", "space"),
        ("http://example.com\\@127.0.0.1/", "backslash"),
        ("http://exa\tmple.com/", "control"),
        ("http://%31%32%37.0.0.1/", "not a host name"),
        ("http://a..b/", "not a host name"),
        ("http://1.2.3.4.5/", "not an IP address"),
        ("http://08.0.0.1/", "not an IP address"),
        ("http://256.1.1.1/", "not an IP address"),
    ],
)
def test_what_is_no_http_url_is_said_to_be_none(url: str, word: str) -> None:
    assert word in (url_problem(url, NOTHING) or "")


def test_userinfo_is_refused_and_not_repeated() -> None:
    problem = url_problem("https://me:hunter2@example.com/t", NOTHING)
    assert problem is not None
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "path",
    [
        *("a.jsonl;sig=S", "a.jsonl%3Fsig=S", "a.jsonl%3fSig%3dS", "a.jsonl%253Fsig%253DS", "a.jsonl&token=S"),
        *("a.jsonl%26sig=S", "sig=S/a.jsonl", "a;v=1;Signature=S", "a.jsonl,X-Amz-Signature=S", "a%3Bpassword=S?x=1"),
    ],
)
def test_a_signature_in_the_path_is_refused_and_not_repeated(path: str) -> None:
    """It would be taken for the file's name, and be in every message, record and lock."""
    problem = url_problem(f"https://example.com/{path}", NOTHING)
    assert problem is not None
    assert "belongs into the query" in problem
    assert "=S" not in problem


@pytest.mark.parametrize(
    "path",
    ["a;v=1/date=2024-01-01/t", "sign=1", "a?b;sig=c#;sig=d", "design=2/t", "tokens=4096/t", "a?sig=x", "author=me"],
)
def test_other_parameters_in_a_path_are_names(path: str) -> None:
    assert url_problem(f"https://example.com/{path}", NOTHING) is None


LOOPBACK_FORMS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "127.0.0.1.",
    "１２７.0.0.1",
    "127。0。0。1",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::127.0.0.1]",
    "[2002:7f00:1::]",
    "[64:ff9b::7f00:1]",
    "localhost",
    "LOCALHOST.",
    "a.localhost",
]


@pytest.mark.parametrize("host", LOOPBACK_FORMS)
def test_loopback_is_refused_in_every_form(host: str) -> None:
    assert url_problem(f"http://{host}/t", NOTHING) is not None


@pytest.mark.parametrize("host", LOOPBACK_FORMS)
def test_allow_private_urls_opens_loopback(host: str) -> None:
    assert url_problem(f"http://{host}/t", Allowed(private=True)) is None


METADATA_FORMS = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "168.63.129.16",
    "100.100.100.200",
    "0.0.0.0",
    "0",
    "[::]",
    "224.0.0.1",
    "[ff02::1]",
    "metadata.google.internal",
    "METADATA.google.internal.",
    "metadata.google",
    "instance-data.ec2.internal",
    "metadata.azure.internal",
]


@pytest.mark.parametrize("host", METADATA_FORMS)
def test_metadata_link_local_and_multicast_are_never_opened(host: str) -> None:
    everything = Allowed.of(["0.0.0.0/0", "::/0"], private=True)
    assert url_problem(f"http://{host}/t", everything) is not None


@pytest.mark.parametrize(
    "host", ["10.1.2.3", "192.168.0.1", "172.16.0.1", "100.64.0.1", "[fd12::1]", "[::ffff:10.0.0.1]"]
)
def test_private_literals_are_refused_unless_allowed(host: str) -> None:
    assert url_problem(f"http://{host}/t", NOTHING) is not None
    assert url_problem(f"http://{host}/t", Allowed(private=True)) is None


def test_allow_cidr_opens_exactly_what_it_names() -> None:
    allowed = Allowed.of(["10.1.0.0/16"], private=False)
    assert url_problem("http://10.1.255.3/t", allowed) is None
    assert url_problem("http://10.2.0.1/t", allowed) is not None
    assert url_problem("http://127.0.0.1/t", allowed) is not None
    assert url_problem("http://localhost/t", allowed) is not None


def test_allow_cidr_opens_loopback_when_it_names_it() -> None:
    allowed = Allowed.of(["127.0.0.1/32"], private=False)
    assert url_problem("http://127.0.0.1:9/t", allowed) is None
    assert url_problem("http://localhost:9/t", allowed) is None
    assert url_problem("http://127.0.0.2/t", allowed) is not None
    assert address_problem("127.0.0.1", allowed, by_name=True) is None
    assert address_problem("::1", allowed, by_name=True) is not None


def test_the_refusal_says_what_opens_it() -> None:
    assert "--allow-cidr 10.0.0.1/32" in (url_problem("http://10.0.0.1/", NOTHING) or "")


@pytest.mark.parametrize("cidr", ["10.0.0.0/33", "everything", "169.254.0.0/16", "169.254.169.254/32", "fe80::/64", ""])
def test_a_bad_or_forbidden_cidr_is_a_config_error(cidr: str) -> None:
    with pytest.raises(ConfigError, match="--allow-cidr"):
        Allowed.of([cidr], private=False)


@pytest.mark.parametrize("address", ["10.0.0.4", "192.168.1.1", "fd12::4", "8.8.8.8", "100.64.1.1"])
def test_a_name_may_resolve_to_a_private_range(address: str) -> None:
    assert address_problem(address, NOTHING, by_name=True) is None


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "169.254.169.254", "168.63.129.16", "::ffff:127.0.0.1", "0.0.0.0"]
)
def test_a_name_may_not_resolve_to_loopback_or_metadata(address: str) -> None:
    assert address_problem(address, NOTHING, by_name=True) is not None


def test_an_address_with_a_zone_is_no_address() -> None:
    assert address_problem("fe80::1%eth0", Allowed(private=True), by_name=True) is not None


@pytest.mark.parametrize(
    ("host", "address", "refusal"),
    [
        ("data.example", "8.8.8.8", None),
        ("data.example", "10.0.0.4", None),  # Private Link
        ("10.0.0.4", "10.0.0.4", "10.0.0.4 is a private or reserved address; --allow-cidr 10.0.0.4/32 opens it"),
        ("[fd12::4]", "fd12::4", "fd12::4 is a private or reserved address; --allow-cidr fd12::4/128 opens it"),
        (
            "data.example",
            "127.0.0.1",
            "data.example resolves to a forbidden address: "
            "127.0.0.1 is a loopback address; --allow-cidr 127.0.0.1/32 opens it",
        ),
        ("registry.example", "127.0.0.1", None),
        ("registry.example", "169.254.169.254", None),
    ],
)
def test_a_policy_judges_the_address_by_what_the_host_is(host: str, address: str, refusal: str | None) -> None:
    assert ConnectionPolicy(NOTHING, trusted_host="registry.example").refusal(host, address) == refusal


def test_a_trusted_address_may_be_in_brackets() -> None:
    assert ConnectionPolicy(NOTHING, trusted_host="::1").refusal("[::1]", "::1") is None


def test_split_url_keeps_the_query_out_of_what_is_shown() -> None:
    parts = split_url("https://h.example/d/train%20set.parquet?sv=2024&sig=SECRET&snapshot=7#x")
    assert (parts.url, parts.name) == ("https://h.example/d/train%20set.parquet", "train set.parquet")
    assert parts.query == "sv=2024&sig=SECRET&snapshot=7"
    assert parts.public_query == "snapshot=7"
    assert "SECRET" not in repr(parts)


SIGNED = [
    "sv=2024-11-04&st=a&se=b&sr=b&sp=r&spr=https&sig=S&skoid=1&sktid=2&skt=3&ske=4&sks=b&skv=5",
    "X-Amz-Algorithm=A&X-Amz-Credential=K&X-Amz-Date=D&X-Amz-Expires=1&X-Amz-SignedHeaders=host&X-Amz-Signature=S",
    "x-goog-algorithm=A&X-Goog-Credential=K&X-Goog-Signature=S",
    "GoogleAccessId=a&Expires=1&Signature=s",
    "AWSAccessKeyId=a&Expires=1&Signature=s",
    "token=t",
    "access_token=t",
]


@pytest.mark.parametrize("query", SIGNED)
def test_a_query_that_only_signs_does_not_count_as_input(query: str) -> None:
    parts = split_url(f"https://h.example/t.parquet?{query}")
    assert (parts.public_query, parts.query_sha256) == ("", "")


@pytest.mark.parametrize(
    "query", ["download=true", "file=a.parquet&versionId=3", "key=a", "st=texas&se=sweden", "expires=never"]
)
def test_a_query_that_chooses_the_data_counts_as_input(query: str) -> None:
    parts = split_url(f"https://h.example/t.parquet?{query}")
    assert parts.public_query == query
    assert len(parts.query_sha256) == 64


@pytest.mark.parametrize(
    ("url", "is_hub"),
    [
        ("hf://datasets/owner/name/train.jsonl", True),
        ("https://huggingface.co/datasets/owner/name/resolve/main/t.jsonl", True),
        ("https://huggingface.co:443/t.jsonl", True),
        ("HTTPS://HuggingFace.co/t.jsonl", True),
        ("http://huggingface.co/t.jsonl", False),  # a token is no secret there
        ("https://huggingface.co:8443/t.jsonl", False),
        ("https://huggingface.co.example/t.jsonl", False),
        ("https://a.example/://huggingface.co/t.jsonl", False),
        ("https://huggingface.co@a.example/t.jsonl", False),
        ("s3://huggingface.co/t.jsonl", False),
    ],
)
def test_the_hub_is_known_by_its_scheme_and_address(url: str, is_hub: bool) -> None:
    assert is_hub_url(url) is is_hub


def test_a_pin_is_read_in_any_case_and_beside_other_words() -> None:
    assert split_url(f"https://h.example/t#sha256={'AB' * 32}").options.sha256 == "ab" * 32
    assert split_url(f"https://h.example/t#rows=1&sha256={'ab' * 32}").options.sha256 == "ab" * 32
    assert split_url("https://h.example/t#heading").options.sha256 is None


@pytest.mark.parametrize("pin", ["", "abc", "g" * 64, "a" * 65])
def test_a_malformed_pin_is_a_config_error_without_the_query(pin: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_url(f"https://h.example/t?sig=SECRET#sha256={pin}")
    assert "SECRET" not in str(caught.value)


def test_redacted_keeps_nothing_secret_even_of_what_does_not_parse() -> None:
    assert redacted("https://u:p@h.example:8/a/b?sig=s#f") == "https://h.example:8/a/b"
    assert redacted("http://u:p@[::1/a?sig=s") == "http://[::1/a"
    assert redacted("h.example/a?sig=s") == "h.example/a"


def test_equal_basenames_get_different_names() -> None:
    names = [
        source_name(index, url) for index, url in enumerate(["http://a/train.parquet", "http://b/train.parquet?x=1"])
    ]
    assert names == ["0000-train.parquet", "0001-train.parquet"]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://a/", "0000-data"),
        ("http://a", "0000-data"),
        ("http://a/b/..", "0000-data"),
        ("http://a/%2e%2e%2fetc%2fpasswd", "0000-_etc_passwd"),
        ("http://a/dätä set.jsonl.gz", "0000-d_t_set.jsonl.gz"),
        ("file:///home/me/t.csv", "0000-t.csv"),
    ],
)
def test_names_have_safe_characters_only(url: str, name: str) -> None:
    assert source_name(0, url) == name


def test_a_long_name_keeps_its_ending() -> None:
    name = source_name(12, f"http://a/{'x' * 500}.jsonl.gz")
    assert name.startswith("0012-xxx")
    assert name.endswith(".jsonl.gz")
    assert len(name) < 120


@pytest.mark.parametrize(
    ("text", "bare", "options"),
    [
        ("https://h.example/t#rows=1000", "https://h.example/t", SourceOptions(rows=1000)),
        ("https://h.example/t#weight=0.5&rows=9", "https://h.example/t", SourceOptions(rows=9, weight=0.5)),
        ("hf://datasets/a/b#use=validation", "hf://datasets/a/b", SourceOptions(use="validation")),
        ("data/train.jsonl#rows=7", "data/train.jsonl", SourceOptions(rows=7)),
        ("data/a#b.jsonl", "data/a#b.jsonl", SourceOptions()),
        ("data/a#b=c.jsonl", "data/a#b=c.jsonl", SourceOptions()),
    ],
)
def test_what_stands_after_a_source_says_how_much_of_it_is_taken(text: str, bare: str, options: SourceOptions) -> None:
    assert split_options(text) == (bare, options)


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("rows=0", "#rows= wants a whole number"),
        ("rows=some", "#rows= wants a whole number"),
        ("weight=0", "#weight= wants a number above 0"),
        ("weight=nan", "#weight= wants a number above 0"),
        ("use=test", "#use= is training or validation"),
        ("use=validation&weight=2", "a weight is of rows that are trained on"),
        ("row=10", "what stands after its # is not known there"),
    ],
)
def test_what_stands_after_a_source_and_makes_no_sense_is_refused(fragment: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        split_url(f"https://h.example/t?sig=SECRET#{fragment}")
    assert "SECRET" not in f"{caught.value.message}{caught.value.hint}"
