"""The fake API server holds what the tests of the cluster package rely on."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fake_kubernetes import FakeKubernetes
from tuner.cluster.api import (
    ALL_NAMESPACES,
    CONFIG_MAP,
    CUSTOM_RESOURCE_DEFINITION,
    EVENT,
    JOB,
    NODE,
    POD,
    SECRET,
    WORKSPACE,
    Api,
    WatchEvent,
)
from tuner.cluster.api_errors import (
    AlreadyExistsError,
    ApiError,
    BadRequestError,
    ConflictError,
    ForbiddenError,
    GoneError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    with FakeKubernetes() as fake:
        yield fake


@pytest.fixture
def api(cluster: FakeKubernetes, tmp_path: Path) -> Api:
    return api_of(cluster, tmp_path)


def api_of(cluster: FakeKubernetes, folder: Path, **settings: Any) -> Api:
    path = cluster.write_kubeconfig(folder / "kubeconfig")
    return Api.from_config(env={"KUBECONFIG": str(path)}, **settings)


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def workspace(name: str = "tune") -> dict[str, Any]:
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name},
        "resource": {"labelSelector": {"matchLabels": {"apps": "phi"}}},
        "tuning": {"preset": {"name": "phi-3-mini-4k-instruct"}},
    }


def apply_status(api: Api, name: str, status: dict[str, Any], **how: Any) -> None:
    """A server-side apply of the status as a whole."""
    manifest = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": name}, "status": status}
    api.apply(manifest, api.namespace, subresource="status", **how)


def job(name: str = "tune", **spec: Any) -> dict[str, Any]:
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onPodConditions": [],
            "onExitCodes": {"containerName": "tune", "operator": "In", "values": [65, 78]},
        },
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"kaito.sh/workspace": name}},
        "spec": {
            "backoffLimit": 1,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": {"kaito.sh/workspace": name}},
                "spec": {
                    "restartPolicy": "Never",
                    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                    "initContainers": [{"name": "preflight", "image": "i", "securityContext": restricted}],
                    "containers": [
                        {"name": "tune", "image": "i", "securityContext": restricted},
                        {"name": "pusher", "image": "i", "securityContext": restricted},
                    ],
                },
            },
            **spec,
        },
    }


def collected(events: Iterator[WatchEvent]) -> tuple[list[WatchEvent], threading.Thread]:
    found: list[WatchEvent] = []

    def collect() -> None:
        with suppress(UnavailableError):  # the server goes before the watch ends
            found.extend(events)

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    return found, thread


def until(condition: Any, seconds: float = 5.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come true"
        time.sleep(0.005)


def condition_of(manifest: dict[str, Any] | None, type_: str) -> dict[str, Any]:
    assert manifest is not None
    return next((one for one in manifest["status"].get("conditions", ()) if one["type"] == type_), {})


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_object_of_the_name_is_refused(api: Api) -> None:
    api.create(config_map("a", x="1"))
    with pytest.raises(AlreadyExistsError) as caught:
        api.create(config_map("a", x="2"))
    assert "is being deleted" not in caught.value.server_message
    assert api.get(CONFIG_MAP, "a")["data"] == {"x": "1"}
    assert api.create_once(config_map("a", x="2")) is None


def test_a_list_has_pages_and_gives_each_item_its_kind(api: Api, cluster: FakeKubernetes) -> None:
    for number in range(1201):
        cluster.put(config_map(f"c{number:04}"))
    cluster.put({**config_map("elsewhere"), "metadata": {"name": "elsewhere", "namespace": "kube-system"}})
    items = api.list(CONFIG_MAP).items
    assert [item["metadata"]["name"] for item in items] == [f"c{number:04}" for number in range(1201)]
    assert items[0]["kind"] == "ConfigMap"
    assert len(api.list(CONFIG_MAP, ALL_NAMESPACES).items) == 1202
    assert cluster.calls[("list", "configmaps")] == 6


def test_selectors(api: Api, cluster: FakeKubernetes) -> None:
    for name, labels in (("a", {"x": "1"}), ("b", {"x": "2", "y": "1"}), ("c", {})):
        cluster.put({**config_map(name), "metadata": {"name": name, "labels": labels}})

    def names(selector: str) -> list[str]:
        return [item["metadata"]["name"] for item in api.list(CONFIG_MAP, label_selector=selector).items]

    assert names("x=1") == ["a"]
    assert names("x") == ["a", "b"]
    assert names("!x") == ["c"]
    assert names("x!=1") == ["b", "c"]
    assert names("x in (1,2),y") == ["b"]
    assert names("x notin (1)") == ["b", "c"]
    assert [item["metadata"]["name"] for item in api.list(CONFIG_MAP, field_selector="metadata.name=b").items] == ["b"]
    with pytest.raises(BadRequestError, match="is not a known field selector"):
        api.list(CONFIG_MAP, field_selector="data.x=1")


def test_unknown_fields_are_refused_when_strict_and_named(api: Api) -> None:
    bad = job()
    bad["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(BadRequestError, match=r"spec\.template\.spec\.containers\[0\]\.imagePullPolice"):
        api.create(bad)
    api.create(bad, strict=False)


def test_a_value_of_the_wrong_type_is_refused(api: Api) -> None:
    with pytest.raises(BadRequestError, match="cannot unmarshal"):
        api.create(job(backoffLimit="three"))


def test_a_dry_run_checks_all_and_changes_nothing(api: Api, cluster: FakeKubernetes) -> None:
    assert api.create(job(), dry_run=True)["metadata"]["uid"]
    assert api.find(JOB, "tune") is None
    assert cluster.objects("pods") == ()
    with pytest.raises(InvalidError):
        api.create(job("Tune"), dry_run=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one["metadata"].update(name="a" * 64), "63"),
        (lambda one: one["metadata"].update(name="a_b"), "RFC 1123"),
        (lambda one: one["spec"]["template"]["spec"].update(restartPolicy="OnFailure"), 'only "Never"'),
        (lambda one: one["spec"].update(podReplacementPolicy="TerminatingOrFailed"), "podReplacementPolicy"),
        (lambda one: one["spec"]["template"]["spec"]["containers"][0].update(name="Tune"), "RFC 1123"),
        (lambda one: one["spec"]["template"]["spec"].update(volumes=[{"name": "a.b"}]), "dots"),
        (
            lambda one: one["spec"]["template"]["spec"]["containers"][0].update(
                volumeMounts=[{"name": "none", "mountPath": "/a"}]
            ),
            "Not found",
        ),
        (
            lambda one: one["spec"]["template"]["spec"]["containers"][0].update(
                resources={"limits": {"nvidia.com/gpu": "2"}, "requests": {"nvidia.com/gpu": "1"}}
            ),
            "equal to nvidia.com/gpu limit",
        ),
        (
            lambda one: one["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"].update(containerName="x"),
            "container or initContainer names",
        ),
        (
            lambda one: one["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[78, 65]),
            "ordered",
        ),
    ],
)
def test_what_a_real_server_refuses_of_a_job(api: Api, change: Any, says: str) -> None:
    bad = job()
    change(bad)
    with pytest.raises(InvalidError, match=says):
        api.create(bad)


def test_immutable_fields(api: Api) -> None:
    api.create(job())
    made = api.get(JOB, "tune")
    made["spec"]["template"]["spec"]["containers"][0]["image"] = "other"
    with pytest.raises(InvalidError, match=r"spec\.template\.spec: .*immutable"):
        api.replace(made)
    api.create({**config_map("a", x="1"), "immutable": True})
    with pytest.raises(InvalidError, match="immutable"):
        api.patch(CONFIG_MAP, "a", {"data": {"x": "2"}})


def test_a_write_with_an_old_version_is_a_conflict(api: Api) -> None:
    old = api.create(config_map("a", x="1"))
    api.patch(CONFIG_MAP, "a", {"data": {"x": "2"}})
    with pytest.raises(ConflictError):
        api.replace({**old, "data": {"x": "3"}})
    with pytest.raises(ConflictError):
        api.delete(CONFIG_MAP, "a", uid="another")
    api.delete(CONFIG_MAP, "a", uid=old["metadata"]["uid"])


def test_an_update_that_changes_nothing_is_no_event(api: Api) -> None:
    made = api.create(config_map("a", x="1"))
    assert api.replace(made)["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_status_is_a_subresource_and_the_spec_counts_generations(api: Api) -> None:
    made = api.create({**workspace(), "status": {"state": "Running"}})
    assert "status" not in made
    assert made["metadata"]["generation"] == 1
    apply_status(api, "tune", {"state": "Pending"})
    api.patch(WORKSPACE, "tune", {"status": {"state": "Lost"}, "tuning": {"method": "qlora"}})
    found = api.get(WORKSPACE, "tune")
    assert found["status"] == {"state": "Pending"}
    assert found["metadata"]["generation"] == 2


def test_applied_status_belongs_to_its_manager(api: Api) -> None:
    api.create(workspace())
    mine = [{"type": "A", "status": "True"}, {"type": "B", "status": "True"}]
    apply_status(api, "tune", {"conditions": mine, "state": "Running"})
    apply_status(api, "tune", {"conditions": [{"type": "C", "status": "True"}]}, field_manager="another")
    apply_status(api, "tune", {"conditions": mine[:1]})
    status = api.get(WORKSPACE, "tune")["status"]
    assert [one["type"] for one in status["conditions"]] == ["A", "C"]
    assert "state" not in status
    with pytest.raises(ConflictError, match="another"):
        api.apply(
            {**workspace(), "status": {"conditions": [{"type": "C", "status": "False"}]}},
            force=False,
            subresource="status",
        )


def test_a_namespace_that_is_missing_or_goes_is_said(api: Api, cluster: FakeKubernetes) -> None:
    with pytest.raises(NotFoundError, match="there is no namespace nowhere"):
        api.create(config_map("a"), "nowhere")
    cluster.patch(
        "namespaces", "default", {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["x"]}}
    )
    with pytest.raises(RefusedError, match="is being deleted"):
        api.create(config_map("a"))


def test_secrets_are_unreadable_unless_granted(api: Api, cluster: FakeKubernetes) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}}
    api.create(secret)
    with pytest.raises(ForbiddenError, match=r"may not get secrets in namespace default") as caught:
        api.get(SECRET, "s")
    assert '- {apiGroups: [""], resources: [secrets], verbs: [get]}' in (caught.value.hint or "")
    cluster.allow_secrets("get")
    assert api.get(SECRET, "s")["data"] == {"a": "Yg=="}


def test_only_what_the_rules_allow(api: Api, cluster: FakeKubernetes) -> None:
    cluster.allow_only([{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "create"]}], "default")
    api.create(job())
    with pytest.raises(ForbiddenError):
        api.delete(JOB, "tune")
    with pytest.raises(ForbiddenError):
        api.get(JOB, "tune", "kube-system")
    with pytest.raises(ForbiddenError):
        api.list(NODE)


def test_a_crd_prunes_defaults_and_validates(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "required": ["tuning"],
        "properties": {
            "tuning": {
                "type": "object",
                "properties": {"method": {"type": "string", "enum": ["lora"]}, "n": {"type": "integer", "default": 1}},
            },
            "status": {"type": "object", "properties": {"state": {"type": "string"}}},
        },
    }
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "workspaces.kaito.sh"},
        "spec": {
            "group": "kaito.sh",
            "scope": "Namespaced",
            "names": {"plural": "workspaces", "kind": "Workspace"},
            "versions": [
                {
                    "name": "v1beta1",
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }
    with FakeKubernetes(workspaces=False) as cluster:
        api = api_of(cluster, tmp_path)
        assert not api.serves(WORKSPACE)
        with pytest.raises(NotFoundError, match=r"does not know workspaces\.kaito\.sh"):
            api.list(WORKSPACE)
        api.create(crd, strict=False)
        assert (
            condition_of(api.get(CUSTOM_RESOURCE_DEFINITION, "workspaces.kaito.sh"), "Established")["status"] == "True"
        )
        assert api.serves(WORKSPACE)
        plain = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "a"}}
        with pytest.raises(BadRequestError, match=r"tuning\.methd"):
            api.create({**plain, "tuning": {"methd": "lora"}})
        with pytest.raises(InvalidError, match=r"tuning\.method"):
            api.create({**plain, "tuning": {"method": "dora"}})
        assert api.create({**plain, "tuning": {}})["tuning"] == {"n": 1}
        apply_status(api, "a", {"state": "Running"})
        assert api.get(WORKSPACE, "a")["status"] == {"state": "Running"}


# ── watches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_watch_hears_all_after_its_version_and_a_bookmark_at_its_end(api: Api) -> None:
    before = api.list(CONFIG_MAP).resource_version
    api.create(config_map("a"))
    api.patch(CONFIG_MAP, "a", {"data": {"x": "1"}})
    events, thread = collected(api.watch(CONFIG_MAP, before, timeout_s=1))
    until(lambda: len(events) == 2)
    api.delete(CONFIG_MAP, "a")
    thread.join(5)
    assert [event.kind for event in events] == ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    assert events[0].object["kind"] == "ConfigMap"
    assert events[2].object["metadata"]["resourceVersion"] > events[1].object["metadata"]["resourceVersion"]


def test_an_object_that_stops_matching_a_selector_is_deleted_to_that_watch(api: Api) -> None:
    before = api.list(CONFIG_MAP).resource_version
    api.create({**config_map("a"), "metadata": {"name": "a", "labels": {"x": "1"}}})
    api.create(config_map("b"))
    api.patch(CONFIG_MAP, "a", {"metadata": {"labels": {"x": "2"}}})
    events = list(api.watch(CONFIG_MAP, before, label_selector="x=1", timeout_s=1))
    assert [event.kind for event in events] == ["ADDED", "DELETED", "BOOKMARK"]


def test_a_version_that_is_forgotten_is_gone(api: Api, cluster: FakeKubernetes) -> None:
    before = api.list(CONFIG_MAP).resource_version
    api.create(config_map("a"))
    cluster.expire("configmaps")
    with pytest.raises(GoneError, match="too old resource version"):
        list(api.watch(CONFIG_MAP, before, timeout_s=1))


def test_a_cut_watch_says_so_and_can_be_taken_up(api: Api, cluster: FakeKubernetes) -> None:
    before = api.list(CONFIG_MAP).resource_version
    errors: list[ApiError] = []

    def follow() -> None:
        try:
            list(api.watch(CONFIG_MAP, before, timeout_s=30))
        except ApiError as error:
            errors.append(error)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    until(lambda: cluster._streams)
    cluster.cut_watches()
    thread.join(5)
    assert [error.exit_code for error in errors] == [69]
    api.create(config_map("a"))
    assert [event.kind for event in api.watch(CONFIG_MAP, before, timeout_s=1)] == ["ADDED", "BOOKMARK"]


# ── deletion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def owned_by(owner: dict[str, Any], name: str) -> dict[str, Any]:
    metadata = owner["metadata"]
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
    }
    return {**config_map(name), "metadata": {"name": name, "ownerReferences": [reference]}}


def test_what_an_object_owns_goes_with_it(api: Api) -> None:
    owner = api.create(config_map("owner"))
    api.create(owned_by(owner, "owned"))
    api.create(config_map("free"))
    api.create(config_map("later"))
    api.patch(CONFIG_MAP, "later", {"metadata": owned_by(owner, "later")["metadata"]})
    api.delete(CONFIG_MAP, "owner")
    assert [item["metadata"]["name"] for item in api.list(CONFIG_MAP).items] == ["free"]


def test_an_orphaned_object_stays(api: Api) -> None:
    owner = api.create(config_map("owner"))
    api.create(owned_by(owner, "owned"))
    api.delete(CONFIG_MAP, "owner", propagation="Orphan")
    assert api.get(CONFIG_MAP, "owned")["metadata"]["ownerReferences"] == []


def test_an_object_whose_owner_is_not_there_is_collected(api: Api) -> None:
    api.create(owned_by({**config_map("x"), "metadata": {"name": "x", "uid": "never-was"}}, "owned"))
    assert api.find(CONFIG_MAP, "owned") is None


def test_a_foreground_deletion_takes_time_and_the_name_is_taken_meanwhile(api: Api, cluster: FakeKubernetes) -> None:
    cluster.termination_s = 0.3
    api.create(job())
    cluster.start("tune", "preflight")
    api.delete(JOB, "tune", propagation="Foreground")
    assert api.get(JOB, "tune")["metadata"]["deletionTimestamp"]
    with pytest.raises(AlreadyExistsError) as caught:
        api.create(job())
    assert "object is being deleted" in caught.value.server_message
    until(lambda: api.find(JOB, "tune") is None)
    assert api.list(POD).items == ()


# ── Jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_gets_a_pod_and_succeeds_with_it(api: Api, cluster: FakeKubernetes) -> None:
    api.create(job())
    pod = cluster.pod_of("tune")
    assert pod["status"]["phase"] == "Pending"
    assert pod["metadata"]["labels"]["kaito.sh/workspace"] == "tune"
    cluster.schedule("tune")
    cluster.start("tune", "preflight")
    cluster.finish("tune", "preflight")
    assert cluster.pod_of("tune")["status"]["phase"] == "Running"
    found = api.get(JOB, "tune")["status"]
    assert (found["active"], found["ready"]) == (1, 1)
    cluster.finish("tune", "tune")
    cluster.finish("tune", "pusher", 0, {"stage": "push"})
    assert condition_of(api.get(JOB, "tune"), "Complete")["status"] == "True"
    assert (
        cluster.pod_of("tune")["status"]["containerStatuses"][1]["state"]["terminated"]["message"]
        == '{"stage": "push"}'
    )


def test_a_sidecar_is_not_waited_for_and_ends_with_its_pod(api: Api, cluster: FakeKubernetes) -> None:
    with_sidecar = job()
    spec = with_sidecar["spec"]["template"]["spec"]
    spec["initContainers"].append({**spec["initContainers"][0], "name": "side", "restartPolicy": "Always"})
    spec["containers"] = spec["containers"][:1]
    api.create(with_sidecar)
    cluster.finish("tune", "preflight")
    pod = cluster.pod_of("tune")["status"]
    states = [each["state"] for each in (*pod["initContainerStatuses"], *pod["containerStatuses"])]
    assert [next(iter(state)) for state in states] == ["terminated", "running", "running"]
    with pytest.raises(AssertionError, match="starts it again"):
        cluster.finish("tune", "side")
    cluster.say("tune", "side", {"stage": "push"})
    cluster.finish("tune", "tune")
    assert condition_of(api.get(JOB, "tune"), "Complete")["status"] == "True"
    assert cluster.pod_of("tune")["status"]["initContainerStatuses"][1]["state"]["terminated"]["message"] == (
        '{"stage": "push"}'
    )


def test_a_fatal_exit_code_fails_the_job_at_once(api: Api, cluster: FakeKubernetes) -> None:
    api.create(job(backoffLimit=3))
    cluster.run_job("tune", {"tune": (78, "bad")})
    failed = condition_of(api.get(JOB, "tune"), "Failed")
    assert failed["reason"] == "PodFailurePolicy"
    assert "failed with exit code 78 matching FailJob rule at index 1" in failed["message"]


def test_other_exit_codes_are_retried_until_the_limit(api: Api, cluster: FakeKubernetes) -> None:
    api.create(job())
    first = cluster.pod_of("tune")["metadata"]["name"]
    cluster.run_job("tune", {"tune": (1, "")})
    assert cluster.pod_of("tune")["metadata"]["name"] != first
    assert api.get(JOB, "tune")["status"]["failed"] == 1
    cluster.run_job("tune", {"preflight": (137, "")})
    assert condition_of(api.get(JOB, "tune"), "Failed")["reason"] == "BackoffLimitExceeded"


def test_an_evicted_pod_is_replaced_when_it_is_gone_and_does_not_count(api: Api, cluster: FakeKubernetes) -> None:
    api.create(job())
    cluster.start("tune", "preflight")
    first = cluster.pod_of("tune")["metadata"]["name"]
    cluster.evict("tune")
    assert len(cluster.objects("pods")) == 1
    until(lambda: [pod["metadata"]["name"] for pod in cluster.objects("pods")] not in ([first], []))
    until(lambda: len(cluster.objects("pods")) == 1)
    assert "failed" not in api.get(JOB, "tune")["status"]


def test_a_suspended_job_has_no_pod_and_goes_on_when_resumed(tmp_path: Path) -> None:
    with FakeKubernetes(kueue=True) as cluster:
        api = api_of(cluster, tmp_path)
        queued = job()
        queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpu"
        api.create(queued)
        assert cluster.objects("pods") == ()
        assert condition_of(api.get(JOB, "tune"), "Suspended")["status"] == "True"
        api.patch(JOB, "tune", {"spec": {"suspend": False}})
        cluster.start("tune", "preflight")
        api.patch(JOB, "tune", {"spec": {"suspend": True}})
        until(lambda: cluster.objects("pods") == ())
        assert "failed" not in api.get(JOB, "tune")["status"]


def test_pod_security_and_quota_show_as_events(api: Api, cluster: FakeKubernetes) -> None:
    cluster.patch(
        "namespaces", "default", {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    )
    api.create(job("clean"))
    assert cluster.pod_of("clean")
    root = job("root")
    del root["spec"]["template"]["spec"]["securityContext"]
    api.create(root)
    cluster.refuse_pods["default"] = "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: 0, limited: 0"
    api.create(job("quota"))
    said = {event["involvedObject"]["name"]: event["message"] for event in api.list(EVENT).items}
    assert set(said) == {"root", "quota"}
    assert 'violates PodSecurity "restricted:latest": runAsNonRoot != true' in said["root"]
    assert "exceeded quota: gpus" in said["quota"]


# ── logs, events, scale ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_followed_log_goes_on_until_its_container_ends(api: Api, cluster: FakeKubernetes) -> None:
    api.create(job())
    name = cluster.pod_of("tune")["metadata"]["name"]
    with pytest.raises(BadRequestError, match="is waiting to start"):
        api.logs(name, "tune")
    cluster.finish("tune", "preflight")
    cluster.log("tune", "tune", "one", "two")
    assert api.logs(name, "tune", tail_lines=1) == "two\n"
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(api.follow_logs(name, "tune")), daemon=True)
    thread.start()
    until(lambda: lines == ["one", "two"])
    cluster.log("tune", "tune", "three")
    cluster.finish("tune", "tune")
    thread.join(5)
    assert lines == ["one", "two", "three"]


def test_an_event_of_either_group_is_read_in_the_other(api: Api, cluster: FakeKubernetes) -> None:
    made = api.create(config_map("a"))
    regarding = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": "a",
        "namespace": "default",
        "uid": made["metadata"]["uid"],
    }
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": "a.1"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "tuner",
        "reportingInstance": "tuner-0",
        "action": "Push",
        "reason": "Pushed",
        "note": "pushed it",
        "regarding": regarding,
        "type": "Normal",
    }
    api.create(event)
    found = api.list(EVENT, field_selector="involvedObject.name=a").items
    assert [(one["message"], one["reason"]) for one in found] == [("pushed it", "Pushed")]
    with pytest.raises(InvalidError, match="reportingInstance"):
        api.create({**event, "metadata": {"name": "a.2"}, "reportingInstance": ""})


def test_a_thousand_workspaces_are_listed_and_watched_quickly(api: Api, cluster: FakeKubernetes) -> None:
    for number in range(1000):
        cluster.put(workspace(f"w{number:04}"))
    began = time.monotonic()
    listing = api.list(WORKSPACE, ALL_NAMESPACES)
    events, _ = collected(api.watch(WORKSPACE, listing.resource_version, ALL_NAMESPACES, timeout_s=5))
    for number in range(0, 1000, 10):
        apply_status(api, f"w{number:04}", {"state": "Running"})
    until(lambda: len(events) == 100)
    assert time.monotonic() - began < 5
