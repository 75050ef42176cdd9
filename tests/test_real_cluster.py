"""On a real cluster (tests/spare_cluster.py says how to name one): what its API server, its controllers and its nodes
make of the CRD, of our objects and of the controller.

Each run of the suite has namespaces of its own in which Pod Security is `restricted`, and deletes them at its end; the
CRD goes where it was not there before.
"""

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_crd import IMAGES, MISTAKES, SPEAKS_LESS, URLS, server_says
from test_workspace import changed

from tests.data_files import message_rows, write_data
from tests.record_real_server import answers_of, file_of, sender, too_dear
from tests.registries import docker_config
from tests.spare_cluster import QUICK_START_DATA, Services, SpareCluster, loopback_services, publish_tiny
from tuner.cli import main
from tuner.cluster.api import (
    CONFIG_MAP,
    CONTROLLER_REVISION,
    CUSTOM_RESOURCE_DEFINITION,
    DEPLOYMENT,
    EVENT,
    JOB,
    NAMESPACE,
    POD,
    SECRET,
    WORKSPACE,
    Api,
    Object,
)
from tuner.cluster.api_errors import ApiError, BadRequestError, InvalidError
from tuner.cluster.controller import FIELD_MANAGER
from tuner.cluster.crd import NAME as CRD_NAME
from tuner.cluster.crd import custom_resource_definition
from tuner.cluster.follow import describe, load_run
from tuner.cluster.kaito import is_ours, kaitos_controller
from tuner.cluster.reconcile import is_end

CLUSTER = SpareCluster.read()
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
QUICK_START = Path(__file__).parent / "workspaces" / "quick_start.yaml"
NAME = "workspace-tuning-phi-3"
SIGNATURE = "sv=2024&sig=CANARY"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(CLUSTER is None, reason="no cluster to spare: TUNER_TEST_CLUSTER"),
]


def until(holds: Callable[[], Any], timeout_s: float = 300.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def cluster() -> SpareCluster:
    assert CLUSTER is not None
    return CLUSTER


@pytest.fixture(scope="module")
def namespace(cluster: SpareCluster) -> Iterator[str]:
    """A namespace for this run of the suite, gone at its end."""
    api = Api.from_config(env={"KUBECONFIG": cluster.kubeconfig})
    name = f"tuner-test-{uuid.uuid4().hex[:8]}"
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}})
    yield name
    api.delete(NAMESPACE, name)


@pytest.fixture(scope="module")
def services(cluster: SpareCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with loopback_services(tmp_path_factory.mktemp("services"), cluster) as running:
        rows = write_data(tmp_path_factory.mktemp("data") / "train.parquet", message_rows(40))
        running.hub.serve(QUICK_START_DATA, rows)
        yield running


@pytest.fixture(scope="module")
def data(cluster: SpareCluster, request: pytest.FixtureRequest) -> str:
    """The URL of rows that pods can fetch."""
    if cluster.loopback is not None:
        request.getfixturevalue("services")
    return cluster.data


@pytest.fixture
def api(cluster: SpareCluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig)
    monkeypatch.setenv("TUNER_IMAGE", cluster.image)
    return Api.from_config(namespace=namespace)


# ── the CRD ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def crd(cluster: SpareCluster) -> Iterator[None]:
    """Ours, served; taken away again where it was not there."""
    api = Api.from_config(env={"KUBECONFIG": cluster.kubeconfig})
    before = api.find(CUSTOM_RESOURCE_DEFINITION, CRD_NAME)
    if (before and not is_ours(before)) or kaitos_controller(api):
        pytest.skip("KAITO is in this cluster")
    api.apply(custom_resource_definition(opened=cluster.loopback is not None))
    until(lambda: api.serves(WORKSPACE))
    yield
    if not before:
        api.delete(CUSTOM_RESOURCE_DEFINITION, CRD_NAME)


def refused(api: Api, written: dict[str, Any]) -> str:
    """What the server says to an apply that is only tried; "" when it takes it."""
    written = {**written, "metadata": {"name": "tickets", **written["metadata"], "namespace": api.namespace}}
    written.pop("status", None)
    try:
        api.create(written, dry_run=True)
    except ApiError as error:
        return error.server_message or error.message
    return ""


def test_the_crd_of_an_installation_that_opens_nothing_is_taken_too(api: Api, crd: None) -> None:
    api.apply(custom_resource_definition(), dry_run=True)


def test_the_server_says_what_the_parser_says(api: Api, crd: None, cluster: SpareCluster) -> None:
    mistakes = [
        changed(path, value)
        for path, value, where in MISTAKES
        # of a name that no object can have the server speaks itself, before any rule
        if where is not SPEAKS_LESS and not (path == "metadata.name" and value in ("Tickets_1", "-a"))
    ]
    mistakes += [changed("tuning.input", {"image": image}) for image in IMAGES]
    if cluster.loopback is None:  # else addresses are the controller's to judge
        mistakes += [changed("tuning.input.urls", [url]) for url in URLS]
    wrong = {}
    for written in mistakes:
        sentences = [each.message for each in server_says(written)]
        assert sentences
        said = refused(api, written)
        if not all(sentence in said for sentence in sentences):
            wrong[said] = sentences
    assert not wrong
    assert refused(api, changed("tuning.method", "QLoRA")) == ""


def test_what_the_parser_refuses_in_other_words_the_server_refuses_too(api: Api, crd: None) -> None:
    for path, value, where in MISTAKES:
        if where is SPEAKS_LESS:
            assert refused(api, changed(path, value)), (path, value)


def test_an_update_is_held_to_what_cannot_be_changed(api: Api, crd: None) -> None:
    written = changed("metadata.namespace", api.namespace)
    api.apply(written)
    for path, value, sentence in (
        ("tuning.method", "lora", "the method cannot be changed"),
        ("tuning.preset.name", "phi-4", "the preset cannot be changed"),
        ("resource.instanceType", "other", "the instance type cannot be changed"),
        ("tuning.input.urls", ["http://169.254.169.254/"], "is a link-local address"),
    ):
        update = changed(path, value)
        update["metadata"]["namespace"] = api.namespace
        with pytest.raises(ApiError, match=sentence):
            api.apply(update)
    api.delete(WORKSPACE, "tickets")


def test_the_server_answers_as_it_was_recorded(api: Api) -> None:
    """What tests/fake_kubernetes.py is held to is true of this one; else: record it (tests/record_real_server.py)."""
    if not file_of(api).exists():
        pytest.skip(f"no recording of {api.server_version()}")
    told = json.loads(file_of(api).read_text(encoding="utf-8"))
    for case in told["cases"]:
        assert answers_of(api, case["steps"]) == [step["answer"] for step in case["steps"]], case["name"]
    for each in told["costs"]:
        assert too_dear(each["schema"], sender(api)) == each["says"]


# ── tuner submit ─────────────────────────────────────────────────────────────────────────────────────────────────────


def workspace(folder: Path, url: str, name: str = "smoke") -> str:
    """One whose adapter goes to a volume of the pod: no registry is needed."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: {name}}}
resource: {{labelSelector: {{matchLabels: {{app: {name}}}}}}}
tuning:
  preset: {{name: phi-3-mini-4k-instruct}}
  method: qlora
  input: {{urls: ["{url}"]}}
  output: {{volumeSource: {{emptyDir: {{}}}}}}
"""
    )
    return str(path)


def run(command: str, *arguments: str, api: Api) -> int:
    return main([command, *arguments, "-n", api.namespace])


def submitted(path: str, *options: str, api: Api) -> int:
    """A run of a tiny model on a CPU. Data on this machine are reached where they are allowed to be."""
    assert CLUSTER is not None
    opened = ["--allow-cidr", "127.0.0.0/8"] if CLUSTER.loopback else []
    return run("submit", path, "--smoke", *opened, *options, api=api)


def test_every_object_is_admitted(api: Api, data: str, tmp_path: Path) -> None:
    assert submitted(workspace(tmp_path, data), "--dry-run", api=api) == 0
    assert run("submit", workspace(tmp_path, data), "--dry-run", "--check-job", api=api) == 0
    assert api.find(JOB, "smoke") is None


def test_the_server_refuses_what_the_fake_one_refuses(api: Api) -> None:
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "strict"}, "data": {}}
    with pytest.raises(BadRequestError, match="does not know this field: dta"):
        api.create({**config_map, "dta": {}}, dry_run=True)
    with pytest.raises(InvalidError, match=r"metadata\.name"):
        api.create({**config_map, "metadata": {"name": "Upper"}}, dry_run=True)


def test_a_run_goes_to_its_end_and_goes_when_deleted(
    api: Api, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace(tmp_path, data)
    assert submitted(path, "--wait", api=api) == 0
    status = describe(load_run(api, "smoke"), datetime.now(UTC))
    assert (status.phase, status.attempt) == ("succeeded", 1)
    capsys.readouterr()
    assert run("logs", "smoke", api=api) == 0
    assert capsys.readouterr().out
    assert run("events", "smoke", api=api) == 0
    assert "Pod/" in capsys.readouterr().out
    assert submitted(path, api=api) == 0  # the same: nothing is done
    assert submitted(path, "--set", "LoraConfig.r=4", api=api) == 78
    assert "of another run: LoraConfig.r: " in capsys.readouterr().err
    assert run("delete", "smoke", api=api) == 0
    until(lambda: api.find(JOB, "smoke") is None)
    until(lambda: api.list(CONFIG_MAP, label_selector="kaito.sh/workspace=smoke").items == ())


def test_a_failure_that_no_retry_mends_ends_the_job_at_once(
    api: Api, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace(tmp_path, f"{data}-that-is-not-there", "missing")
    assert submitted(path, "--wait", api=api) == 66
    pods = api.list(POD, label_selector="batch.kubernetes.io/job-name=missing").items
    assert len(pods) == 1  # podFailurePolicy: no second try
    assert "(exit 66)" in capsys.readouterr().err
    assert run("delete", "missing", api=api) == 0


def test_what_kubectl_applied_is_the_same_run(
    api: Api, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace(tmp_path, data, "applied")
    opened = ["--allow-cidr", "127.0.0.0/8"] if CLUSTER and CLUSTER.loopback else []
    assert run("render", path, "--smoke", *opened, api=api) == 0
    for manifest in yaml.safe_load_all(capsys.readouterr().out):
        api.apply(manifest, field_manager="kubectl")
    assert submitted(path, api=api) == 0
    assert "of the same run is there already" in capsys.readouterr().err
    assert run("delete", "applied", api=api) == 0


def test_a_cancelled_run_stops(api: Api, data: str, tmp_path: Path) -> None:
    path = workspace(tmp_path, data, "cancelled")
    assert submitted(path, api=api) == 0
    assert run("cancel", "cancelled", api=api) == 0
    job = api.find(JOB, "cancelled")
    assert job is None or "deletionTimestamp" in job["metadata"] or job["spec"].get("suspend")


# ── the controller ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def controller(cluster: SpareCluster, namespace: str, crd: None) -> Iterator[Api]:
    """Installed for the whole cluster, in a namespace of its own; taken away at the end."""
    home = f"{namespace}-system"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", cluster.kubeconfig)
        opened = ["--allow-cidr", "127.0.0.0/8"] if cluster.loopback else []
        assert main(["install", "--namespace", home, "--image", cluster.image, *opened]) == 0
        api = Api.from_config(namespace=home)
        if cluster.loopback:  # two on one machine would want one port
            api.patch(DEPLOYMENT, "tuner-controller", {"spec": {"replicas": 1}})
        until(lambda: _is_available(api.get(DEPLOYMENT, "tuner-controller")))
        yield api
        assert main(["uninstall", "--namespace", home]) == 0
        assert api.find(DEPLOYMENT, "tuner-controller") is None
        assert api.serves(WORKSPACE)
        api.delete(NAMESPACE, home)


def _is_available(deployment: Object) -> bool:
    conditions = deployment.get("status", {}).get("conditions") or ()
    return any(each["type"] == "Available" and each["status"] == "True" for each in conditions)


def test_an_installation_that_is_there_is_left_as_it_is(
    controller: Api, cluster: SpareCluster, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = ["--allow-cidr", "127.0.0.0/8"] if cluster.loopback else []
    assert main(["install", "--namespace", controller.namespace, "--image", cluster.image, *opened]) == 0
    changed_lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith((": changed", ": made"))]
    assert changed_lines in ([], [f"Deployment {controller.namespace}/tuner-controller: changed"])
    if cluster.loopback:
        controller.patch(DEPLOYMENT, "tuner-controller", {"spec": {"replicas": 1}})


@pytest.fixture(scope="module")
def quick_start(controller: Api, services: Services, namespace: str) -> Api:
    """KAITO's page on tuning Phi-3, its placeholders filled in and on an instance type with a GPU that torch takes."""
    api = Api.from_config(namespace=namespace, env={"KUBECONFIG": CLUSTER.kubeconfig if CLUSTER else ""})
    written = QUICK_START.read_text()
    for placeholder, value in (
        ("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", f"{services.registry}/adapters/phi-3:0.0.1"),
        ("ACR_REGISTRY_SECRET_HERE", "push"),
        ("Standard_NC6s_v3", "Standard_NC24ads_A100_v4"),
        ("?download=true", f"?{SIGNATURE}"),
    ):
        assert placeholder in written
        written = written.replace(placeholder, value)
    manifest = yaml.safe_load(written)
    publish_tiny(services.hub, manifest["tuning"]["preset"]["name"])
    login = base64.b64encode(docker_config(services.registry).encode()).decode()
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "push"}, "data": {".dockerconfigjson": login}}
    api.create({**secret, "type": "kubernetes.io/dockerconfigjson"})
    api.create(manifest, namespace)
    return api


def ended(api: Api, revision: int) -> Object:
    """The Workspace, once this revision has ended."""

    def look() -> Object | None:
        found = api.get(WORKSPACE, NAME)
        status = found.get("status") or {}
        is_it = (status.get("tuning") or {}).get("revision") == revision
        return found if is_it and status.get("state") in ("Succeeded", "Failed") else None

    found: Object = until(look, 3600.0)
    return found


def said_by(controller: Api) -> str:
    pods = controller.list(POD, label_selector="app.kubernetes.io/name=tuner-controller").items
    return "".join(controller.logs(pod["metadata"]["name"], "controller") for pod in pods)


def test_the_quick_start_is_trained_and_pushed(quick_start: Api, controller: Api, services: Services) -> None:
    status = ended(quick_start, 1)["status"]
    conditions = {each["type"]: each for each in status["conditions"]}
    assert conditions["WorkspaceSucceeded"]["status"] == "True", conditions
    digest = services.digest_of("adapters/phi-3", "0.0.1")
    assert status["tuning"]["artifact"] == {
        "image": f"{services.registry}/adapters/phi-3@{digest}",
        "digest": digest,
    }
    assert conditions["WorkspaceSucceeded"]["message"] == (
        f"workspace succeeds; pushed {services.registry}/adapters/phi-3@{digest}"
    )
    assert status["workerNodes"]
    events = [each for each in quick_start.list(EVENT).items if each["involvedObject"]["name"] == NAME]
    assert {each["type"] for each in events} == {"Normal"}
    assert "Succeeded" in {each["reason"] for each in events}
    lines = [json.loads(line) for line in said_by(controller).splitlines()]
    assert not [line for line in lines if line["message"] == "reconcile"], lines


def test_no_signature_is_anywhere_but_in_the_secret_and_the_workspace(quick_start: Api, controller: Api) -> None:
    ended(quick_start, 1)
    kinds = (JOB, POD, CONFIG_MAP, CONTROLLER_REVISION, EVENT)
    everything = json.dumps([quick_start.list(kind).items for kind in kinds])
    everything += json.dumps(quick_start.get(WORKSPACE, NAME)["status"]) + said_by(controller)
    for pod in quick_start.list(POD, label_selector=f"kaito.sh/workspace={NAME}").items:
        for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
            everything += quick_start.logs(pod["metadata"]["name"], container["name"])
    assert "CANARY" not in everything
    assert any("sources" in each["metadata"]["name"] for each in quick_start.list(SECRET).items)


def test_what_has_ended_is_remembered_without_its_job_and_its_status(quick_start: Api) -> None:
    before = ended(quick_start, 1)["status"]
    (end,) = [each for each in quick_start.list(CONTROLLER_REVISION).items if is_end(each)]
    assert end["data"]["state"] == "Succeeded"
    quick_start.delete(JOB, NAME, propagation="Foreground")
    until(lambda: quick_start.find(JOB, NAME) is None)
    lost = quick_start.apply(
        {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": NAME}, "status": {}},
        field_manager=FIELD_MANAGER,
        subresource="status",
    )
    assert "state" not in (lost.get("status") or {})
    after = ended(quick_start, 1)["status"]
    assert after["tuning"]["artifact"] == before["tuning"]["artifact"]
    assert quick_start.find(JOB, NAME) is None


def test_an_edit_is_the_next_revision_and_runs(quick_start: Api, services: Services) -> None:
    ended(quick_start, 1)
    image = f"{services.registry}/adapters/phi-3:0.0.2"
    quick_start.patch(WORKSPACE, NAME, {"tuning": {"output": {"image": image}}})
    status = ended(quick_start, 2)["status"]
    assert status["state"] == "Succeeded"
    assert status["tuning"]["artifact"]["digest"] == services.digest_of("adapters/phi-3", "0.0.2")
    job = quick_start.get(JOB, NAME)
    assert job["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"


def test_what_a_workspace_owned_goes_with_it(quick_start: Api) -> None:
    ended(quick_start, 2)
    quick_start.delete(WORKSPACE, NAME)
    kinds = (JOB, CONTROLLER_REVISION)
    until(lambda: not any(quick_start.list(kind).items for kind in kinds))
    selector = f"kaito.sh/workspace={NAME}"
    until(lambda: not quick_start.list(CONFIG_MAP, label_selector=selector).items)
