"""The controller's loop against an API server in this process: real HTTP, the real client, real Jobs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_kubernetes import FakeKubernetes
from tuner.cli import main
from tuner.cluster.api import WORKSPACE, Api, Listing
from tuner.cluster.api_errors import GoneError
from tuner.cluster.controller import LEASE_NAME, Controller, ControllerOptions
from tuner.cluster.crd import COLUMNS, custom_resource_definition
from tuner.cluster.job_options import JobOptions
from tuner.cluster.lease import Leadership
from tuner.cluster.metrics import Gauges, Metrics, metrics_text
from tuner.cluster.reconcile import Rendered, Settings, is_end
from tuner.cluster.revision import RevisionRenderer
from tuner.cluster.watched import Watched
from tuner.cluster.work_queue import WorkQueue
from tuner.errors import ConfigError
from tuner.request import Request
from tuner.retry import Backoff

WORKSPACES = Path(__file__).parent / "workspaces"
INSTALL = Path(__file__).parents[1] / "job_templates" / "install"
NAME = "workspace-tuning-phi-3"
DIGEST = f"sha256:{'1' * 64}"
RENDERER = RevisionRenderer(Request(place="pod"), JobOptions(image="example.com/tuner:1"))


@dataclass
class Running:
    """A controller in threads of this process."""

    controller: Controller
    thread: threading.Thread
    lines: list[dict[str, Any]]
    error: list[BaseException]

    def said(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["message"] == message]

    def stop(self) -> None:
        self.controller.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def page(self, path: str, *, metrics: bool = False) -> tuple[int, str]:
        port = self.controller.metrics_port if metrics else self.controller.health_port
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


Start = Callable[..., Running]


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    with FakeKubernetes(namespaces=("default", "other", "tuner-system"), workspaces=False) as fake:
        fake.put(custom_resource_definition())
        yield fake


@pytest.fixture
def api(cluster: FakeKubernetes, tmp_path: Path) -> Api:
    return connect(cluster, tmp_path)


def connect(cluster: FakeKubernetes, tmp_path: Path) -> Api:
    kubeconfig = cluster.write_kubeconfig(tmp_path / "kubeconfig")
    return Api.from_config(namespace="default", env={"KUBECONFIG": str(kubeconfig)}, patience_s=1)


@pytest.fixture
def start(cluster: FakeKubernetes, tmp_path: Path) -> Iterator[Start]:
    started: list[Running] = []

    def begin(*, settings: Settings | None = None, wait: bool = True, **options: Any) -> Running:
        lines: list[dict[str, Any]] = []
        error: list[BaseException] = []

        def log(level: str, message: str, **fields: Any) -> None:
            lines.append({"level": level, "message": message, **fields})

        defaults: dict[str, Any] = {
            "home": "tuner-system",
            "identity": f"controller-{len(started)}",
            "metrics_port": 0,
            "health_port": 0,
            "leader_election": False,
            "events_after_s": 0.05,
        }
        kubeconfig = cluster.write_kubeconfig(tmp_path / f"kubeconfig-{len(started)}")
        controller = Controller(
            Api.from_config(namespace="default", env={"KUBECONFIG": str(kubeconfig)}, patience_s=0.2),
            settings or Settings(RENDERER),
            ControllerOptions(**(defaults | options)),
            log=log,
        )

        def run() -> None:
            try:
                controller.run()
            except BaseException as raised:
                error.append(raised)

        running = Running(controller, threading.Thread(target=run, daemon=True), lines, error)
        started.append(running)
        running.thread.start()
        if wait:
            until(lambda: running.error or running.said("synced"))
        return running

    yield begin
    for running in started:
        running.controller.stop()
    for running in started:
        running.thread.join(10)


def until(holds: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        if time.monotonic() > deadline:
            raise AssertionError("it did not come to pass")
        time.sleep(0.02)
    return found


def documents(name: str = "quick_start_filled.yaml") -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((WORKSPACES / name).read_text()) if each]


def apply_quick_start(api: Api, namespace: str = "default", **changes: Any) -> None:
    for document in documents():
        document["metadata"] |= {"namespace": namespace} | (changes if document["kind"] == "Workspace" else {})
        api.create(document)


def status(cluster: FakeKubernetes, namespace: str = "default") -> dict[str, Any]:
    workspace = cluster.object("workspaces", NAME, namespace)
    return (workspace or {}).get("status") or {}


def condition(cluster: FakeKubernetes, kind: str, namespace: str = "default") -> tuple[str, str]:
    conditions = status(cluster, namespace).get("conditions") or ()
    return next(((each["status"], each["message"]) for each in conditions if each["type"] == kind), ("", ""))


def result(stage: str, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "exit_code": 0, "reason": "Completed", "message": "", "values": values}


def run_to_the_end(cluster: FakeKubernetes, namespace: str = "default") -> None:
    """The check Job, then the Job, as a kubelet would run them."""
    until(lambda: cluster.object("jobs", f"{NAME}--check", namespace))
    until(lambda: pods_of(cluster, f"{NAME}--check", namespace))
    cluster.run_job(f"{NAME}--check", namespace=namespace)
    until(lambda: cluster.object("jobs", NAME, namespace))
    until(lambda: pods_of(cluster, NAME, namespace))
    image = f"contoso.azurecr.io/adapters/phi-3@{DIGEST}"
    results = {NAME: (0, result("train", steps=9, loss=1.25)), "pusher": (0, result("push", image=image))}
    cluster.run_job(NAME, results, namespace)
    until(lambda: status(cluster, namespace).get("state") == "Succeeded")


def pods_of(cluster: FakeKubernetes, job: str, namespace: str = "default") -> list[dict[str, Any]]:
    return [it for it in cluster.objects("pods", namespace) if it["metadata"]["labels"].get("job-name") == job]


def printed(workspace: dict[str, Any]) -> list[str]:
    """A Workspace's row as `kubectl get workspace -o wide` prints it."""
    return [_cell(workspace, column["jsonPath"]) for column in COLUMNS if column["name"] != "Age"]


def _cell(value: Any, path: str) -> str:
    for part in re.findall(r"\.[A-Za-z]+|\[[^]]*\]", path):
        if part.startswith("["):
            wanted = re.fullmatch(r'\[\?\(@\.type=="(\w+)"\)\]', part)
            assert wanted, part
            value = next((each for each in value or () if each["type"] == wanted[1]), None)
        else:
            value = (value or {}).get(part[1:])
    return "" if value is None else str(value)


# ── the whole way ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_quick_start_is_applied_and_succeeds(
    cluster: FakeKubernetes, api: Api, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.cluster.reconcile.PROGRESS_EVERY_S", 0.0)
    start(progress_every_s=0.0)
    apply_quick_start(api)
    until(lambda: pods_of(cluster, f"{NAME}--check"))
    assert cluster.object("jobs", NAME) is None  # no GPU is asked for yet
    workspace = cluster.object("workspaces", NAME)
    assert workspace is not None
    assert workspace["metadata"]["annotations"]["workspace.kaito.io/revision"] == "1"
    cluster.run_job(f"{NAME}--check")

    job = until(lambda: cluster.object("jobs", NAME))
    config = next(it for it in cluster.objects("configmaps") if it["metadata"]["name"].startswith(f"{NAME}-config-"))
    assert config["immutable"] is True
    assert config["metadata"]["ownerReferences"][0]["uid"] == workspace["metadata"]["uid"]
    assert job["metadata"]["annotations"]["workspace.kaito.io/revision"] == "1"
    until(lambda: pods_of(cluster, NAME))
    cluster.unschedulable(NAME)
    until(lambda: "Insufficient nvidia.com/gpu" in condition(cluster, "JobStarted")[1])
    assert printed(cluster.object("workspaces", NAME) or {}) == [
        "Standard_NC24ads_A100_v4", "False", "", "False", "False", "1", "Pending", "", "",
    ]  # fmt: skip

    for container in ("preflight", "data-downloader"):
        cluster.start(NAME, container)
        until(lambda c=container: f"stage {'fetch' if c != 'preflight' else c}" in condition(cluster, "JobStarted")[1])
        cluster.finish(NAME, container, 0, result("preflight" if container == "preflight" else "fetch", files=1))
    until(lambda: status(cluster)["tuning"]["stage"] == "train")
    cluster.log(NAME, NAME, json.dumps(
        {"stage": "train", "task": "training", "done": 3, "total": 9, "unit": "steps", "loss": 1.5, "eta_s": 60}
    ))  # fmt: skip
    cluster.patch("pods", cluster.pod_of(NAME)["metadata"]["name"], {"metadata": {"labels": {"touched": "yes"}}})
    until(lambda: status(cluster)["tuning"].get("progressPercentage") == 33)
    assert status(cluster)["tuning"]["estimatedRemainingSeconds"] == 60
    assert printed(cluster.object("workspaces", NAME) or {}) == [
        "Standard_NC24ads_A100_v4", "True", "", "True", "False", "1", "Running", "33", "1.5",
    ]  # fmt: skip
    image = f"contoso.azurecr.io/adapters/phi-3@{DIGEST}"
    cluster.log(NAME, NAME, '{"stage": "push", "task": "pushing", "done": 0, "total": 1, "unit": "steps"}')
    cluster.patch("pods", cluster.pod_of(NAME)["metadata"]["name"], {"metadata": {"labels": {"touched": "again"}}})
    until(lambda: status(cluster)["tuning"]["stage"] == "push")
    assert status(cluster)["tuning"]["progressPercentage"] == 33
    assert "estimatedRemainingSeconds" not in status(cluster)["tuning"]
    cluster.say(NAME, "pusher", result("push", image=image))
    cluster.finish(NAME, NAME, 0, result("train", steps=9, loss=1.25))
    until(lambda: status(cluster)["state"] == "Succeeded")
    assert condition(cluster, "WorkspaceSucceeded") == ("True", f"workspace succeeds; pushed {image}")
    assert status(cluster)["tuning"]["artifact"] == {"image": image, "digest": DIGEST}
    assert printed(cluster.object("workspaces", NAME) or {}) == [
        "Standard_NC24ads_A100_v4", "True", "", "True", "True", "1", "Succeeded", "100", "1.25",
    ]  # fmt: skip
    about_it = [it for it in cluster.objects("events") if it["involvedObject"]["kind"] == "Workspace"]
    assert {"Note", "Waiting", "Running", "Succeeded"} == {event["reason"] for event in about_it}


def test_a_finished_workspace_costs_at_most_25_calls(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    running = start(progress="off")
    apply_quick_start(api)
    run_to_the_end(cluster)
    time.sleep(0.2)
    assert counted(running, "tuner_api_requests_total") <= 25


def test_a_restarted_controller_has_nothing_to_add(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    start()
    apply_quick_start(api)
    run_to_the_end(cluster)
    before = cluster.object("workspaces", NAME)
    running = start()
    until(lambda: counted(running, "tuner_reconciles_total") >= 1)
    assert counted(running, "tuner_api_requests_total") == 0
    assert cluster.object("workspaces", NAME) == before


def test_a_deleted_workspace_takes_everything_with_it(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    start()
    apply_quick_start(api)
    until(lambda: cluster.object("jobs", f"{NAME}--check"))
    api.delete(WORKSPACE, NAME)
    until(lambda: not cluster.objects("jobs") and not cluster.objects("controllerrevisions"))
    assert [it for it in cluster.objects("configmaps") if it["metadata"]["name"].startswith(f"{NAME}-config")] == []


def test_an_edited_config_map_begins_the_next_revision(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    start()
    apply_quick_start(api)
    first = until(lambda: cluster.object("jobs", f"{NAME}--check"))
    config = cluster.object("configmaps", "optimized-phi3-tuning")
    assert config is not None
    text = config["data"]["training_config.yaml"].replace("r: 8", "r: 4")
    cluster.patch("configmaps", "optimized-phi3-tuning", {"data": {"training_config.yaml": text}})
    second = until(
        lambda: (
            (it := cluster.object("jobs", f"{NAME}--check"))
            and it["metadata"]["uid"] != first["metadata"]["uid"]
            and it
        )
    )
    assert second["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"


def test_a_url_that_a_guard_refuses_is_refused_in_an_update_too(
    cluster: FakeKubernetes, api: Api, start: Start
) -> None:
    start()
    apply_quick_start(api)
    until(lambda: cluster.object("jobs", f"{NAME}--check"))
    cluster.patch("workspaces", NAME, {"tuning": {"input": {"urls": ["http://169.254.169.254/latest"]}}})
    until(lambda: "the change is not valid" in condition(cluster, "JobStarted")[1])
    assert "tuning.input.urls[0]" in condition(cluster, "JobStarted")[1]
    assert cluster.object("jobs", f"{NAME}--check") is not None


@pytest.mark.parametrize("method", ["QLoRA", "qlora"])
def test_the_method_is_read_in_any_case_with_the_administrators_default(
    cluster: FakeKubernetes, api: Api, start: Start, method: str
) -> None:
    text = "training_config:\n  LoraConfig:\n    r: 5\n  QuantizationConfig:\n    load_in_4bit: true\n"
    metadata = {"name": "qlora-params-template", "namespace": "tuner-system"}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
    cluster.put({**config, "data": {"training_config.yaml": text}})
    start()
    workspace = documents()[-1]
    workspace["tuning"]["method"] = method
    del workspace["tuning"]["config"]
    api.create(workspace)
    until(lambda: cluster.object("jobs", f"{NAME}--check"))
    made = next(it for it in cluster.objects("configmaps") if it["metadata"]["name"].startswith(f"{NAME}-config-"))
    assert json.loads(made["data"]["run.json"])["training"]["lora"]["r"] == 5


def test_an_unknown_preset_is_no_crash(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    running = start()
    workspace = documents()[-1]
    workspace["tuning"]["preset"]["name"] = "no-such-preset"
    api.create(documents()[0])
    api.create(workspace)
    until(lambda: "no-such-preset" in condition(cluster, "JobStarted")[1])
    assert cluster.objects("jobs") == ()
    assert not [line for line in running.lines if line["level"] == "error"]


# ── trouble on the wire ──────────────────────────────────────────────────────────────────────────────────────────────


def resets(cluster: FakeKubernetes) -> None:
    cluster.fail(path="(jobs|workspaces|configmaps|pods|controllerrevisions)", reset=True, times=4)


def resets_after(cluster: FakeKubernetes) -> None:
    cluster.fail("POST", reset=True, after=True, times=4)
    cluster.fail("PATCH", reset=True, after=True, times=4)


def errors(cluster: FakeKubernetes) -> None:
    cluster.fail(status=500, times=8)


def throttling(cluster: FakeKubernetes) -> None:
    cluster.fail("POST", status=429, times=3, reason="TooManyRequests", retry_after_s=0)
    cluster.fail("PATCH", status=429, times=3, reason="TooManyRequests", retry_after_s=0)


def gone(cluster: FakeKubernetes) -> None:
    cluster.expire()
    cluster.cut_watches()


def slow_watches(cluster: FakeKubernetes) -> None:
    cluster.watch_lag_s = 0.4


TROUBLE = (resets, resets_after, errors, throttling, gone, slow_watches)


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_on_the_wire_delays_and_changes_nothing(
    cluster: FakeKubernetes, api: Api, start: Start, trouble: Callable[[FakeKubernetes], None], monkeypatch: Any
) -> None:
    monkeypatch.setattr("tuner.cluster.watched._BACKOFF", Backoff(0.05, 0.5, jitter=0.5))
    start()
    trouble(cluster)
    for document in documents():
        until(lambda it=document: attempt(lambda: api.create(it)))
    trouble(cluster)
    run_to_the_end(cluster)
    assert [record["revision"] for record in cluster.objects("controllerrevisions") if not is_end(record)] == [1]
    until(lambda: [record["data"]["state"] for record in cluster.objects("controllerrevisions") if is_end(record)])
    assert [job["metadata"]["name"] for job in cluster.objects("jobs")] == [NAME, f"{NAME}--check"]
    assert {len(pods_of(cluster, job["metadata"]["name"])) for job in cluster.objects("jobs")} == {1}


def attempt(do: Callable[[], Any]) -> bool:
    from tuner.cluster.api_errors import AlreadyExistsError, ApiError

    try:
        do()
    except AlreadyExistsError:
        return True
    except ApiError:
        return False
    return True


def test_what_may_not_be_done_is_said_and_done_once_it_may(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    start()
    cluster.fail("POST", "/jobs", status=403, times=6, reason="Forbidden", message=(
        'jobs.batch "x" is forbidden: exceeded quota: jobs, requested: count/jobs.batch=1, used: 4, limited: 4'
    ))  # fmt: skip
    apply_quick_start(api)
    until(lambda: "last reconcile error" in condition(cluster, "JobStarted")[1])
    assert "exceeded quota" in condition(cluster, "JobStarted")[1]
    until(lambda: cluster.object("jobs", f"{NAME}--check"))
    until(lambda: "last reconcile error" not in condition(cluster, "JobStarted")[1])


def test_a_job_of_that_name_that_is_nobodys_is_said_and_left_alone(
    cluster: FakeKubernetes, api: Api, start: Start
) -> None:
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "example.com/x:1"}]}
    cluster.put(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": NAME, "namespace": "default"},
            "spec": {"template": {"spec": pod}},
        }
    )
    uid = (cluster.object("jobs", NAME) or {})["metadata"]["uid"]
    start(settings=Settings(RENDERER, check_job="never"))
    apply_quick_start(api)
    until(lambda: f"a Job '{NAME}' is there that this controller did not make" in condition(cluster, "JobStarted")[1])
    assert (cluster.object("jobs", NAME) or {})["metadata"]["uid"] == uid
    cluster.remove("jobs", NAME)
    until(lambda: (cluster.object("jobs", NAME) or {"metadata": {"uid": uid}})["metadata"]["uid"] != uid)
    until(lambda: "last reconcile error" not in condition(cluster, "JobStarted")[1])


def test_an_event_that_is_refused_keeps_nothing_else_from_being_done(
    cluster: FakeKubernetes, api: Api, start: Start
) -> None:
    cluster.fail("POST", "/events", status=422, times=100, reason="Invalid", message="note: Invalid value")
    start()
    apply_quick_start(api)
    run_to_the_end(cluster)
    assert not [it for it in cluster.objects("events") if it["involvedObject"]["kind"] == "Workspace"]


@pytest.mark.parametrize("ends", ["at once", "with 410"])
def test_a_watch_that_ends_at_once_is_not_asked_for_in_a_loop(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.cluster.watched._BACKOFF", Backoff(0.1, 0.5, jitter=0.5))
    watches: list[str] = []

    class HangsUp:
        def pages(self, *_: Any, **__: Any) -> Iterator[Listing]:
            yield Listing((), "1")

        def watch(self, *_: Any, **__: Any) -> Iterator[Any]:
            watches.append(ends)
            if ends == "with 410":
                raise GoneError("too old")
            return iter(())

    watched = Watched(cast(Api, HangsUp()), WORKSPACE, "default", heard=lambda *_: None, trim=lambda it: it)
    watched.start()
    time.sleep(0.5)
    watched.stop()
    assert 2 <= len(watches) <= 11


def test_a_bug_in_one_workspace_is_no_trouble_to_another(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    def render(workspace: Any, config_map: Any, revision: int, nodes: Any) -> Rendered:
        if workspace["metadata"]["namespace"] == "other":
            raise ZeroDivisionError
        return RENDERER(workspace, config_map, revision, nodes)

    running = start(settings=Settings(render))
    apply_quick_start(api, "other")
    until(lambda: counted(running, "tuner_reconciles_total", result="bug") >= 3)
    apply_quick_start(api)
    until(lambda: cluster.object("jobs", f"{NAME}--check"))
    line = running.said("reconcile")[0]
    assert (line["workspace"], line["error"]) == (f"other/{NAME}", "ZeroDivisionError()")


def test_a_missing_secret_is_found_in_events(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    running = start()
    apply_quick_start(api)
    until(lambda: pods_of(cluster, f"{NAME}--check"))
    cluster.schedule(f"{NAME}--check")
    pod = cluster.pod_of(f"{NAME}--check")
    note = 'MountVolume.SetUp failed for volume "docker-config" : secret "contoso-registry" not found'
    cluster.add_event(pod, "FailedMount", note)
    until(lambda: "checks run first" in condition(cluster, "JobStarted")[1])
    until(lambda: running.controller._queue.add(f"default/{NAME}") or note in condition(cluster, "JobStarted")[1])


def test_kaitos_crd_gets_the_figures_where_it_has_room(tmp_path: Path) -> None:
    crd = custom_resource_definition()
    del crd["metadata"]["labels"]
    for version in crd["spec"]["versions"]:
        del version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["tuning"]
    with FakeKubernetes(namespaces=("default", "tuner-system"), workspaces=False) as cluster:
        cluster.put(crd)
        for may_read_it in (True, False):
            if not may_read_it:
                cluster.deny("get", "customresourcedefinitions")
            controller = Controller(
                connect(cluster, tmp_path),
                Settings(RevisionRenderer(Request(place="pod"), JobOptions(image="example.com/tuner:1"))),
                ControllerOptions(
                    home="tuner-system", identity="x", metrics_port=0, health_port=0, leader_election=False
                ),
                log=lambda *_, **__: None,
            )
            thread = threading.Thread(target=controller.run, daemon=True)
            thread.start()
            api = connect(cluster, tmp_path)
            apply_quick_start(api)
            until(lambda: status(cluster).get("performance", {}).get("metrics", {}).get("revision"))
            assert status(cluster)["performance"]["metrics"]["revision"]["value"] == "1"
            run_to_the_end(cluster)
            controller.stop()
            thread.join(10)
            for document in documents():
                cluster.remove(
                    "workspaces" if document["kind"] == "Workspace" else "configmaps", document["metadata"]["name"]
                )
            until(lambda: not cluster.objects("jobs"))


# ── rights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def rules_of(file: str) -> list[dict[str, Any]]:
    found = [it["rules"] for it in yaml.safe_load_all((INSTALL / file).read_text()) if it and "rules" in it]
    assert found
    return [rule for rules in found for rule in rules]


def test_the_installed_rights_are_enough(cluster: FakeKubernetes, tmp_path: Path, start: Start) -> None:
    for document in documents():
        cluster.put({**document, "metadata": {**document["metadata"], "namespace": "default"}})
    cluster.allow_only(rules_of("cluster-role.yaml"))
    cluster.allow_only(rules_of("own-namespace-role.yaml"), "tuner-system")
    running = start(leader_election=True)
    run_to_the_end(cluster)
    assert not [line for line in running.lines if "may not" in str(line.get("error"))]


def test_the_rights_for_one_namespace_are_enough_for_it(cluster: FakeKubernetes, start: Start) -> None:
    for namespace in ("default", "other"):
        for document in documents():
            cluster.put({**document, "metadata": {**document["metadata"], "namespace": namespace}})
    cluster.allow_only(rules_of("namespace-role.yaml"), "default")
    cluster.allow_only(rules_of("own-namespace-role.yaml"), "tuner-system")
    running = start(leader_election=True, namespaces=("default",))
    run_to_the_end(cluster)
    assert cluster.objects("jobs", "other") == ()
    assert not [line for line in running.lines if line["level"] != "info"]


def test_a_selector_leaves_the_others_alone(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    start(selector="team=a")
    apply_quick_start(api, "other")
    apply_quick_start(api, labels={"team": "a"})
    until(lambda: cluster.objects("jobs", "default"))
    assert cluster.objects("jobs", "other") == ()


# ── beside KAITO ─────────────────────────────────────────────────────────────────────────────────────────────────────


def kaito_deployment(replicas: int) -> dict[str, Any]:
    container = {"name": "workspace", "image": "mcr.microsoft.com/aks/kaito/workspace:0.12.0"}
    labels = {"app": "kaito"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "kaito-workspace", "namespace": "other"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


WEBHOOK = {
    "apiVersion": "admissionregistration.k8s.io/v1",
    "kind": "ValidatingWebhookConfiguration",
    "metadata": {"name": "validation.workspace.kaito.sh"},
}


@pytest.mark.parametrize("there", [WEBHOOK, kaito_deployment(1)])
def test_beside_kaito_it_does_not_start_and_says_what_to_do(cluster: FakeKubernetes, start: Start, there: Any) -> None:
    cluster.put(there)
    running = start()
    (error,) = running.error
    assert isinstance(error, ConfigError)
    assert there["metadata"]["name"] in error.message
    assert error.hint is not None
    assert "tuner submit" in error.hint


def test_a_kaito_that_was_scaled_to_nothing_is_no_hindrance(cluster: FakeKubernetes, start: Start) -> None:
    cluster.put(kaito_deployment(0))
    assert start().said("synced")


# ── several controllers ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_second_takes_over_when_the_first_ends(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    first = start(leader_election=True)
    second = start(leader_election=True, wait=False)
    until(lambda: hasattr(second.controller, "health_port"))
    assert second.page("/readyz") == (200, "waiting for the lease\n")
    apply_quick_start(api)
    until(lambda: cluster.object("jobs", f"{NAME}--check"))
    assert not second.said("created")
    first.stop()
    lease = cluster.object("leases", LEASE_NAME, "tuner-system")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] in ("", "controller-1")
    until(lambda: second.said("synced"))
    run_to_the_end(cluster)
    assert second.said("created")


def leadership(api: Api, identity: str, lost: list[str]) -> Leadership:
    return Leadership(
        api,
        "tuner-system",
        "lease",
        identity,
        lambda *_, **__: None,
        on_lost=lambda: lost.append(identity),
        duration_s=1.0,
        renew_within_s=0.6,
        retry_s=0.1,
    )


def test_a_leader_that_cannot_renew_ends_before_another_may_begin(cluster: FakeKubernetes, api: Api) -> None:
    lost: list[str] = []
    first, second = leadership(api, "a", lost), leadership(api, "b", lost)
    assert first.wait(threading.Event())
    assert first.is_ours
    assert not second._try()
    cluster.fail("PUT", "leases", status=500, times=1000)
    until(lambda: lost == ["a"], 5)
    assert not first.is_ours
    assert not second._try()  # its time is not over yet
    cluster._faults.clear()
    assert second.wait(threading.Event())
    assert cluster.object("leases", "lease", "tuner-system")["spec"]["leaseTransitions"] == 1  # type: ignore[index]
    second.release()
    assert cluster.object("leases", "lease", "tuner-system")["spec"]["holderIdentity"] == ""  # type: ignore[index]


def test_two_that_ask_at_once_are_one_leader(cluster: FakeKubernetes, api: Api) -> None:
    contenders = [leadership(api, str(number), []) for number in range(8)]
    won: list[bool] = []
    barrier = threading.Barrier(len(contenders))

    def ask(each: Leadership) -> None:
        barrier.wait()
        won.append(each._try())

    threads = [threading.Thread(target=ask, args=(each,)) for each in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won.count(True) == 1


@pytest.mark.parametrize("kaitos", [False, True])
@pytest.mark.parametrize("crd_is_readable", [False, True])
def test_conditions_of_others_stay_whether_or_not_the_crd_calls_them_a_map(
    cluster: FakeKubernetes, api: Api, start: Start, kaitos: bool, crd_is_readable: bool
) -> None:
    crd = custom_resource_definition()
    if kaitos:
        for version in crd["spec"]["versions"]:
            conditions = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["conditions"]
            for key in ("x-kubernetes-list-type", "x-kubernetes-list-map-keys"):
                del conditions[key]
        cluster.remove("customresourcedefinitions", "workspaces.kaito.sh")
        cluster.put(crd)
    if not crd_is_readable:
        cluster.fail("GET", "customresourcedefinitions", status=403, reason="Forbidden", times=1000)
    apply_quick_start(api)
    theirs = {"type": "Billed", "status": "True", "reason": "r", "message": "m", "observedGeneration": 1}
    theirs["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    billing = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": NAME, "namespace": "default"},
    }
    api.apply({**billing, "status": {"conditions": [theirs]}}, field_manager="billing", subresource="status")
    start(progress="off")
    run_to_the_end(cluster)
    until(lambda: status(cluster)["state"] == "Succeeded")
    found = {each["type"]: each for each in status(cluster)["conditions"]}
    assert found["Billed"] == theirs
    assert found["WorkspaceSucceeded"]["status"] == "True"
    assert len(found) == len(status(cluster)["conditions"]) == 6


@pytest.mark.parametrize("conflicts", [1, 7])
def test_a_conflict_is_read_again_and_ends_nothing(cluster: FakeKubernetes, api: Api, conflicts: int) -> None:
    """Somebody annotated the lease, or an answer was lost and the write repeated: it is still ours."""
    lost: list[str] = []
    leader = leadership(api, "one", lost)
    assert leader.wait(threading.Event())
    renewed = cluster.object("leases", "lease", "tuner-system")["spec"]["renewTime"]
    cluster.fail("PUT", "leases", status=409, reason="Conflict", times=conflicts)
    until(lambda: cluster.object("leases", "lease", "tuner-system")["spec"]["renewTime"] > renewed)
    assert (lost, leader.is_ours) == ([], True)
    leader.release()


def test_a_conflict_with_another_leader_ends_at_once(cluster: FakeKubernetes, api: Api) -> None:
    lost: list[str] = []
    leader = leadership(api, "one", lost)
    assert leader.wait(threading.Event())
    renewed = {"holderIdentity": "two", "renewTime": "2099-01-01T00:00:00.000000Z"}
    cluster.patch("leases", "lease", {"spec": renewed}, "tuner-system")
    until(lambda: lost == ["one"])


def test_nothing_is_written_without_the_lease(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    running = start(leader_election=True)
    running.controller._leadership._renewed_at = time.monotonic() - 100  # a process that was stopped for long
    running.controller._leadership._stop.set()
    apply_quick_start(api)
    until(lambda: counted(running, "tuner_reconciles_total", result="again") >= 2)
    assert cluster.objects("jobs") == ()


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pages_for_the_kubelet_and_prometheus(cluster: FakeKubernetes, api: Api, start: Start) -> None:
    running = start()
    apply_quick_start(api)
    until(lambda: status(cluster).get("state") == "Pending")
    assert running.page("/healthz") == (200, "ok\n")
    assert running.page("/readyz") == (200, "ok\n")
    assert running.page("/nothing")[0] == 404
    code, text = until(
        lambda: (page := running.page("/metrics", metrics=True)) and 'state="Pending"' in page[1] and page
    )
    assert code == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: (family.type, labels(family)) for name, family in families.items() if name.startswith("tuner_")} == {
        "tuner_reconciles": ("counter", {"result"}),
        "tuner_reconcile_seconds": ("histogram", {"le"}),
        "tuner_queue_seconds": ("histogram", {"le"}),
        "tuner_api_requests": ("counter", {"action"}),
        "tuner_api_errors": ("counter", set()),  # none yet
        "tuner_queue_depth": ("gauge", set()),
        "tuner_workspaces": ("gauge", {"state"}),
        "tuner_watch_age_seconds": ("gauge", {"kind"}),
        "tuner_is_leader": ("gauge", set()),
    }
    assert sample(families["tuner_reconciles"], result="done") >= 1
    assert sample(families["tuner_workspaces"], state="Pending") == 1
    assert sample(families["tuner_is_leader"]) == 1
    assert sample(families["tuner_watch_age_seconds"], kind="jobs") >= 0
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6


def labels(family: Metric) -> set[str]:
    return {name for each in family.samples for name in each.labels}


def sample(family: Metric, **labels: str) -> float:
    (value,) = [each.value for each in family.samples if each.labels == labels]
    return value


def counted(running: Running, name: str, **labels: str) -> float:
    """The sum of a counter over all that have these labels."""
    samples = [each for family in running.controller.metrics.registry.collect() for each in family.samples]
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


def test_two_controllers_in_one_process_count_for_themselves() -> None:
    one, other = Metrics(), Metrics()
    one.reconciles.labels(result="done").inc()
    assert 'tuner_reconciles_total{result="done"} 1.0' in metrics_text(one, Gauges())
    assert "tuner_reconciles_total{" not in metrics_text(other, Gauges())


def test_it_is_not_ready_before_it_has_seen_everything(cluster: FakeKubernetes, start: Start) -> None:
    cluster.deny("list", "jobs")
    running = start(wait=False)
    until(lambda: hasattr(running.controller, "health_port"))
    code, _ = until(lambda: (page := running.page("/readyz")) and "may not list jobs" in page[1] and page)
    assert code == 503
    assert running.page("/healthz")[0] == 200


# ── the queue ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_in_the_queue_once_and_with_one_worker_at_a_time() -> None:
    queue = WorkQueue()
    for _ in range(3):
        queue.add("a")
    assert len(queue) == 1
    taken = queue.take(0)
    assert taken is not None
    queue.add("a")  # while somebody has it
    assert queue.take(0) is None
    queue.done("a")
    again = queue.take(0)
    assert again is not None
    assert again[0] == "a"


def test_a_key_that_fails_waits_twice_as_long_each_time_up_to_five_minutes() -> None:
    queue = WorkQueue()
    waits = []
    for _ in range(20):
        queue._at_work.add("a")
        waits.append(queue.failed("a"))
    assert waits[:3] == [0.005, 0.01, 0.02]
    assert waits[-1] == 300.0
    queue.done("a")
    assert queue.failed("a") == 0.005
    assert queue.failed("a", at_least_s=7.0) == 7.0


def test_the_sooner_of_two_times_holds() -> None:
    queue = WorkQueue()
    queue.add("a", 60)
    queue.add("a", 0.01)
    queue.add("a", 30)
    taken = queue.take(5)
    assert taken is not None
    assert taken[1] < 1
    queue.done("a")
    assert queue.take(0.05) is None


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sigterm_gives_the_lease_back_and_ends_with_0(cluster: FakeKubernetes, api: Api, tmp_path: Path) -> None:
    kubeconfig = cluster.write_kubeconfig(tmp_path / "process", namespace="tuner-system")
    command = [sys.executable, "-m", "tuner", "controller", "--image", "example.com/tuner:1"]
    process = subprocess.Popen(
        [*command, "--metrics-port", "0", "--health-port", "0"],
        env={**os.environ, "KUBECONFIG": str(kubeconfig), "POD_NAMESPACE": "tuner-system", "POD_NAME": "pod-1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        apply_quick_start(api)
        until(lambda: cluster.object("jobs", f"{NAME}--check"), 30)
        lease = cluster.object("leases", LEASE_NAME, "tuner-system")
        assert lease is not None
        assert lease["spec"]["holderIdentity"].startswith("pod-1_")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert all(isinstance(json.loads(line), dict) for line in said.splitlines())
    lease = cluster.object("leases", LEASE_NAME, "tuner-system")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == ""


def test_the_installed_deployment_gives_flags_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    deployment = yaml.safe_load((INSTALL / "deployment.yaml").read_text())
    command, *flags = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert main([command, *flags, "--namespace=team", "--allow-cidr=10.0.0.0/8", "--check-job=perhaps"]) == 64
    assert "--check-job perhaps: must be auto, always or never" in capsys.readouterr().err


def test_the_controller_needs_no_data_or_training_library() -> None:
    heavy = "torch transformers datasets pyarrow numpy httpx2 huggingface_hub rich"
    code = (
        "import sys, tuner.cluster.controller, tuner.cluster.revision; "
        f"print([name for name in {heavy!r}.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
