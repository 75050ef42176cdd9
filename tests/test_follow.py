"""`tuner status`, `logs` and `events` against the strict API server, and the words for what a Job waits for."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.fake_kubernetes import FakeKubernetes
from tests.test_submit import NAME, QUICK_START, meanwhile, push_secret, result, until
from tuner.cli import main
from tuner.cluster import follow
from tuner.cluster.api import Api
from tuner.cluster.follow import JobFailedError, describe, duration, follow_run, load_run, pending_hint, read_logs
from tuner.runspec import Progress, Silent


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """One with the quick start submitted."""
    with FakeKubernetes() as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.write_kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("TUNER_IMAGE", "reg.example/tuner:1")
        monkeypatch.setattr(follow, "POLL_S", 0.02)
        fake.put(push_secret())
        assert main(["submit", QUICK_START, "--no-check-job"]) == 0
        yield fake


@pytest.fixture
def api(cluster: FakeKubernetes) -> Api:
    return Api.from_config(patience_s=5)


def progress_line(done: int = 120, **values: float) -> str:
    line = {"stage": "train", "task": "training", "done": done, "total": 468, "unit": "steps", "loss": 1.2345}
    return json.dumps({**line, "tokens_per_s": 4321.9, "eta_s": 1234, **values})


def train(cluster: FakeKubernetes) -> None:
    cluster.finish(NAME, "preflight")
    cluster.finish(NAME, "data-downloader")


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[int] = []

    def note(self, line: str) -> None:
        self.lines.append(line)

    warn = note

    def progress(self, progress: Progress) -> None:
        self.done.append(progress.done)


# ── status ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["status", *options]) == 0
    return capsys.readouterr().out


def test_status_shows_step_loss_and_what_is_left(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    train(cluster)
    cluster.log(NAME, NAME, "some words", progress_line())
    out = shown(capsys, NAME)
    assert out.startswith(f"{NAME}  training 120/468  26 %\n")
    assert "loss   1.234, 4,322 tokens/s\n" in out
    assert "left   20m\n" in out
    found = json.loads(shown(capsys, NAME, "--json"))
    assert (found["phase"], found["stage"], found["done"], found["eta_s"]) == ("running", "train", 120, 1234)


def test_status_shows_which_attempt_and_how_the_last_one_ended(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.run_job(NAME, {NAME: result("train", 75, "stopped after a checkpoint")})
    cluster.start(NAME, "preflight")
    out = shown(capsys, NAME)
    assert "checking  attempt 2 of 4" in out
    assert "train: stopped after a checkpoint (exit 75)" in out


def test_a_failed_run_shows_the_stages_words_and_where_to_look(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.run_job(NAME, {"preflight": result("preflight", 77, "contoso.azurecr.io: denied")})
    out = shown(capsys, NAME)
    assert "failed\n" in out
    assert "preflight: contoso.azurecr.io: denied (exit 77)" in out
    assert f"tuner logs {NAME} --stage preflight" in out


def test_a_volume_that_was_too_small_is_named_with_the_patch_that_helps(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    message = 'Usage of EmptyDir volume "data-volume" exceeds the limit "64Gi". '
    name = cluster.pod_of(NAME)["metadata"]["name"]
    cluster.patch("pods", name, {"status": {"phase": "Failed", "reason": "Evicted", "message": message}})
    out = shown(capsys, NAME)
    assert "attempt 2 of 4" in out
    assert 'evicted: Usage of EmptyDir volume "data-volume" exceeds the limit "64Gi".' in out
    assert "volumes: [{name: data-volume, emptyDir: {sizeLimit: …}}]" in out


def test_a_finished_run_shows_what_it_pushed(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    image = f"contoso.azurecr.io/adapters/phi-3@sha256:{'0' * 64}"
    cluster.run_job(NAME, {NAME: result("train", eval_loss=1.25), "pusher": result("push", image=image)})
    out = shown(capsys, NAME)
    assert f"pushed    {image}\n" in out
    assert "held out  loss 1.25\n" in out


def test_without_a_name_all_runs_are_a_table(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    train(cluster)
    cluster.log(NAME, NAME, progress_line())
    heading, row = shown(capsys).splitlines()
    assert heading.split() == ["NAME", "STATUS", "LOSS", "LEFT", "ATTEMPT", "AGE"]
    assert row.split()[:6] == [NAME, "training", "120/468", "1.234", "20m", "1/4"]
    assert [each["name"] for each in json.loads(shown(capsys, "--json"))] == [NAME]
    assert main(["status", "-n", "kube-system"]) == 0
    assert "no runs in namespace kube-system" in capsys.readouterr().err


def test_a_name_that_is_not_there_is_said(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "logs", "cancel", "retry-push"):
        assert main([command, "nobody"]) == 66
        assert "there is no Job nobody in namespace default" in capsys.readouterr().err
    cluster.put({"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "nobody"}})
    assert main(["status", "nobody"]) == 66
    assert "Workspace nobody in namespace default has no Job yet" in capsys.readouterr().err


def test_what_may_not_be_read_is_said_and_the_rest_shown(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    train(cluster)
    cluster.deny("get", "pods/log")
    assert main(["status", NAME]) == 0
    out, err = capsys.readouterr()
    assert "training" in out
    assert "logs are not readable" in err
    assert "resources: [pods/log], verbs: [get]" in err


# ── why it waits ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unschedulable_pod_shows_the_labelling_command(
    cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    template = {"spec": {"template": cluster.object("jobs", NAME)["spec"]["template"]}}  # type: ignore[index]
    expression = {"key": "app", "operator": "In", "values": ["tuning-phi-3"]}
    affinity = {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    }
    template["spec"]["template"]["spec"]["affinity"] = {"nodeAffinity": affinity}
    cluster.patch("jobs", NAME, template)
    cluster.unschedulable(NAME, "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.")
    out = shown(capsys, NAME)
    assert "no node takes its pod: 0/2 nodes are available" in out
    assert "kubectl label node NODE app=tuning-phi-3   (a node with 1 GPU; the pod goes there by itself)" in out


def test_an_image_that_cannot_be_pulled(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.schedule(NAME)
    cluster.hold(NAME, "preflight", "ImagePullBackOff", 'Back-off pulling image "reg.example/tuner:1"')
    out = shown(capsys, NAME)
    assert 'the image reg.example/tuner:1 cannot be pulled: Back-off pulling image "reg.example/tuner:1"' in out
    assert "--image-pull-secret" in out


def test_a_missing_secret_quota_and_pod_security(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.schedule(NAME)
    mount = 'MountVolume.SetUp failed for volume "docker-config" : secret "contoso-registry" not found'
    cluster.add_event(cluster.pod_of(NAME), "FailedMount", mount)
    assert "kubectl create secret docker-registry contoso-registry -n default" in shown(capsys, NAME)
    assert main(["delete", NAME]) == 0
    cluster.refuse_pods["default"] = "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: 2, limited: 2"
    assert main(["submit", QUICK_START, "--no-check-job"]) == 0
    out = shown(capsys, NAME)
    assert "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1" in out
    assert "kubectl describe quota -n default" in out


def test_a_queued_job_is_shown_as_queued_and_left_alone(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    with FakeKubernetes(kueue=True) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.write_kubeconfig(tmp_path / "kubeconfig")))
        cluster.put(push_secret())
        submit = ["submit", QUICK_START, "--no-check-job", "--queue", "gpus", "--set-image", "i"]
        assert main(submit) == 0
        out = shown(capsys, NAME)
        assert out.startswith(f"{NAME}  queued\n")
        assert "queued by Kueue in gpus" in out
        assert main(submit) == 0
        assert cluster.object("jobs", NAME)["spec"]["suspend"] is True  # type: ignore[index]


JOB: dict[str, Any] = {
    "metadata": {"name": "a", "namespace": "ml"},
    "spec": {"template": {"spec": {"containers": [{"name": "a", "resources": {"limits": {"nvidia.com/gpu": "2"}}}]}}},
}


@pytest.mark.parametrize(
    ("waiting_for", "hint"),
    [
        ("no node takes its pod: 0/3: 1 Insufficient nvidia.com/gpu, 2 didn't match Pod's", "no node has 2 GPUs free"),
        ("no node takes its pod: 0/1 nodes: 1 node(s) had untolerated taint {dedicated: ml}", "tainted dedicated: add"),
        ("no node takes its pod: 1 node(s) had untolerated taint(s) {scalesetpriority: spot}", "scalesetpriority"),
        ("its volumes are not there: configmap \"x\" not found", "submit again"),
        ("no node takes its pod: pod has unbound immediate PersistentVolumeClaims", "kubectl get pvc -n ml"),
        ("its pod is refused: violates PodSecurity", "clean under restricted"),
        ("a new pod begins when tickets-1 on node gpu-7 is gone", "kubectl delete node gpu-7"),
        ("its pod is refused: unable to validate against any security context constraint: [...]", "runAsUser"),
        ("its containers are being made", None),
        (None, None),
    ],
)  # fmt: skip
def test_what_helps(waiting_for: str | None, hint: str | None) -> None:
    found = pending_hint(JOB, waiting_for)
    assert (found is None) == (hint is None)
    assert (hint or "") in (found or "")


def test_a_check_that_finds_no_node_can_be_left_out() -> None:
    check = {**JOB, "metadata": {**JOB["metadata"], "labels": {"app.kubernetes.io/component": "check"}}}
    hint = pending_hint(check, "no node takes its pod: 0/1 nodes: 1 node(s) had untolerated taint {sku: gpu}")
    assert hint is not None
    assert "--no-check-job" in hint


def test_durations() -> None:
    assert [duration(each) for each in (None, 0, 59, 60, 3599, 3600, 90000)] == [
        "–",
        "0s",
        "59s",
        "1m",
        "59m",
        "1h00m",
        "1d1h",
    ]


def test_a_misspelt_run_or_namespace_is_told(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["status", NAME[:-1]]) == 66
    assert f'hint: did you mean "{NAME}"?' in capsys.readouterr().err
    assert main(["status", "quite-another"]) == 66
    assert "hint: tuner status shows those there are" in capsys.readouterr().err
    for name in ((), (NAME,)):
        assert main(["status", *name, "-n", "nons"]) == 66
        assert "error: there is no namespace nons" in capsys.readouterr().err
    cluster.deny("get", "namespaces")  # who may not look is left in doubt
    assert main(["status", "-n", "nons"]) == 0
    assert "no runs in namespace nons" in capsys.readouterr().err


# ── following ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_following_tells_each_change_once(cluster: FakeKubernetes, api: Api) -> None:
    heard, stages = Heard(), list[str]()

    def run() -> None:
        cluster.unschedulable(NAME)
        until(lambda: any("no node takes its pod" in line for line in heard.lines))
        train(cluster)
        for done in (1, 2, 3):
            cluster.log(NAME, NAME, progress_line(done))
            until(lambda done=done: done in heard.done)
        cluster.fail("GET", "/jobs/", status=503, times=1)
        cluster.log(NAME, NAME, '{"stage": "push", "task": "pushing", "done": 0, "total": 1, "unit": "steps"}')
        until(lambda: stages[-1:] == ["push"])
        cluster.say(NAME, "pusher", result("push", image="r/a@sha256:4")[1])
        cluster.finish(NAME, NAME)

    with meanwhile(run):
        found = follow_run(api, NAME, heard, begin_stage=stages.append, poll_s=0.02)
    assert found.image == "r/a@sha256:4"
    assert stages[-2:] == ["train", "push"]
    assert len(heard.lines) == len(set(heard.lines))
    assert any(line.startswith("waiting: no node takes its pod") for line in heard.lines)


def test_following_outlasts_a_server_that_goes_away(cluster: FakeKubernetes) -> None:
    heard = Heard()
    impatient = Api.from_config(patience_s=0)
    cluster.fail("GET", "/jobs/", status=503, times=3)
    with meanwhile(lambda: cluster.run_job(NAME)):
        follow_run(impatient, NAME, heard, poll_s=0.02)
    assert any("the run goes on, waiting for the server" in line for line in heard.lines)


def test_a_server_that_was_never_there_is_not_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeKubernetes() as gone:
        monkeypatch.setenv("KUBECONFIG", str(gone.write_kubeconfig(tmp_path / "kubeconfig")))
    from_config = Api.from_config
    monkeypatch.setattr(Api, "from_config", lambda *args, **options: from_config(*args, **options, patience_s=1))
    assert main(["status", NAME, "--wait"]) == 69
    talk = capsys.readouterr().err.splitlines()
    assert talk[0] == f"warning: {gone.url}: connection refused; trying again for up to 1 s"
    assert talk[1:] == [
        f"error: {gone.url}: connection refused",
        "hint: is the cluster running, and the kubeconfig for it?",
    ]


def test_a_status_is_a_function_of_what_the_server_had(cluster: FakeKubernetes, api: Api) -> None:
    train(cluster)
    snapshot = load_run(api, NAME)
    now = datetime.now(UTC) + timedelta(hours=2)
    assert describe(snapshot, now) == describe(snapshot, now)
    assert 7190 <= (describe(snapshot, now).age_s or 0) <= 7210


# ── logs and events ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_logs_are_those_of_the_stage_that_failed(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.start(NAME, "preflight")
    cluster.log(NAME, "preflight", "all is well")
    cluster.finish(NAME, "preflight")
    cluster.log(NAME, "data-downloader", "fetching", "https://x/a.parquet?sig=GEHEIM is gone")
    cluster.run_job(NAME, {"data-downloader": result("fetch", 66)})
    capsys.readouterr()
    assert main(["logs", NAME]) == 0
    assert capsys.readouterr().out == "fetching\nhttps://x/a.parquet?… is gone\n"
    assert main(["logs", NAME, "--stage", "preflight"]) == 0
    assert capsys.readouterr().out == "all is well\n"
    assert main(["logs", NAME, "--stage", "push"]) == 66
    assert "its push stage has not begun" in capsys.readouterr().err
    assert main(["logs", NAME, "--stage", "pushing"]) == 64


def test_a_job_that_is_deleted_while_it_is_followed_is_said_to_be(cluster: FakeKubernetes, api: Api) -> None:
    train(cluster)
    stages = list[str]()

    def delete() -> None:
        until(lambda: "train" in stages)
        cluster.remove("jobs", NAME)

    with meanwhile(delete), pytest.raises(JobFailedError, match="was deleted before its end was seen"):
        follow_run(api, NAME, Heard(), begin_stage=stages.append, poll_s=0.02)


def test_followed_logs_go_from_stage_to_stage_and_over_broken_connections(cluster: FakeKubernetes, api: Api) -> None:
    lines: list[str] = []
    thread = threading.Thread(
        target=lambda: lines.extend(read_logs(api, NAME, None, follows=True, sleep=lambda _: None, poll_s=0.01)),
        daemon=True,
    )
    thread.start()
    cluster.start(NAME, "preflight")
    cluster.log(NAME, "preflight", "p1")
    until(lambda: lines == ["p1"])
    cluster.cut_watches()
    cluster.log(NAME, "preflight", "p2")
    until(lambda: lines == ["p1", "p2"])
    cluster.finish(NAME, "preflight")
    cluster.log(NAME, "data-downloader", "d1")
    until(lambda: lines == ["p1", "p2", "d1"])
    cluster.finish(NAME, "data-downloader")
    cluster.log(NAME, NAME, "t1")
    until(lambda: lines[3:] == ["t1"])
    cluster.log(NAME, "pusher", "pushed")
    cluster.finish(NAME, NAME)
    thread.join(10)
    assert lines == ["p1", "p2", "d1", "t1", "pushed"]


def test_events_are_those_of_the_run(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.add_event(cluster.pod_of(NAME), "Scheduled", "assigned to gpu-0", type="Normal", count=3)
    cluster.add_event(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other", "namespace": "default"}}, "Nope", "x"
    )
    capsys.readouterr()
    assert main(["events", NAME]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["AGE", "REASON", "OBJECT", "MESSAGE"]
    assert len(rows) == 1
    assert rows[0].split()[1:3] == ["×3", "Scheduled"]
    assert main(["events", NAME, "--json"]) == 0
    assert [each["reason"] for each in json.loads(capsys.readouterr().out)] == ["Scheduled"]
