"""`tuner submit`, `cancel`, `delete` and `retry-push` against the strict API server: what is said, what is there."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fake_kubernetes import FakeKubernetes
from tuner.cli import main
from tuner.cluster import follow
from tuner.cluster.api import Api

WORKSPACES = Path(__file__).parent / "workspaces"
QUICK_START = str(WORKSPACES / "quick_start_filled.yaml")
NAME = "workspace-tuning-phi-3"
A100 = "Standard_NC24ads_A100_v4"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """One with the push secret and a node that fits."""
    with FakeKubernetes() as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.write_kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("TUNER_IMAGE", "reg.example/tuner:1")
        monkeypatch.setattr(follow, "POLL_S", 0.02)
        fake.allow_secrets()
        fake.put(push_secret())
        fake.add_node("gpu-0", {"node.kubernetes.io/instance-type": A100, "app": "tuning-phi-3"}, gpus=1)
        yield fake


def push_secret(name: str = "contoso-registry", key: str = ".dockerconfigjson") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": {key: "e30="}}


def submitted(*options: str) -> int:
    return main(["submit", QUICK_START, *options])


def result(stage: str, exit_code: int = 0, message: str = "", **values: Any) -> tuple[int, dict[str, Any]]:
    reason = "Completed" if exit_code == 0 else "Error"
    return exit_code, {"stage": stage, "exit_code": exit_code, "reason": reason, "message": message, "values": values}


def names(cluster: FakeKubernetes, plural: str) -> list[str]:
    return [each["metadata"]["name"] for each in cluster.objects(plural)]


def writes(cluster: FakeKubernetes) -> list[tuple[str, str]]:
    return [(method, path) for method, path in cluster.requests if method != "GET" and "dryRun" not in path]


@contextmanager
def meanwhile(*steps: Any) -> Iterator[None]:
    """The steps one after another, in the background; a step that raises KeyError is taken again until it works."""
    trouble: list[BaseException] = []

    def go() -> None:
        try:
            for step in steps:
                until(lambda step=step: done(step))
        except BaseException as error:  # shown where the test can see it
            trouble.append(error)

    def done(step: Any) -> bool:
        try:
            return step() is not False
        except KeyError:
            return False

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    yield
    thread.join(15)
    assert trouble == []


def until(condition: Any) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends, "it did not come true"
        time.sleep(0.01)


# ── submit ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_objects_of_a_run_are_created_and_belong_to_its_job(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted() == 0
    out, err = capsys.readouterr()
    assert out == f"job/{NAME}\n"
    assert "checkpoints and adapter are in the pod: a lost node loses the run" in err
    job = cluster.object("jobs", NAME)
    assert job
    owned = [
        *cluster.objects("configmaps"),
        *(each for each in cluster.objects("secrets") if "sources" in each["metadata"]["name"]),
    ]
    assert len(owned) == 2
    assert [each["metadata"]["ownerReferences"][0]["uid"] for each in owned] == [job["metadata"]["uid"]] * 2
    cluster.remove("jobs", NAME)
    assert cluster.objects("configmaps") == ()
    assert names(cluster, "secrets") == ["contoso-registry"]  # the user's own stays


def test_every_object_is_checked_by_the_server_before_the_first_is_created(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.admission.append(
        lambda new, old: 'admission webhook "policy.corp" denied the request: no' if new["kind"] == "Job" else None
    )
    assert submitted() == 78
    assert (
        f"Job {NAME} in namespace default: refused by the admission webhook policy.corp: no" in capsys.readouterr().err
    )
    assert writes(cluster) == []


def test_a_dry_run_creates_nothing(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted("--dry-run", "--json") == 0
    assert writes(cluster) == []
    out, err = capsys.readouterr()
    assert json.loads(out) == {"job": NAME, "namespace": "default", "outcome": "dry run"}
    assert "dry run: the server would take ConfigMap, Secret, Job" in err


@pytest.mark.parametrize("lost", ["configmaps", "secrets", "jobs"])
def test_a_lost_answer_makes_nothing_twice(cluster: FakeKubernetes, lost: str) -> None:
    cluster.fail("POST", f"/{lost}\\?(?!.*dryRun)", reset=True, after=True)
    assert submitted() == 0
    assert names(cluster, "jobs") == [NAME]
    owners = {each["metadata"]["ownerReferences"][0]["name"] for each in cluster.objects("configmaps")}
    assert owners == {NAME}


def test_a_second_submit_of_the_same_changes_nothing(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted() == 0
    before = len(writes(cluster))
    cluster.remove("nodes", "gpu-0")  # what was required of nodes is a preference now
    assert submitted() == 0
    assert len(writes(cluster)) == before
    assert "of the same run is there already" in capsys.readouterr().err


def test_another_run_of_the_name_is_refused_with_what_changed(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted() == 0
    capsys.readouterr()
    assert submitted("--set", "LoraConfig.r=16", "--priority-class", "high") == 78
    err = capsys.readouterr().err
    assert "is there already, of another run: LoraConfig.r: 8 → 16; priorityClassName: nothing → high" in err
    assert f"tuner delete {NAME} first" in err


SETTINGS_IN_THEIR_OWN_WAY = """
spec:
  template:
    spec:
      tolerations: [{key: team, operator: Equal, value: nlp, effect: NoSchedule}, {key: "", operator: Exists}]
      nodeSelector: {}
      imagePullSecrets: []
      hostNetwork: false
      containers:
      - name: trainer
        resources: {requests: {cpu: 2.5, memory: 65536Mi}, limits: {memory: 131072Mi}}
        env: [{name: EMPTY, value: ""}]
      volumes:
      - {name: data-volume, emptyDir: {sizeLimit: 1024Gi}}
"""


def test_what_a_server_drops_and_writes_in_its_own_way_makes_no_other_run(
    cluster: FakeKubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "patch.yaml").write_text(SETTINGS_IN_THEIR_OWN_WAY)
    patched = ("--patch", str(tmp_path / "patch.yaml"))
    assert submitted(*patched) == 0
    before = len(writes(cluster))
    assert submitted(*patched) == 0
    assert len(writes(cluster)) == before
    capsys.readouterr()
    assert submitted() == 78
    err = capsys.readouterr().err
    assert f'containers[{NAME}].env[EMPTY]: {{"name": "EMPTY"}} → nothing' in err
    assert "resources.requests.cpu: 2500m → " in err


def test_what_kubectl_applied_is_the_same_run(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", QUICK_START, "-n", "default"]) == 0
    api = Api.from_config(namespace="default")
    for manifest in yaml.safe_load_all(capsys.readouterr().out):
        applied = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(manifest)}
        manifest["metadata"].setdefault("annotations", {}).update(applied)
        api.create(manifest)
    before = len(writes(cluster))
    assert submitted() == 0
    assert len(writes(cluster)) == before
    assert "of the same run is there already" in capsys.readouterr().err
    assert submitted("--retries", "1") == 78
    assert "spec.backoffLimit: 3 → 1" in capsys.readouterr().err


def test_what_a_webhook_makes_of_every_job_makes_no_other_run(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    def mirror(new: dict[str, Any], old: dict[str, Any] | None) -> None:
        if new["kind"] == "Job" and old is None:
            for container in new["spec"]["template"]["spec"]["containers"]:
                container["image"] = container["image"].replace("reg.example", "mirror.example")

    cluster.admission.append(mirror)
    assert submitted() == 0
    job = cluster.object("jobs", NAME)
    assert job
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "mirror.example/tuner:1"
    assert submitted() == 0
    assert submitted("--set-image", "reg.example/tuner:2") == 78
    assert "image: mirror.example/tuner:1 → mirror.example/tuner:2" in capsys.readouterr().err


def test_what_a_queue_adds_makes_no_other_run(cluster: FakeKubernetes) -> None:
    cluster.kueue = True
    assert submitted("--queue", "gpus") == 0
    added = {"tolerations": [{"key": "flavour", "operator": "Exists"}], "nodeSelector": {"flavour": "a100"}}
    cluster.patch("jobs", NAME, {"spec": {"suspend": False, "template": {"spec": added}}})
    assert submitted("--queue", "gpus") == 0


def test_of_long_values_the_part_that_differs_is_shown(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    image = "reg.example/" + "a/" * 60 + "tuner"
    assert submitted("--set-image", f"{image}:1") == 0
    assert submitted("--set-image", f"{image}:2") == 78
    err = capsys.readouterr().err
    assert "a/tuner:1 → …" in err
    assert "a/tuner:2" in err


def test_a_finished_job_of_the_same_run_says_how_it_ended(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted() == 0
    cluster.run_job(NAME, {"pusher": result("push", image="contoso.azurecr.io/adapters/phi-3@sha256:1")})
    capsys.readouterr()
    assert submitted() == 0
    assert "has succeeded: contoso.azurecr.io/adapters/phi-3@sha256:1" in capsys.readouterr().err


def test_a_failed_job_of_the_same_run_is_no_success(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted() == 0
    cluster.run_job(NAME, {NAME: result("train", 78, "no")})
    assert submitted() == 78
    assert "of the same run has failed: train: no (exit 78)" in capsys.readouterr().err


def test_what_the_pod_would_wait_for_is_missed_before(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.remove("secrets", "contoso-registry")
    assert submitted("--results-volume", "results", "--service-account", "trainer") == 66
    err = capsys.readouterr().err
    for missing in ("Secret contoso-registry", "PersistentVolumeClaim results", "ServiceAccount trainer"):
        assert f"no {missing}" in err
    assert "kubectl create secret docker-registry contoso-registry -n default" in err
    cluster.put(push_secret(key="password"))
    assert submitted() == 66
    assert "in Secret contoso-registry (tuning.output.imagePushSecret), which has password" in capsys.readouterr().err
    assert writes(cluster) == []


def test_a_namespace_that_is_not_there_is_said(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted("-n", "nowhere") == 66
    assert "there is no namespace nowhere" in capsys.readouterr().err
    cluster.deny("get", "namespaces")
    cluster.deny("get", "secrets")
    assert submitted("-n", "nowhere") == 66
    assert "there is no namespace nowhere" in capsys.readouterr().err


def test_secrets_that_may_not_be_read_stop_nothing(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.deny("get", "secrets")
    cluster.deny("patch", "secrets")
    cluster.deny("list", "nodes")
    assert submitted() == 0
    err = capsys.readouterr().err
    assert "secrets are not readable" in err
    assert "nodes are not readable" in err
    assert "resources: [nodes], verbs: [list]" in err


def test_a_config_map_that_the_workspace_names_is_read_from_the_cluster(
    cluster: FakeKubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_map, workspace = Path(QUICK_START).read_text().split("\n---\n")
    path = tmp_path / "workspace.yaml"
    path.write_text(workspace)
    assert main(["submit", str(path)]) == 66
    assert "is neither in the Workspace's file nor in namespace default" in capsys.readouterr().err
    cluster.put(yaml.safe_load(config_map))
    assert main(["submit", str(path)]) == 0
    run = next(each for each in cluster.objects("configmaps") if "-config-" in each["metadata"]["name"])
    assert json.loads(run["data"]["run.json"])["training"]["lora"]["r"] == 8


def test_no_signed_query_and_no_secret_is_shown(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted("--data", "https://example.com/a.parquet?sig=GEHEIM") == 0
    assert main(["status", NAME]) == 0
    assert main(["events", NAME]) == 0
    out, err = capsys.readouterr()
    assert "GEHEIM" not in out + err
    assert "GEHEIM" not in json.dumps([cluster.objects("jobs"), cluster.objects("configmaps"), cluster.objects("pods")])


def test_wait_ends_with_the_failing_stages_own_exit_code(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    with meanwhile(lambda: cluster.run_job(NAME, {"data-downloader": result("fetch", 66, "https://x/a.parquet: 404")})):
        assert submitted("--wait") == 66
    assert "fetch: https://x/a.parquet: 404 (exit 66)" in capsys.readouterr().err


def test_wait_prints_the_pushed_image(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    results = {NAME: result("train", eval_loss=1.25), "pusher": result("push", image="r/a@sha256:2")}
    with meanwhile(lambda: cluster.run_job(NAME, results)):
        assert submitted("--wait") == 0
    out, err = capsys.readouterr()
    assert out == "r/a@sha256:2\n"
    assert "held-out loss 1.25" in err


# ── the check Job ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_fitting_node_a_check_job_runs_first(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.remove("nodes", "gpu-0")
    jobs: list[list[str]] = []
    with meanwhile(lambda: jobs.append(names(cluster, "jobs")), lambda: cluster.run_job(f"{NAME}--check")):
        assert submitted() == 0
    assert NAME not in jobs[0]
    assert "checking first, without a GPU" in capsys.readouterr().err
    assert names(cluster, "jobs") == [NAME]  # the check Job has done its work
    until(lambda: len(cluster.objects("pods")) == 1)
    owners = {each["metadata"]["ownerReferences"][0]["name"] for each in cluster.objects("configmaps")}
    assert owners == {NAME}


def test_what_the_check_job_finds_costs_no_gpu(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"check": result("prepare", 65, "train.parquet row 3: no response")}
    with meanwhile(lambda: cluster.run_job(f"{NAME}--check", found)):
        assert submitted("--check-job") == 65
    err = capsys.readouterr().err
    assert "the check found: prepare: train.parquet row 3: no response (exit 65); no GPU was asked for" in err
    assert names(cluster, "jobs") == [f"{NAME}--check"]
    assert main(["status", NAME]) == 0
    assert "no response (exit 65)" in capsys.readouterr().out
    # again, once it is mended: the old check goes, a new one comes
    pending = lambda: any(each["status"]["phase"] == "Pending" for each in cluster.objects("pods"))  # noqa: E731
    with meanwhile(pending, lambda: cluster.run_job(f"{NAME}--check")):
        assert submitted("--check-job") == 0
    assert names(cluster, "jobs") == [NAME]


def test_the_documented_role_is_enough(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "kubernetes.md").read_text()
    roles = [
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "kind: Role" in block
    ]
    assert len(roles) == 1
    claim(cluster)
    cluster.allow_only(roles[0]["rules"], "default")
    with meanwhile(lambda: cluster.run_job(f"{NAME}--check")):
        assert submitted("--check-job", "--results-volume", "results") == 0
    cluster.start(NAME, "preflight")
    for command in (["status"], ["status", NAME], ["logs", NAME], ["events", NAME], ["cancel", NAME], ["delete", NAME]):
        assert main(command) == 0, command
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if "may not" in line or "not readable" in line] == [
        line for line in err.splitlines() if "nodes are not readable" in line
    ]
    assert submitted("--results-volume", "results", "--no-check-job") == 0
    cluster.run_job(NAME, {"pusher": result("push", 74, "registry is down")})
    assert main(["retry-push", NAME]) == 0


# ── cancel, delete, retry-push ───────────────────────────────────────────────────────────────────────────────────────


def claim(cluster: FakeKubernetes) -> None:
    cluster.put({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "results"}})


def test_cancel_suspends_where_a_volume_keeps_the_checkpoint(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    claim(cluster)
    assert submitted("--results-volume", "results") == 0
    cluster.start(NAME, "preflight")
    assert main(["cancel", NAME]) == 0
    assert "its checkpoint is on the results volume; to go on: kubectl patch job" in capsys.readouterr().err
    job = cluster.object("jobs", NAME)
    assert job
    assert job["spec"]["suspend"] is True
    assert main(["status", NAME]) == 0
    assert "suspended" in capsys.readouterr().out


def test_cancel_deletes_where_nothing_would_be_left(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted() == 0
    cluster.start(NAME, "preflight")
    assert main(["cancel", NAME]) == 0
    err = capsys.readouterr().err
    assert "stopping: the step in flight and a checkpoint, up to 120 s" in err
    assert f"deleted {NAME}, not suspended, because without --results-volume nothing outlives its pod" in err
    until(lambda: cluster.objects("jobs") == ())


def test_a_job_of_the_controllers_is_left_to_it(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = cluster.put({"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": NAME}})
    assert submitted() == 0
    owner = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "name": NAME, "controller": True}
    cluster.patch("jobs", NAME, {"metadata": {"ownerReferences": [{**owner, "uid": workspace["metadata"]["uid"]}]}})
    for command in ("cancel", "delete"):
        assert main([command, NAME]) == 78
        assert f"kubectl delete workspace {NAME}" in capsys.readouterr().err


def test_delete_takes_all_that_was_made_for_a_run(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted() == 0
    for plural in ("configmaps", "secrets"):  # as kubectl apply leaves them: without an owner
        for name in names(cluster, plural):
            cluster.patch(plural, name, {"metadata": {"ownerReferences": None}})
    assert main(["delete", NAME]) == 0
    assert (names(cluster, "jobs"), names(cluster, "configmaps")) == ([], [])
    assert names(cluster, "secrets") == ["contoso-registry"]
    assert main(["delete", NAME]) == 66


def test_retry_push_pushes_what_the_volume_keeps(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    claim(cluster)
    assert submitted("--results-volume", "results") == 0
    assert main(["retry-push", NAME]) == 78
    assert "it pushes by itself" in capsys.readouterr().err
    cluster.run_job(NAME, {"pusher": result("push", 74, "registry is down")})
    assert main(["status", NAME]) == 0
    assert f"the adapter is kept: tuner retry-push {NAME}" in capsys.readouterr().out
    pushed = {"pusher": result("push", image="r/a@sha256:3")}
    with meanwhile(lambda: cluster.run_job(f"{NAME}--push", pushed)):
        assert main(["retry-push", NAME, "--wait"]) == 0
    assert capsys.readouterr().out.endswith("r/a@sha256:3\n")
    assert main(["retry-push", NAME]) == 78
    assert "has pushed it already" in capsys.readouterr().err


def test_retry_push_without_a_volume_says_why_not(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted() == 0
    cluster.run_job(NAME, {"pusher": result("push", 74, "registry is down")})
    assert main(["retry-push", NAME]) == 78
    assert "kept its adapter in the pod, which is gone" in capsys.readouterr().err


def test_a_server_that_would_drop_the_sidecar_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeKubernetes(version=(1, 28)) as old:
        monkeypatch.setenv("KUBECONFIG", str(old.write_kubeconfig(tmp_path / "kubeconfig")))
        assert main(["submit", QUICK_START, "--set-image", "i"]) == 78
        assert old.objects("configmaps") == old.objects("jobs") == ()
    assert "1.29 or newer is needed" in capsys.readouterr().err


def test_a_job_that_would_be_gone_before_anybody_looked_is_no_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", QUICK_START, "--set-image", "i", "--ttl", "0"]) == 64
    assert "--ttl" in capsys.readouterr().err
