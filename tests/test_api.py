"""The Api against the fake server: configuration, retries, and a sentence for whatever a server refuses."""

import json
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.fake_kubernetes import FakeKubernetes
from tests.registries import make_certificate
from tuner.cluster.api import CONFIG_MAP, JOB, POD, SECRET, WORKSPACE, Api, resource_of
from tuner.cluster.api_errors import (
    AlreadyExistsError,
    ApiError,
    Asked,
    ForbiddenError,
    GoneError,
    InvalidError,
    NotFoundError,
    RefusedError,
    ThrottledError,
    UnauthorizedError,
    UnavailableError,
    error_of_response,
)
from tuner.cluster.watched import trim_workspace
from tuner.errors import ConfigError


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    with FakeKubernetes() as fake:
        yield fake


@pytest.fixture
def kubeconfig(cluster: FakeKubernetes, tmp_path: Path) -> Path:
    return cluster.write_kubeconfig(tmp_path / "config", namespace="ml")


@pytest.fixture
def api(kubeconfig: Path) -> Api:
    return Api.from_config(namespace="default", env={"KUBECONFIG": str(kubeconfig)}, patience_s=5)


def config_map(name: str = "a") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}


# ── where the cluster is ─────────────────────────────────────────────────────────────────────────────────────────────


def test_kubeconfig_is_found_as_kubectl_finds_it(kubeconfig: Path, tmp_path: Path) -> None:
    assert Api.from_config(env={"KUBECONFIG": str(kubeconfig)}).namespace == "ml"
    home = tmp_path / "home"
    (home / ".kube").mkdir(parents=True)
    (home / ".kube" / "config").write_text(kubeconfig.read_text())
    assert Api.from_config(env={"HOME": str(home)}).namespace == "ml"
    there = Api.from_config("other", env={"KUBECONFIG": f"{tmp_path / 'missing'}:{kubeconfig}"})
    assert (there.namespace, there.context) == ("other", "other")
    assert Api.from_config("other", "mine", env={"KUBECONFIG": str(kubeconfig)}).namespace == "mine"


def test_a_context_that_is_not_there_is_said_with_those_that_are(kubeconfig: Path) -> None:
    with pytest.raises(ConfigError, match="there is no context 'prod'") as caught:
        Api.from_config("prod", env={"KUBECONFIG": str(kubeconfig)})
    assert caught.value.hint == "there is fake, other"


def test_no_cluster_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Kubernetes cluster is configured"):
        Api.from_config(env={"HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"\$KUBECONFIG: there is no file /nowhere"):
        Api.from_config(env={"KUBECONFIG": "/nowhere"})


@pytest.mark.parametrize("content", [b"prompt,completion\na,b\n", b"\xff\xfe", b"- a", b"current-context: [x]"])
def test_what_is_no_kubeconfig_is_said_without_a_word_of_python(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Api.from_config(env={"KUBECONFIG": str(tmp_path / "config")})
    assert "Error" not in str(caught.value)
    with pytest.raises(ConfigError, match="Is a directory"):
        Api.from_config(env={"KUBECONFIG": str(tmp_path)})


@pytest.mark.parametrize("text", ["", "{", "clusters: []", "a: b", "current-context: x\ncontexts: []\nclusters: []\n"])
def test_a_bad_kubeconfig_is_a_config_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        Api.from_config(env={"KUBECONFIG": str(path)})


def test_in_a_pod_it_is_the_service_account(cluster: FakeKubernetes, tmp_path: Path, monkeypatch: Any) -> None:
    from kubernetes.config import incluster_config

    from tuner.cluster import api as api_module

    for name, text in (("token", cluster.token), ("ca.crt", "unused"), ("namespace", "jobs")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(api_module, "_SERVICE_ACCOUNT", tmp_path)
    loader, loaders = incluster_config.InClusterConfigLoader, list[Any]()

    def load(client_configuration: Any) -> None:
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        loaders.append(loader(str(tmp_path / "token"), str(tmp_path / "ca.crt"), environ=environment))
        loaders[0].load_and_set(client_configuration)
        loaders[0].host, loaders[0].ssl_ca_cert = cluster.url, None  # set again whenever the token is read
        client_configuration.host, client_configuration.ssl_ca_cert = cluster.url, None

    monkeypatch.setattr(incluster_config, "load_incluster_config", load)
    api = Api.from_config(env={"HOME": str(tmp_path), "KUBERNETES_SERVICE_HOST": "127.0.0.1"})
    assert api.namespace == "jobs"
    assert api.server_version().minor == 36  # 36.0.0 of the client sent no token here
    cluster.token = "a-new-token"
    with pytest.raises(UnauthorizedError):
        api.server_version()
    (tmp_path / "token").write_text("a-new-token")
    monkeypatch.setattr(loaders[0], "token_expires_at", datetime.now())
    assert api.server_version().minor == 36  # the kubelet renews the file, and it is read again


# ── what a server refuses ────────────────────────────────────────────────────────────────────────────────────────────


def test_versions_are_compared_by_number(api: Api, cluster: FakeKubernetes) -> None:
    assert (api.server_version().major, api.server_version().minor) == (1, 36)
    assert str(api.server_version()) == "v1.36.0-fake"


def test_an_expired_token_says_how_to_sign_in(api: Api, cluster: FakeKubernetes) -> None:
    cluster.token = "another"
    with pytest.raises(UnauthorizedError, match="token has expired") as caught:
        api.list(JOB)
    assert caught.value.exit_code == 77
    assert "az login" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("act", "rule"),
    [
        (lambda api: api.list(JOB), "- {apiGroups: [batch], resources: [jobs], verbs: [list]}"),
        (lambda api: api.get(SECRET, "s"), '- {apiGroups: [""], resources: [secrets], verbs: [get]}'),
        (lambda api: api.logs("p", "c"), '- {apiGroups: [""], resources: [pods/log], verbs: [get]}'),
        (
            lambda api: api.apply(
                {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "w"}, "status": {}},
                api.namespace,
                subresource="status",
            ),
            "- {apiGroups: [kaito.sh], resources: [workspaces/status], verbs: [patch]}",
        ),
        (lambda api: api.create(config_map()), '- {apiGroups: [""], resources: [configmaps], verbs: [create]}'),
    ],
)
def test_a_missing_permission_is_named_as_a_line_of_yaml(
    api: Api, cluster: FakeKubernetes, act: Any, rule: str
) -> None:
    cluster.allow_only([])
    with pytest.raises(ForbiddenError, match="may not") as caught:
        act(api)
    assert str(caught.value.hint).endswith(rule)


def status(code: int, message: str, reason: str = "Forbidden", **details: Any) -> dict[str, Any]:
    return {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}


ASKED = Asked("create", "jobs.batch", "https://c", "batch", "jobs", "ml", "tune", "Job")


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (
            status(
                403,
                'jobs.batch "tune" is forbidden: exceeded quota: gpus, requested: pods=1, used: pods=2, limit: pods=2',
            ),
            RefusedError,
            "Job tune in namespace ml: exceeded quota: gpus, requested: pods=1",
        ),
        (
            status(403, 'pods "t" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true (…)'),
            RefusedError,
            "refused by Pod Security restricted:latest: runAsNonRoot != true",
        ),
        (
            status(403, 'admission webhook "v.kaito.sh" denied the request: no tuning here'),
            RefusedError,
            "refused by the admission webhook v.kaito.sh: no tuning here",
        ),
        (
            status(400, 'admission webhook "v.kaito.sh" denied the request: no tuning here', "BadRequest"),
            RefusedError,
            "refused by the admission webhook v.kaito.sh: no tuning here",
        ),
        (
            status(
                422,
                "jobs.batch \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no",
                "Invalid",
            ),
            RefusedError,
            "refused by the admission policy p: no",
        ),
        (
            status(
                500,
                'Internal error occurred: failed calling webhook "v.io": failed to call webhook: no endpoints',
                "InternalError",
            ),
            UnavailableError,
            "the admission webhook v.io does not answer: failed to call webhook: no endpoints",
        ),
        (
            status(403, "because it is being terminated"),
            RefusedError,
            "namespace ml is being deleted",
        ),
        (
            status(403, 'pods "x" is forbidden: error looking up service account ml/s: serviceaccount "s" not found'),
            RefusedError,
            "there is no ServiceAccount s in namespace ml",
        ),
        (
            status(404, 'namespaces "ml" not found', "NotFound", name="ml", kind="namespaces"),
            NotFoundError,
            "no namespace ml",
        ),
        (
            status(404, 'jobs.batch "tune" not found', "NotFound", name="tune", kind="jobs"),
            NotFoundError,
            "no Job tune in",
        ),
        ({"message": "404 page not found"}, NotFoundError, "https://c does not know jobs.batch"),
        (status(409, "object is being deleted: x", "AlreadyExists"), AlreadyExistsError, "still being deleted"),
        (
            status(
                422,
                'Job.batch "tune" is invalid: spec.template: Invalid value: core.PodTemplateSpec{…}: immutable',
                "Invalid",
                causes=[{"field": "spec.template", "message": "Invalid value: field is immutable"}],
            ),
            InvalidError,
            "is refused: spec.template: Invalid value: field is immutable",
        ),
        (status(410, "too old resource version: 1 (5)", "Expired"), GoneError, "no longer knows"),
        (
            status(
                400,
                'Job in version "v1" cannot be handled as a Job: strict decoding error: unknown field "spec.a"',
                "BadRequest",
            ),
            ApiError,
            "the cluster does not know this field: spec.a",
        ),
        ({}, ApiError, "https://c"),
    ],
)
def test_each_refusal_has_its_sentence(answer: dict[str, Any], kind: type[ApiError], says: str) -> None:
    code = int(answer.get("code") or 404 if answer else 418)
    error = error_of_response(ASKED, code, answer, {})
    assert isinstance(error, kind)
    assert says in error.message


# ── trouble on the way ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_read_is_tried_again(api: Api, cluster: FakeKubernetes) -> None:
    cluster.put(config_map())
    cluster.fail("GET", "configmaps/a", status=503, times=2)
    cluster.fail("GET", "configmaps/a", reset=True)
    assert api.get(CONFIG_MAP, "a")["metadata"]["name"] == "a"
    assert cluster.calls[("get", "configmaps")] == 1


def test_a_write_that_may_have_happened_is_not_tried_again(api: Api, cluster: FakeKubernetes) -> None:
    cluster.fail("POST", "configmaps", reset=True, after=True)
    with pytest.raises(UnavailableError, match="the connection broke"):
        api.create(config_map())
    assert cluster.calls[("create", "configmaps")] == 1
    assert api.create_once(config_map()) is None


def test_a_write_that_the_server_put_off_is_tried_again_when_it_says(api: Api, cluster: FakeKubernetes) -> None:
    cluster.fail("POST", "configmaps", status=429, reason="TooManyRequests", retry_after_s=0)
    api.create(config_map())
    cluster.fail("POST", "configmaps", status=429, reason="TooManyRequests", retry_after_s=60)
    with pytest.raises(ThrottledError) as caught:
        api.create(config_map("b"))
    assert caught.value.retry_after_s == 60


@pytest.fixture
def nobody_listens(kubeconfig: Path) -> Iterator[Path]:
    """A kubeconfig whose server refuses each connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        config = json.loads(kubeconfig.read_text())
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
        kubeconfig.write_text(json.dumps(config))
        yield kubeconfig


def test_a_server_that_is_not_there_is_said_at_once(nobody_listens: Path) -> None:
    api = Api.from_config(env={"KUBECONFIG": str(nobody_listens)}, patience_s=0)
    with pytest.raises(UnavailableError, match="connection refused") as caught:
        api.list(JOB)
    assert caught.value.exit_code == 69
    assert caught.value.not_sent


def test_after_the_first_failed_try_it_is_said_why_and_that_there_are_more(nobody_listens: Path) -> None:
    told: list[tuple[str, float]] = []
    began = time.monotonic()
    api = Api.from_config(
        env={"KUBECONFIG": str(nobody_listens)}, patience_s=1, tell=lambda line: told.append((line, time.monotonic()))
    )
    for _ in range(2):
        with pytest.raises(UnavailableError):
            api.list(JOB)
    ((line, at),) = told
    assert line == f"{api.server}: connection refused; trying again for up to 1 s"
    assert at - began < 0.5 < time.monotonic() - began


def test_a_certificate_of_another_cluster_is_said(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    pair = make_certificate(mine)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    with FakeKubernetes(tls=context) as cluster:
        trusted = cluster.write_kubeconfig(tmp_path / "good", ca=pair.certificate)
        assert Api.from_config(env={"KUBECONFIG": str(trusted)}).server_version().minor == 36
        wrong = cluster.write_kubeconfig(tmp_path / "bad", ca=make_certificate(other).certificate)
        with pytest.raises(UnavailableError, match="its certificate is not trusted"):
            Api.from_config(env={"KUBECONFIG": str(wrong)}, tell=pytest.fail).list(JOB)  # no second try would help
        missing = cluster.write_kubeconfig(tmp_path / "none", ca=tmp_path / "gone.pem")
        with pytest.raises(ConfigError, match=r"gone\.pem"):
            Api.from_config(env={"KUBECONFIG": str(missing)}, patience_s=0).list(JOB)


def test_what_is_no_api_server_is_said(cluster: FakeKubernetes, kubeconfig: Path) -> None:
    from tests.http_server import HttpServer

    with HttpServer() as page:
        page.serve("/version", b"<html>sign in</html>")
        config = json.loads(kubeconfig.read_text())
        config["clusters"][0]["cluster"]["server"] = page.url
        kubeconfig.write_text(json.dumps(config))
        with pytest.raises(UnavailableError, match="is not JSON"):
            Api.from_config(env={"KUBECONFIG": str(kubeconfig)}, patience_s=0).server_version()


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_an_object_deeper_than_python_reads_does_not_hide_the_others(
    opening: str, closing: str, kubeconfig: Path
) -> None:
    from tests.http_server import Answer, HttpServer

    deep = opening * 3_000 + "1" + closing * 3_000
    objects = [f'{{"metadata":{{"name":"{name}"}},"inference":{deep},"b":"]}}[{{"}}' for name in ("x", "y")]
    with HttpServer() as server:
        path = "/apis/kaito.sh/v1beta1/namespaces/default/workspaces"
        listed = f'{{"items":[{",".join(objects)}],"metadata":{{"resourceVersion":"7"}}}}'
        changes = "\n".join(f'{{"type":"ADDED","object":{each}}}' for each in objects)
        server.serve(path, Answer(body=listed.encode()), Answer(body=changes.encode()))
        config = json.loads(kubeconfig.read_text())
        config["clusters"][0]["cluster"]["server"] = server.url
        kubeconfig.write_text(json.dumps(config))
        api = Api.from_config(namespace="default", env={"KUBECONFIG": str(kubeconfig)}, patience_s=0)
        (page,) = api.pages(WORKSPACE, "default")
        heard = [event.object for event in api.watch(WORKSPACE, page.resource_version, "default")]
    for objects_read in (page.items, heard):
        assert [each["metadata"]["name"] for each in objects_read] == ["x", "y"]
        assert [each["b"] for each in objects_read] == ["]}[{"] * 2


def test_what_is_kept_of_a_workspace_can_be_compared_and_written_however_deep_it_was() -> None:
    inference: Any = {}
    for _ in range(900):
        inference = {"a": [inference]}
    kept = trim_workspace({"kind": "Workspace", "metadata": {"name": "a"}, "inference": inference})
    assert kept == json.loads(json.dumps(kept))


def test_the_servers_warnings_are_heard_once(cluster: FakeKubernetes, kubeconfig: Path) -> None:
    heard: list[str] = []
    api = Api.from_config(namespace="default", env={"KUBECONFIG": str(kubeconfig)}, warn=heard.append)
    cluster.warnings = ["would violate PodSecurity"]
    api.create(config_map())
    api.create(config_map("b"))
    assert heard == ["would violate PodSecurity"]


def test_no_token_is_shown(api: Api, cluster: FakeKubernetes) -> None:
    cluster.deny("list", "pods")
    with pytest.raises(ForbiddenError) as caught:
        api.list(POD)
    assert cluster.token not in repr(api) + str(caught.value) + str(caught.value.hint)


def test_only_kinds_that_we_write_have_a_place() -> None:
    assert resource_of({"apiVersion": "batch/v1", "kind": "Job"}) == JOB
    with pytest.raises(ConfigError, match="CronJob"):
        resource_of({"apiVersion": "batch/v1", "kind": "CronJob"})
