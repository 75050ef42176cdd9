"""The CRD refuses what the parser refuses, in the same words; it is one that an API server takes; it prints as KAITO's.

Rules are evaluated by cel-python (tests/crd_server.py): no cluster is needed.
"""

import copy
import json
import re
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import re2
import yaml
from crd_server import (
    CRD_LIMIT,
    EXPRESSION_LIMIT,
    RUNTIME_LIMIT,
    CustomResourceServer,
    Refusal,
    evaluate,
    prices,
    table,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import SHA256
from test_urls import LOOPBACK_FORMS, METADATA_FORMS
from test_workspace import CLAIM, IMAGE, URL, changed, good

from tuner import workspace
from tuner.cluster import rules
from tuner.cluster.crd import custom_resource_definition
from tuner.cluster.workspace_status import Standing, build_status
from tuner.errors import ConfigError, Problem
from tuner.urls import Allowed, url_problem
from tuner.workspace import cluster_problems, parse_workspace_text

WORKSPACES = Path(__file__).parent / "workspaces"
CRD = custom_resource_definition()
SERVER = CustomResourceServer(CRD)


def cli_says(written: dict[str, Any]) -> list[Problem]:
    """What the parser says where a pod is to run it."""
    try:
        file = parse_workspace_text(yaml.safe_dump(written, sort_keys=False), "", local_files=False)
    except ConfigError as error:
        return list(error.problems)
    return cluster_problems(file.workspace)


def server_says(written: dict[str, Any], old: dict[str, Any] | None = None) -> list[Refusal]:
    return SERVER.apply(written, old)


# ── the parser and the CRD agree ─────────────────────────────────────────────────────────────────────────────────────

SPEAKS_LESS = None  # the API server refuses it in its own words: types, required fields, enumerations, unknown fields

# What is written wrongly, and where both say the parser's sentence.
MISTAKES: list[tuple[str, Any, str | None]] = [
    ("tuning", ..., ""),
    ("inference", {"preset": {"name": "phi-4"}}, "inference"),
    ("metadata.name", "Tickets_1", "metadata.name"),
    ("metadata.name", "a.b", "metadata.name"),
    ("metadata.name", "-a", "metadata.name"),
    ("metadata.name", "a" * 64, "metadata.name"),
    ("tuning.method", "dora", "tuning.method"),
    ("tuning.method", "", "tuning.method"),
    ("tuning.method", ..., SPEAKS_LESS),
    ("tuning.method", 4, SPEAKS_LESS),
    ("tuning.methd", "lora", SPEAKS_LESS),
    ("tuning.input", ..., SPEAKS_LESS),
    ("tuning.output", ..., SPEAKS_LESS),
    ("tuning.preset", ..., SPEAKS_LESS),
    ("tuning.preset.name", ..., SPEAKS_LESS),
    ("tuning.preset.name", "", "tuning.preset.name"),
    ("tuning.preset", "phi-4", SPEAKS_LESS),
    ("tuning.preset.accessMode", "secret", SPEAKS_LESS),
    ("tuning.preset.presetOptions", {"modelWeightsPVC": "x"}, SPEAKS_LESS),
    ("tuning.preset.presetOptions", {"modelAccessSecret": "A"}, "tuning.preset.presetOptions.modelAccessSecret"),
    ("tuning.preset.presetOptions", {"image": "a//b"}, "tuning.preset.presetOptions.image"),
    ("tuning.preset.presetOptions", {"imagePullSecrets": ["X"]}, "tuning.preset.presetOptions.imagePullSecrets[0]"),
    ("tuning.config", "My_Config", "tuning.config"),
    ("tuning.config", "a" * 254, SPEAKS_LESS),
    ("tuning.input", {}, "tuning.input"),
    ("tuning.input", {"urls": []}, "tuning.input"),
    ("tuning.input", {"name": "x", "image": ""}, "tuning.input"),
    ("tuning.input", {"urls": [URL], "image": IMAGE}, "tuning.input"),
    ("tuning.input", {"urls": [URL], "volumeSource": CLAIM}, "tuning.input"),
    ("tuning.input", {"image": IMAGE, "volumeSource": CLAIM}, "tuning.input"),
    ("tuning.input", {"urls": [URL], "name": "A b"}, "tuning.input.name"),
    ("tuning.input", URL, SPEAKS_LESS),
    ("tuning.input.urls", URL, SPEAKS_LESS),
    ("tuning.input.urls", [4], SPEAKS_LESS),
    ("tuning.input.validation", [URL, ""], "tuning.input.validation[1]"),
    ("tuning.input.validation", ["data/train.parquet"], "tuning.input.validation[0]"),
    ("tuning.input.validation", ["http://127.0.0.1/a"], "tuning.input.validation[0]"),
    ("tuning.input.urls", [URL, ""], "tuning.input.urls[1]"),
    ("tuning.input.urls", [URL, "  "], "tuning.input.urls[1]"),
    ("tuning.input.urls", ["data/train.parquet"], "tuning.input.urls[0]"),
    ("tuning.input.urls", ["/data/train parquet"], "tuning.input.urls[0]"),
    ("tuning.input.urls", ["C:\\train.parquet"], "tuning.input.urls[0]"),
    ("tuning.input.urls", ["FILE:///data/a.parquet"], "tuning.input.urls[0]"),
    ("tuning.input", {"image": "a//b"}, "tuning.input.image"),
    ("tuning.input", {"image": "https://contoso.azurecr.io/a?sig=x"}, "tuning.input.image"),
    ("tuning.input", {"image": IMAGE, "imagePullSecrets": [{"name": "x"}]}, SPEAKS_LESS),
    ("tuning.input", {"image": IMAGE, "imagePullSecrets": ["x", "Y"]}, "tuning.input.imagePullSecrets"),
    ("tuning.input", {"volumeSource": {}}, "tuning.input.volumeSource"),
    ("tuning.input", {"volumeSource": {"pvc": {}}}, SPEAKS_LESS),
    ("tuning.input", {"volumeSource": {"persistentVolumeClaim": "x"}}, SPEAKS_LESS),
    ("tuning.input", {"volumeSource": {"persistentVolumeClaim": {}}}, "tuning.input.volumeSource"),
    ("tuning.input", {"volumeSource": {"hostPath": {"path": ""}}}, "tuning.input.volumeSource"),
    ("tuning.input", {"volumeSource": {"nfs": {}, "csi": {}}}, "tuning.input.volumeSource"),
    ("tuning.output", {}, "tuning.output"),
    ("tuning.output", {"image": IMAGE, "volumeSource": CLAIM, "imagePushSecret": "x"}, "tuning.output"),
    ("tuning.output", {"image": IMAGE}, "tuning.output.imagePushSecret"),
    ("tuning.output", {"image": IMAGE, "imagePushSecret": ""}, "tuning.output.imagePushSecret"),
    ("tuning.output", {"image": IMAGE, "imagePushSecret": "open sesame"}, "tuning.output.imagePushSecret"),
    ("tuning.output.image", f"a.io/b@{SHA256}", "tuning.output.image"),
    ("tuning.output", {"volumeSource": {"configMap": {"name": "x"}}}, "tuning.output.volumeSource"),
    ("resource.count", 2, "resource.count"),
    ("resource.count", 0, SPEAKS_LESS),
    ("resource.count", "1", SPEAKS_LESS),
    ("resource.count", True, SPEAKS_LESS),
    ("resource.partition", {"mode": "mig"}, "resource.partition"),
    ("resource.labelSelector", {"matchLabels": {"a": 1}}, SPEAKS_LESS),
    ("resource.labelSelector", {"matchExpressions": [{"key": "a", "operator": "Is"}]}, SPEAKS_LESS),
    ("resource.instancetype", "x", SPEAKS_LESS),
    # what nobody has filled in
    ("tuning.output.image", "ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", "tuning.output.image"),
    ("tuning.output.imagePushSecret", "ACR_REGISTRY_SECRET_HERE", "tuning.output.imagePushSecret"),
    ("tuning.config", "${CONFIG}", "tuning.config"),
    ("tuning.preset.name", "{{ .Values.model }}", "tuning.preset.name"),
    ("resource.instanceType", "<your instance type>", "resource.instanceType"),
    ("resource.preferredNodes", ["YOUR_NODE"], "resource.preferredNodes[0]"),
]  # fmt: skip
IMAGES = [
    *(" phi", "phi ", "acr.azurecr.io/Phi:1", "MyOrg/phi", "a//b", "acr.azurecr.io//b", "acr.azurecr.io/b/"),
    *("acr.azurecr.io/", ":1", "acr.azurecr.io/phi:", "acr.azurecr.io/phi:-1", "acr.azurecr.io/phi:" + "a" * 129),
    *("-docker.io/a/b", "acr..io/a", "host:port/a", "fc00::1:5000/debian", "[fe80::1%eth0]:5000/debian", "-docker"),
    *("acr.azurecr.io/phi@sha256:abc", "acr.azurecr.io/phi@", f"acr.azurecr.io/phi@{SHA256.upper()}", "1a" * 32),
    *("acr.azurecr.io/" + "a" * 256, "-a", "acr.azurecr.io/a b", "acr.azurecr.io/a___b"),
]
URLS = [
    *("ftp://example.com/t", "s3://bucket/t", "http:///t.parquet", "https://", "http:t", "http://:80/", "http://u@/"),
    *("http://example.com:99999/t", "http://example.com:65536", "http://example.com:8o/t", "http://[::1/t"),
    *("http://example.com/a b", "http://example.com\\@127.0.0.1/", "http://exa\tmple.com/", "https://x.io/\u007f"),
    *("http://%31%32%37.0.0.1/", "http://a..b/", "http://../", "http://1.2.3.4.5/", "http://08.0.0.1/"),
    *("https://1://127.0.0.1", "https://a.1?//1.2.3.4",),
    *("http://256.1.1.1/", "http://134744072/", "http://8.8.2056/", "http://0x08.8.8.8/t", "http://a.1/"),
    *("https://me:hunter2@example.com/t", "http://10.1.2.3/", "http://172.31.255.255:80", "HTTP://192.168.0.1?a"),
    *("http://100.127.0.1#x", "http://127.255.0.9/", "http://[fc00::1]/", "http://[fdab::2]:9000/t", "http://[::1]"),
    *("http://Files.LocalHost./x", "http://LOCALHOST:8000/", "https://METADATA.google.internal./t", "http://255.255.255.255"),
]  # fmt: skip
DISGUISED = ["[::ffff:8.8.8.8]", "[64:ff9b::808:808]", "[2002:808:808::1]", "[2001:0:1::1]", "[::8.8.8.8]"]


@pytest.mark.parametrize(("path", "value", "where"), MISTAKES)
def test_cli_and_server_refuse_the_same_mistakes(path: str, value: Any, where: str | None) -> None:
    written = changed(path, value)
    by_cli, by_server = cli_says(written), server_says(written)
    assert by_cli
    assert by_server
    if where is not SPEAKS_LESS:
        assert [each.message for each in by_server] == [each.message for each in by_cli]
        assert [each.path for each in by_server] == [where]


@pytest.mark.parametrize("image", IMAGES)
def test_cli_and_server_say_the_same_of_images(image: str) -> None:
    written = changed("tuning.input", {"image": image})
    (said,) = server_says(written)
    assert said.message == cli_says(written)[0].message


def test_one_part_of_several_is_the_whole_repository_for_the_server() -> None:
    written = changed("tuning.input", {"image": "acr.azurecr.io/a/b___c:1"})
    assert [each.message for each in cli_says(written)] == [
        "image reference 'acr.azurecr.io/a/b___c:1': 'b___c' can not be part of a repository name"
    ]
    assert [each.message for each in server_says(written)] == [
        "image reference 'acr.azurecr.io/a/b___c:1': 'a/b___c' can not be part of a repository name"
    ]


def url_sentences(url: str) -> tuple[list[str], list[str]]:
    written = changed("tuning.input.urls", [url])
    by_server = SERVER.judge("tuning.input.urls[]", url)
    return [each.message for each in cli_says(written)], [each.message for each in by_server]


@pytest.mark.parametrize("url", URLS)
def test_cli_and_server_say_the_same_of_urls(url: str) -> None:
    by_cli, by_server = url_sentences(url)
    assert len(by_cli) == 1
    assert by_server[:1] == by_cli
    assert len(by_server) == 1 or "\\" in url  # userinfo behind a backslash is said besides


NOT_ASCII = [host for host in LOOPBACK_FORMS if not host.isascii()]


@pytest.mark.parametrize("host", sorted({*LOOPBACK_FORMS, *METADATA_FORMS, *DISGUISED} - set(NOT_ASCII)))
def test_the_guard_holds_at_the_server_in_every_form_of_an_address(host: str) -> None:
    by_cli, by_server = url_sentences(f"http://{host}/t?sig=open-sesame")
    assert by_cli
    assert by_server[:1] == by_cli
    assert "open-sesame" not in " ".join(by_server)


def test_a_port_is_one_behind_the_host_and_nowhere_else() -> None:
    assert url_sentences("https://files.contoso.com/a//b:99999/c") == ([], [])


def test_hosts_in_other_letters_are_left_to_the_controller() -> None:
    by_cli, by_server = url_sentences("http://127。0。0。1/t")
    assert by_cli
    assert not by_server


def test_a_name_is_a_name_whatever_numbers_are_in_it() -> None:
    for host in ("10.example.com", "127.0.0.1.nip.io", "0x7f.example", "localhost.example.com", "a-1.b2", "1e100.net"):
        assert url_sentences(f"https://{host}/t") == ([], [])


PUBLIC = ["8.8.8.8", "172.32.0.1", "100.128.0.1", "192.169.1.1", "168.63.129.160", "[2606:4700::1111]", "11.0.0.1."]


@pytest.mark.parametrize("host", PUBLIC)
def test_public_addresses_pass_both(host: str) -> None:
    assert url_sentences(f"http://{host}:8080/a?sig=b") == ([], [])


_BYTES = st.integers(0, 255)


@settings(max_examples=100, deadline=None)
@given(st.tuples(_BYTES, _BYTES, _BYTES, _BYTES))
def test_every_ipv4_address_is_judged_alike(numbers: tuple[int, ...]) -> None:
    """But for the ranges of documentation and benchmarks, which the server lets pass and the controller does not."""
    host = ".".join(map(str, numbers))
    by_cli, by_server = url_sentences(f"http://{host}/t")
    if by_cli and not by_server:
        address = IPv4Address(host)
        assert not address.is_global
        assert not any(address in network for network in rules.PRIVATE_IPV4)
    else:
        assert by_server[:1] == by_cli


@pytest.mark.parametrize("network", rules.PRIVATE_IPV4)
def test_private_ranges_end_where_ipaddress_says(network: IPv4Network) -> None:
    assert not network.is_global
    for address in (network[0], network[-1], network[0] - 1, network[-1] + 1):
        assert bool(re2.search(f"^(?:{rules.dotted(network)})$", str(address))) == (address in network)


_PIECES = [
    "a",
    "A",
    "-",
    ".",
    "/",
    "//",
    ":",
    "@",
    "_",
    "1",
    "[",
    "]",
    "acr.io",
    "localhost",
    ":5000",
    "sha256:",
    " ",
    "é",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=8).map("".join))
def test_any_text_is_an_image_reference_for_both_or_for_neither(image: str) -> None:
    written = changed("tuning.input", {"image": image})
    by_server = SERVER.judge("tuning.input.image", image)
    assert bool(cli_says(written)) == bool(by_server)
    assert len(by_server) <= 1


_URL_PIECES = [
    *("http", "https", "://", ":", "//", "/", "?", "#", "@", "[", "]", ".", "..", "1", "0x1", "10", "localhost"),
    *("a.io", "example.com", "%", "\\", " ", "<a>", "ftp", "file", "127.0.0.1", "::1", ":80", "HTTP", "$A"),
    *("{{x}}", "metadata"),
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(_URL_PIECES), min_size=1, max_size=7).map("".join))
def test_any_text_is_a_url_for_both_or_for_neither(url: str) -> None:
    by_cli, by_server = url_sentences(url)
    assert bool(by_cli) == bool(by_server), url
    by_cli, by_server = url_sentences(f"https://{url}")
    assert bool(by_cli) == bool(by_server), url


_NAME_PIECES = ["a", "Z", "0", "-", ".", "_", "ä", "a" * 63, "b" * 200]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(_NAME_PIECES), min_size=1, max_size=5).map("".join))
def test_any_text_is_a_name_for_both_or_for_neither(name: str) -> None:
    for path in ("metadata.name", "tuning.config", "tuning.output.imagePushSecret"):
        assert bool(cli_says(changed(path, name))) == bool(server_says(changed(path, name)))


# ── what is right ────────────────────────────────────────────────────────────────────────────────────────────────────


def workspaces() -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.name, each)
        for path in sorted(WORKSPACES.glob("*.yaml"))
        for each in yaml.load_all(path.read_text(encoding="utf-8"), yaml.BaseLoader)
        if each and each["kind"] == "Workspace"
    ]


def as_written(name: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((WORKSPACES / name).read_text(encoding="utf-8"))
    return next(each for each in documents if each and each["kind"] == "Workspace")


def test_there_are_workspaces() -> None:
    assert len(workspaces()) >= 9


@pytest.mark.parametrize("name", [name for name, _ in workspaces()])
@pytest.mark.parametrize("version", SERVER.versions)
def test_kaitos_examples_are_taken(name: str, version: str) -> None:
    written = as_written(name) | {"apiVersion": f"kaito.sh/{version}"}
    refused = server_says(written)
    if name == "quick_start.yaml":
        assert [each.message for each in refused] == [each.message for each in cli_says(written)]
        assert refused[0].message.startswith("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE has placeholders")
    else:
        assert refused == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("resource", ...),
        ("resource", {}),
        ("resource.instanceType", ""),
        ("resource.labelSelector", ...),
        ("resource.labelSelector", {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a100"]}]}),
        ("resource.count", 1),
        ("tuning.method", "QLoRA"),
        ("tuning.config", ""),
        ("tuning.input", {"urls": [], "image": IMAGE, "volumeSource": None}),
        ("tuning.input", {"urls": [URL], "imagePullSecrets": ["Not_A_Name"]}),
        ("tuning.input.urls", [f"{URL}?sig=a%2Bb&x=<a>#sha256={'0' * 64}"] * rules.MAX_URLS),
        ("tuning.input", {"volumeSource": {"csi": {"driver": "blob.csi.azure.com", "volumeAttributes": {"a": "$X"}}}}),
        ("tuning.output", {"volumeSource": CLAIM, "imagePushSecret": "Not_A_Name"}),
        ("tuning.preset.presetOptions", {"modelAccessSecret": "", "image": ""}),
        ("status", {"state": "whatever the client thinks"}),
    ],
)  # fmt: skip
def test_what_the_parser_takes_the_server_takes(path: str, value: Any) -> None:
    written = changed(path, value)
    assert cli_says(written) == []
    assert server_says(written) == []


def test_so_many_urls_are_too_many_for_an_object() -> None:
    (refused,) = server_says(changed("tuning.input.urls", [URL] * (rules.MAX_URLS + 1)))
    assert refused.message == "Too many: 29: must have at most 28 items"


def test_an_installation_that_opens_addresses_leaves_them_to_the_controller() -> None:
    opened = CustomResourceServer(custom_resource_definition(opened=True))
    for host in ("10.1.2.3", "127.0.0.1", "localhost", "[fd12::1]", "0x7f.1"):
        assert opened.judge("tuning.input.urls[]", f"http://{host}/t") == []
        assert SERVER.judge("tuning.input.urls[]", f"http://{host}/t")
    for host in ("169.254.169.254", "metadata.google.internal", "[fe80::1]", "0.0.0.0"):
        assert opened.judge("tuning.input.urls[]", f"http://{host}/t")
        assert url_problem(f"http://{host}/t", Allowed.of(["0.0.0.0/0", "::/0"], private=True))


# ── updates ──────────────────────────────────────────────────────────────────────────────────────────────────────────

OTHER_URL = "https://data.contoso.com/b.parquet"


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        ("tuning.method", "lora", "tuning.method", "the method cannot be changed"),
        ("tuning.preset.name", "phi-4", "tuning.preset", "the preset cannot be changed"),
        ("tuning.preset.presetOptions", {"modelAccessSecret": "x"}, "tuning.preset", "the preset cannot be changed"),
        ("tuning.input.name", "tickets", "tuning.input.name", "the name of the input cannot be changed"),
        ("resource.instanceType", "other", "resource.instanceType", "the instance type cannot be changed"),
        ("resource.instanceType", ..., "resource.instanceType", "the instance type cannot be changed"),
        ("resource.labelSelector.matchLabels", {"app": "b"}, "resource.labelSelector", "the label selector cannot"),
        ("resource.labelSelector", ..., "resource.labelSelector", "the label selector cannot be changed"),
    ],
)
def test_what_cannot_be_changed_is_said_to_be_so(path: str, value: Any, where: str, message: str) -> None:
    (refused,) = server_says(changed(path, value), good())
    assert refused.path == where
    assert refused.message.startswith(message)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tuning.method", "QLoRA"),
        ("tuning.input.urls", [OTHER_URL]),
        ("tuning.input", {"image": IMAGE}),
        ("tuning.output", {"volumeSource": CLAIM}),
        ("tuning.config", "other"),
        ("tuning.preset.accessMode", "public"),
        ("resource.count", 1),
        ("metadata.labels", {"a": "b"}),
    ],
)
def test_what_can_be_changed_can_be(path: str, value: Any) -> None:
    assert server_says(changed(path, value), good()) == []
    assert server_says(good(), changed(path, value)) == []


def test_an_instance_type_can_be_set_once() -> None:
    assert server_says(good(), changed("resource.instanceType", ...)) == []


def test_tuning_does_not_become_inference() -> None:
    inference = good() | {"inference": {"preset": {"name": "phi-4"}}}
    del inference["tuning"]
    for new, old in ((inference, good()), (good(), inference)):
        (refused,) = server_says(new, old)
        assert refused.message == "tuning cannot be added or removed; make another Workspace"


def test_fault_23_the_url_guard_and_exactly_one_source_hold_for_updates_too() -> None:
    """KAITO checks them on create only, so that an update reaches the metadata endpoint."""
    for update in ({"urls": ["http://169.254.169.254/latest"]}, {"urls": [URL], "image": IMAGE}, {}):
        assert server_says(changed("tuning.input", update), good())
    assert server_says(changed("tuning.output.imagePushSecret", ...), good())


# ── it is a CRD that API servers take ────────────────────────────────────────────────────────────────────────────────

_STRUCTURAL = {
    *("type", "description", "properties", "items", "additionalProperties", "required", "enum", "default", "format"),
    *("maxLength", "minLength", "maxItems", "maxProperties", "minimum", "maximum", "pattern"),
    *("x-kubernetes-preserve-unknown-fields", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    *("x-kubernetes-map-type", "x-kubernetes-validations"),
}


def nodes(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    below = [(f"{path}.{key}", each) for key, each in schema.get("properties", {}).items()]
    below += [(f"{path}[]", schema[key]) for key in ("items", "additionalProperties") if key in schema]
    return [(path, schema), *(found for where, each in below for found in nodes(each, where))]


ROOT = SERVER.schema("v1beta1")
NODES = dict(nodes(dict(ROOT)))


def test_versions_are_served_and_one_is_stored() -> None:
    assert [(each["name"], each["served"], each["storage"]) for each in CRD["spec"]["versions"]] == [
        ("v1alpha1", True, False),
        ("v1beta1", True, True),
    ]
    assert SERVER.schema("v1alpha1") == ROOT
    assert all(each["subresources"] == {"status": {}} for each in CRD["spec"]["versions"])
    assert CRD["spec"]["names"]["shortNames"] == ["wk", "wks"]
    assert CRD["spec"]["names"]["categories"] == ["workspace"]


@pytest.mark.parametrize("version", ["1.29", "1.33"])
def test_kubernetes_own_schema_takes_it(version: str) -> None:
    kubernetes_validate.validate(json.loads(json.dumps(CRD)), version, strict=True)


def test_the_schema_is_structural() -> None:
    """https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/"""
    assert len(NODES) > 120
    for path, schema in NODES.items():
        assert schema.keys() <= _STRUCTURAL, path
        assert schema["type"] in ("object", "array", "string", "integer"), path
        assert ("items" in schema) == (schema["type"] == "array"), path
        assert not ("properties" in schema and "additionalProperties" in schema), path
        assert set(schema.get("required", ())) <= schema.get("properties", {}).keys(), path
        if schema.get("x-kubernetes-list-type") == "map":
            keys = schema["x-kubernetes-list-map-keys"]
            assert set(keys) <= set(schema["items"]["required"]), path
        for rule in schema.get("x-kubernetes-validations", ()):
            assert rule.keys() <= {"rule", "message", "messageExpression", "fieldPath"}, path
            assert "\n" not in rule["message"], path
            assert len(rule["message"]) <= 2048, path
            at = path
            for name in filter(None, rule.get("fieldPath", "").split(".")):
                at += f".{name}"
                assert at in NODES, (path, rule["fieldPath"])
    assert NODES[".metadata"].keys() == {"type", "properties"}
    assert NODES[".metadata"]["properties"].keys() == {"name"}


def test_defaults_are_kaitos_and_keep_to_the_schema() -> None:
    defaults = {path: schema["default"] for path, schema in NODES.items() if "default" in schema}
    assert defaults == {".resource.count": 1, ".tuning.preset.accessMode": "public"}
    assert NODES[".resource.count"]["minimum"] <= 1
    assert "public" in NODES[".tuning.preset.accessMode"]["enum"]


def test_what_is_written_has_bounds() -> None:
    for path, schema in NODES.items():
        if path.startswith((".resource", ".tuning")) and ".volumeSource." not in path and "enum" not in schema:
            if schema["type"] == "string":
                assert "maxLength" in schema, path
            if schema["type"] == "array":
                assert "maxItems" in schema, path
            if "additionalProperties" in schema:
                assert "maxProperties" in schema, path


def test_the_rules_are_within_what_a_server_takes() -> None:
    found = list(prices(ROOT))
    assert len(found) > 60
    for price in found:
        assert max(price.holds, price.message) < 0.9 * EXPRESSION_LIMIT, (price.path, price.rule)
    assert sum(price.holds + price.message for price in found) < 0.6 * CRD_LIMIT


def test_as_many_urls_as_long_as_may_be_are_within_what_a_server_spends_on_one_object() -> None:
    """The estimate reckons with four bytes a character and looks at every side of an `||`; URLs have one byte."""
    lists = ("tuning.input.urls[]", "tuning.input.validation[]")
    urls = sum(price.holds for price in prices(ROOT) if price.path in lists)
    assert urls / 4 < 0.95 * RUNTIME_LIMIT


def test_the_rules_need_no_newer_server_than_1_29() -> None:
    text = json.dumps([schema.get("x-kubernetes-validations", []) for schema in NODES.values()])
    called = set(re.findall(r"\.(\w+)\(", re.sub(r"r'[^']*'", "", text)))
    assert called <= {
        "matches",
        "find",
        "findAll",
        "lowerAscii",
        "substring",
        "contains",
        "size",
        "join",
        "all",
        "filter",
    }
    assert "optionalOldSelf" not in text


def test_a_url_is_never_in_a_message_of_its_schema() -> None:
    """The server shows the value that fails a pattern or a length of its own, but not the one that fails a rule."""
    assert "pattern" not in NODES[".tuning.input.urls[]"]
    assert all("+ self +" not in json.dumps(rule) for rule in NODES[".tuning.input.urls[]"]["x-kubernetes-validations"])


def test_every_field_is_explained_in_sentences() -> None:
    for path, schema in NODES.items():
        if path != ".metadata":
            assert schema.get("description", "").endswith((".", "…")) or path == ".kind", path


def test_volumes_have_every_kind_that_the_parser_knows() -> None:
    for path in (".tuning.input.volumeSource", ".tuning.output.volumeSource"):
        assert NODES[path]["properties"].keys() == workspace.VOLUME_KINDS


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def running() -> dict[str, Any]:
    conditions = {
        "ResourceReady": "True",
        "JobStarted": "True",
        "WorkspaceSucceeded": "False",
        "WorkspaceReady": "False",
    }
    since = {"lastTransitionTime": "2026-01-02T02:00:00Z", "message": "…", "reason": "Because"}
    return {
        **copy.deepcopy(as_written("quick_start_filled.yaml")),
        "metadata": {"name": "workspace-tuning-phi-3", "creationTimestamp": "2026-01-02T01:58:30Z"},
        "status": {
            "state": "Running",
            "targetNodeCount": 1,
            "workerNodes": ["gpu-1"],
            "conditions": [{"type": name, "status": status, **since} for name, status in conditions.items()],
            "performance": {"metrics": {"loss": {"description": "the latest training loss", "value": "0.71"}}},
            "tuning": {
                "revision": 2,
                "stage": "train",
                "attempt": 1,
                "attempts": 4,
                "progressPercentage": 46,
                "step": 230,
                "totalSteps": 500,
                "loss": "0.71",
                "evalLoss": "0.8",
                "estimatedRemainingSeconds": 512,
                "metrics": [{"name": "learning_rate", "value": "0.0001"}, {"name": "tokens_per_s", "value": "5210"}],
                "lastUpdatedTime": "2026-01-02T03:03:55Z",
                "artifact": {"image": "contoso.azurecr.io/adapters/phi-3:0.0.1", "digest": f"sha256:{'0' * 64}"},
                "baseModel": {"id": "microsoft/Phi-3-mini-128k-instruct", "revision": "072c", "digest": "sha256:1"},
                "dataset": {"digest": "sha256:2", "files": 2, "sizeBytes": 13_100_000, "rows": 14_000},
                "runDigest": "sha256:3",
            },
        },
    }


def fresh() -> dict[str, Any]:
    return {"metadata": {"name": "new", "creationTimestamp": "2026-01-02T03:03:00Z"}, "resource": {}}


def test_columns_are_kaitos_then_progress() -> None:
    assert table(SERVER.versions["v1beta1"], [running(), fresh()], NOW) == (
        "NAME                     INSTANCE                   RESOURCEREADY   INFERENCEREADY   JOBSTARTED"
        "   WORKSPACESUCCEEDED   TARGETNODECOUNT   STATE     AGE   PROGRESS\n"
        "workspace-tuning-phi-3   Standard_NC24ads_A100_v4   True                             True"
        "         False                1                 Running   65m   46\n"
        "new                                                                                     "
        "                                                           1m\n"
    )


def test_the_loss_is_a_column_of_the_wide_table() -> None:
    narrow, wide = (
        table(SERVER.versions["v1beta1"], [running()], NOW, wide=each).splitlines() for each in (False, True)
    )
    assert wide[0] == f"{narrow[0]}   LOSS"
    assert wide[1] == f"{narrow[1]}         0.71"


def test_v1alpha1_keeps_its_first_columns() -> None:
    assert table(SERVER.versions["v1alpha1"], [running()], NOW) == (
        "NAME                     INSTANCE                   RESOURCEREADY   INFERENCEREADY   WORKSPACEREADY   AGE\n"
        "workspace-tuning-phi-3   Standard_NC24ads_A100_v4   True                             False            65m\n"
    )


def test_the_status_is_kept_and_checked() -> None:
    assert SERVER.apply_status(running()) == []
    for path, value in (("tuning.stage", "waiting"), ("tuning.progressPercentage", 101), ("tuning.x", 1)):
        written = running()
        *parents, last = path.split(".")
        at = written["status"]
        for parent in parents:
            at = at[parent]
        at[last] = value
        assert SERVER.apply_status(written)


@pytest.mark.parametrize("kind", ["check", "waiting", "invalid", "inference", "deleting"])
def test_the_crd_has_room_for_all_that_the_controller_writes(kind: Any) -> None:
    standing = Standing(kind, message="why", revision=3, run_digest="sha256:1", notice="a notice", error="an error")
    status = build_status(running(), standing, NOW)
    assert SERVER.apply_status(running() | {"status": status}) == []


# ── the tools of this file ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_evaluator_has_the_servers_functions() -> None:
    assert evaluate("self.lowerAscii() == 'aÄz'", self="AÄZ")
    assert evaluate("self.find('[0-9]+') + self.find('x') == '12'", self="a12b3")
    assert evaluate("self.findAll('[0-9]').join('-') == '1-2'", self="a1b2")
    assert evaluate("self.substring(2) == 'c'", self="abc")
    assert evaluate("has(self.a) && !has(self.b)", self={"a": 0})


def test_the_price_of_a_rule_is_what_the_server_reckons() -> None:
    """One regex of 20 characters on up to 100 strings of up to 250 characters (1,000 bytes): 100 * (101 * 5 + 1)"""
    rule = {"rule": f"self.matches(r'{'a' * 20}')", "message": ""}
    items = {"type": "string", "maxLength": 250, "x-kubernetes-validations": [rule]}
    (price,) = prices({"type": "array", "maxItems": 100, "items": items})
    assert price.holds == 100 * (101 * 5 + 1)
