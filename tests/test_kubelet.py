"""The kubelet of the tests is strict where a real one is: else what runs on it proves nothing."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from kubelet import CLUSTER_ENV, IMAGE_ENV, Node, decide

SECRET = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"key": base64.b64encode(b"first").decode()}}


def job_of(*containers: dict[str, Any], init: tuple[dict[str, Any], ...] = (), **spec: Any) -> dict[str, Any]:
    security = {"runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532}
    volumes = [
        {"name": "scratch", "emptyDir": {}},
        {"name": "kept", "persistentVolumeClaim": {"claimName": "claim"}},
        {"name": "secret", "secret": {"secretName": "s", "defaultMode": 0o440}},
    ]
    pod = {"restartPolicy": "Never", "securityContext": security, "volumes": volumes}
    template = {"spec": {**pod, "initContainers": list(init), "containers": list(containers)}}
    return {"spec": {"backoffLimit": 1, **spec, "template": template}}


def container(name: str, script: str, *, read_only: bool = False, **more: Any) -> dict[str, Any]:
    mounts = [
        {"name": "scratch", "mountPath": "/mnt/scratch", "readOnly": read_only},
        {"name": "kept", "mountPath": "/mnt/kept", "readOnly": read_only},
        {"name": "secret", "mountPath": "/run/secrets/s", "readOnly": True},
    ]
    security = {"readOnlyRootFilesystem": True}
    return {
        "name": name,
        "command": ["bash", "-c", script],
        "volumeMounts": mounts,
        "securityContext": security,
        **more,
    }


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path, [SECRET])


def run(node: Node, script: str, **more: Any) -> str:
    """What a container says that does this."""
    return node.start_pod(job_of(container("one", script, **more))).wait().containers["one"].log


def test_a_container_is_process_1_of_the_pods_user_and_sees_only_its_environment(node: Node) -> None:
    said = run(node, "echo $$ $(id -u) $(id -G); env", env=[{"name": "A", "value": "b"}])
    assert said.startswith("1 65532 65532\n")
    names = {line.partition("=")[0] for line in said.splitlines()[1:]}
    assert names - {"_", "SHLVL", "PWD", "OLDPWD"} == {"A", *IMAGE_ENV, *CLUSTER_ENV}


def test_only_what_is_mounted_for_writing_can_be_written(node: Node) -> None:
    tries = "for p in / /tmp /run /mnt /usr /mnt/scratch /mnt/kept /run/secrets/s; do touch $p/x && echo wrote $p; done"
    assert {line for line in run(node, tries).splitlines() if line.startswith("wrote")} == {
        "wrote /mnt/scratch",
        "wrote /mnt/kept",
    }
    assert "wrote" not in run(node, tries, read_only=True)


def test_a_secret_is_there_as_a_file_and_renewed_in_place(node: Node) -> None:
    script = (
        "cat /run/secrets/s/key; touch /mnt/scratch/read; sleep 0.1; until [ $(cat /run/secrets/s/key) = second ]; "
    )
    pod = node.start_pod(job_of(container("one", script + "do sleep 0.05; done; cat /run/secrets/s/key")))
    pod.wait_for(lambda: (pod.volume("scratch") / "read").exists())
    node.objects[0] = {**SECRET, "data": {"key": base64.b64encode(b"second").decode()}}
    pod.update_secret("secret")
    assert pod.wait().containers["one"].log == "firstsecond"


def test_a_pod_that_needs_a_secret_which_is_not_there_never_starts(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Secret 's' is not there"):
        Node(tmp_path).start_pod(job_of(container("one", "true")))


def test_init_containers_come_first_and_a_failed_one_is_the_last(node: Node) -> None:
    job = job_of(container("main", "true"), init=(container("a", "true"), container("b", "exit 65")))
    outcome = node.start_pod(job).wait()
    assert outcome.exit_codes == {"a": 0, "b": 65}
    assert not outcome.succeeded


def test_containers_run_side_by_side_and_share_a_volumes_locks(node: Node) -> None:
    holds = "exec 9>/mnt/scratch/lock; flock 9; touch /mnt/scratch/held; sleep 0.3; echo done > /mnt/scratch/done"
    waits = (
        "until [ -e /mnt/scratch/held ]; do sleep 0.01; done; exec 9>/mnt/scratch/lock; flock 9; cat /mnt/scratch/done"
    )
    outcome = node.start_pod(job_of(container("holds", holds), container("waits", waits))).wait()
    assert outcome.containers["waits"].log == "done\n"


def test_the_termination_message_is_the_file_else_the_end_of_the_log(node: Node) -> None:
    job = job_of(
        container("says", "echo talk; echo -n word > /dev/termination-log"),
        container("fails", "echo talk; exit 3", terminationMessagePolicy="FallbackToLogsOnError"),
        container("kills", "echo talk; sleep 60"),
    )
    pod = node.start_pod(job)
    pod.wait_for_log("kills", "talk")
    pod.kill("kills")
    ended = pod.wait().containers
    assert [(each.exit_code, each.message) for each in ended.values()] == [(0, "word"), (3, "talk"), (137, "")]


def test_containers_share_what_is_kept_of_a_pods_messages(node: Node) -> None:
    talks = "head -c 5000 /dev/zero | tr '\\0' x > /dev/termination-log"
    for count, kept in ((1, 4096), (4, 3072)):
        ended = node.start_pod(job_of(*(container(f"c{number}", talks) for number in range(count)))).wait().containers
        assert [len(each.message) for each in ended.values()] == [kept] * count


def test_sigterm_reaches_every_container_and_sigkill_comes_after_the_grace(node: Node) -> None:
    polite = "trap 'exit 75' TERM; echo ready; while true; do sleep 0.05; done"
    deaf = "echo ready; while true; do sleep 0.05; done"  # process 1 hears only what it has a handler for
    pod = node.start_pod(job_of(container("polite", polite), container("deaf", deaf)))
    for name in ("polite", "deaf"):
        pod.wait_for_log(name, "ready")
    pod.terminate(grace_s=0.5)
    assert pod.wait().exit_codes == {"polite": 75, "deaf": 137}


def test_a_job_makes_pods_until_its_limit_and_keeps_only_its_claims(node: Node) -> None:
    count = (
        "echo x | tee -a /mnt/kept/count >> /mnt/scratch/count; wc -l < /mnt/kept/count; wc -l < /mnt/scratch/count; "
    )
    outcome = node.run_job(job_of(container("one", count + "exit 1")))
    assert (outcome.condition, outcome.reason) == ("Failed", "BackoffLimitExceeded")
    assert [pod.containers["one"].log.split() for pod in outcome.pods] == [["1", "1"], ["2", "1"]]


def test_a_sidecar_is_started_again_and_ended_after_the_others(node: Node) -> None:
    talks = "echo x >> /mnt/scratch/starts; trap 'echo bye; exit 0' TERM; while true; do sleep 0.05; done"
    main = "until [ $(wc -l < /mnt/scratch/starts) = 2 ]; do sleep 0.05; done; exit 3"
    job = job_of(container("main", main), init=(container("side", talks, restartPolicy="Always"),))
    pod = node.start_pod(job)
    pod.wait_for(lambda: (pod.volume("scratch") / "starts").exists())
    pod.kill("side")
    outcome = pod.wait()
    assert (outcome.exit_codes, outcome.containers["side"].log) == ({"main": 3, "side": 0}, "bye\n")
    assert not outcome.succeeded


RULES = [
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "FailJob", "onExitCodes": {"containerName": "a", "operator": "In", "values": [65, 77]}},
    {"action": "FailJob", "onExitCodes": {"containerName": "b", "operator": "NotIn", "values": [75, 143]}},
]


@pytest.mark.parametrize(
    ("exit_codes", "disrupted", "decision"),
    [
        ({"a": 65, "b": 0}, False, "FailJob"),
        ({"a": 66, "b": 0}, False, "Count"),
        ({"a": 66, "b": 74}, False, "FailJob"),
        ({"a": 75, "b": 143}, False, "Count"),
        ({"a": 65, "b": 74}, True, "Ignore"),
        ({"c": 65}, False, "Count"),
    ],
)
def test_the_first_rule_that_matches_decides(exit_codes: dict[str, int], disrupted: bool, decision: str) -> None:
    job = json.loads(json.dumps({"spec": {"podFailurePolicy": {"rules": RULES}}}))
    assert decide(job, exit_codes, was_disrupted=disrupted) == decision
