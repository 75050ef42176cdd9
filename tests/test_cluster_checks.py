"""Every check of a Job, by a Job that is right but for one thing."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tuner.cluster.checks import job_problems, quantity, restricted_problems
from tuner.cluster.templates import container, load_template, pod_spec, volume
from tuner.data import data_dir

TRAINER = "my-adapter"
Break = Callable[[dict[str, Any]], Any]


def rule(job: dict[str, Any], name: str = TRAINER) -> dict[str, Any]:
    rules = job["spec"]["podFailurePolicy"]["rules"]
    return next(each["onExitCodes"] for each in rules if each.get("onExitCodes", {}).get("containerName") == name)


def terms(job: dict[str, Any]) -> Any:
    node = pod_spec(job)["affinity"]["nodeAffinity"]
    return node["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]


def mounts(job: dict[str, Any]) -> Any:
    return container(job, TRAINER)["volumeMounts"]


def resources(job: dict[str, Any]) -> Any:
    return container(job, TRAINER)["resources"]


BREAKS: list[tuple[str, Break]] = [
    ("metadata.name: 'a.b' must be at most 63", lambda j: j["metadata"].update(name="a.b")),
    ("metadata.name: ", lambda j: j["metadata"].update(name="a" * 64)),
    ("metadata.name: ", lambda j: j["metadata"].update(name="Upper")),
    ("labels[a/b/c]: is no key", lambda j: j["metadata"]["labels"].update({"a/b/c": "x"})),
    ("'two words' is no value", lambda j: j["spec"]["template"]["metadata"]["labels"].update(x="two words")),
    ("must be text: put it in quotes", lambda j: j["metadata"]["annotations"].update(x=1)),
    ("more than 256 KiB", lambda j: j["metadata"]["annotations"].update(x="x" * 300_000)),
    ("must be Never or OnFailure", lambda j: pod_spec(j).update(restartPolicy="Always")),
    ("must be Never beside a podFailurePolicy", lambda j: pod_spec(j).update(restartPolicy="OnFailure")),
    ("podReplacementPolicy: must be Failed", lambda j: j["spec"].update(podReplacementPolicy="TerminatingOrFailed")),
    ("there is no container 'gone'", lambda j: rule(j).update(containerName="gone")),
    ("must be ascending, each once", lambda j: rule(j).update(values=[65, 64])),
    ("must be ascending, each once", lambda j: rule(j).update(values=[64, 64])),
    ("0 is no failure", lambda j: rule(j).update(values=[0, 1])),
    ("must be exit codes of 0 to 255", lambda j: rule(j).update(values=[256])),
    ("must be 1 to 255 exit codes", lambda j: rule(j).update(values=[])),
    ("must be In or NotIn", lambda j: rule(j).update(operator="Equals")),
    ("rules are too many", lambda j: j["spec"]["podFailurePolicy"].update(rules=[{}] * 21)),
    ("must be FailJob, Ignore or Count", lambda j: j["spec"]["podFailurePolicy"]["rules"][0].update(action="Retry")),
    ("FailIndex is for indexed Jobs", lambda j: j["spec"]["podFailurePolicy"]["rules"][0].update(action="FailIndex")),
    ("must have either onExitCodes", lambda j: j["spec"]["podFailurePolicy"]["rules"][0].pop("onPodConditions")),
    ("a pod needs a container", lambda j: pod_spec(j).pop("containers")),
    (".name: must be at most 63", lambda j: container(j, "pusher").update(name="Pusher")),
    ("two containers are called 'preflight'", lambda j: container(j, "pusher").update(name="preflight")),
    ("image: is missing", lambda j: container(j, "pusher").update(image="")),
    ("env[name=HOME]: is there twice", lambda j: container(j, "pusher")["env"].append({"name": "HOME", "value": ""})),
    ("is no name of a variable", lambda j: container(j, "pusher")["env"].append({"name": "A B", "value": ""})),
    ("must be text: put it in quotes", lambda j: container(j, "pusher")["env"].append({"name": "A", "value": 1})),
    ("must not contain dots", lambda j: pod_spec(j)["volumes"].append({"name": "a.b", "emptyDir": {}})),
    ("volumes[name=A]: must be at most 63", lambda j: pod_spec(j)["volumes"].append({"name": "A", "emptyDir": {}})),
    ("volumes[name=tmp]: is there twice", lambda j: pod_spec(j)["volumes"].append({"name": "tmp", "emptyDir": {}})),
    ("exactly one kind of volume; it is emptyDir, nfs", lambda j: volume(j, "tmp").update(nfs={})),
    ("exactly one kind of volume; it is none", lambda j: volume(j, "tmp").pop("emptyDir")),
    ("no container mounts it", lambda j: pod_spec(j)["volumes"].append({"name": "lone", "emptyDir": {}})),
    ("there is no volume 'gone'", lambda j: mounts(j).append({"name": "gone", "mountPath": "/x"})),
    ("are both mounted at /mnt/data", lambda j: mounts(j).append({"name": "tmp", "mountPath": "/mnt/data/"})),
    ("a path from / on", lambda j: mounts(j).append({"name": "tmp", "mountPath": "x"})),
    ("[nvidia.com/gpu]: what a device plugin", lambda j: resources(j)["requests"].update({"nvidia.com/gpu": "2"})),
    ("[nvidia.com/gpu]: what a device plugin", lambda j: resources(j)["limits"].pop("nvidia.com/gpu")),
    ("64Gi are asked for, more than", lambda j: resources(j)["requests"].update(memory="64Gi")),
    ("'8 GB' is no amount", lambda j: resources(j)["requests"].update(memory="8 GB")),
    ("is in memory and has no sizeLimit", lambda j: volume(j, "dshm").update(emptyDir={"medium": "Memory"})),
    ("may hold more than my-adapter may use", lambda j: volume(j, "dshm")["emptyDir"].update(sizeLimit="64Gi")),
    ("nodeSelectorTerms: must have a term", lambda j: terms(j).clear()),
    ("is empty: it would match no node", lambda j: terms(j).append({})),
    ("In needs values", lambda j: terms(j)[0]["matchExpressions"].append({"key": "a", "operator": "In"})),
    (
        "Exists takes no values",
        lambda j: terms(j)[0]["matchExpressions"].append({"key": "a", "operator": "Exists", "values": ["x"]}),
    ),
    ("is no operator", lambda j: terms(j)[0]["matchExpressions"].append({"key": "a", "operator": "Is"})),
    ("imagePullSecrets[0]: has no name", lambda j: pod_spec(j).update(imagePullSecrets=[{"name": ""}])),
]


@pytest.mark.parametrize(("sentence", "breaks"), BREAKS, ids=[sentence for sentence, _ in BREAKS])
def test_each_thing_that_a_server_refuses_is_found(sentence: str, breaks: Break) -> None:
    job = load_template("job.yaml")
    assert job_problems(job) == []
    breaks(job)
    assert any(sentence in str(problem) for problem in job_problems(job)), job_problems(job)


SECURITY: list[tuple[str, Break]] = [
    ("hostNetwork: is refused", lambda j: pod_spec(j).update(hostNetwork=True)),
    ("a hostPath is refused", lambda j: volume(j, "tmp").update(hostPath={"path": "/"})),
    ("privileged: must not be true", lambda j: container(j, "pusher")["securityContext"].update(privileged=True)),
    ("allowPrivilegeEscalation: must be false", lambda j: container(j, "pusher").pop("securityContext")),
    ("capabilities.drop: must have ALL", lambda j: container(j, "pusher")["securityContext"].pop("capabilities")),
    (
        "may have NET_BIND_SERVICE alone",
        lambda j: container(j, "pusher")["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
    ),
    ("runAsNonRoot: must be true", lambda j: pod_spec(j)["securityContext"].pop("runAsNonRoot")),
    ("runAsUser: must not be 0", lambda j: pod_spec(j)["securityContext"].update(runAsUser=0)),
    ("seccompProfile.type: must be", lambda j: pod_spec(j)["securityContext"].pop("seccompProfile")),
    ("procMount: must be Default", lambda j: container(j, "pusher")["securityContext"].update(procMount="Unmasked")),
    ("a port of the host", lambda j: container(j, "pusher").update(ports=[{"containerPort": 1, "hostPort": 1}])),
]


@pytest.mark.parametrize(("sentence", "breaks"), SECURITY, ids=[sentence for sentence, _ in SECURITY])
def test_each_thing_that_a_restricted_namespace_refuses_is_found(sentence: str, breaks: Break) -> None:
    job = load_template("job.yaml")
    assert restricted_problems(pod_spec(job)) == []
    breaks(job)
    assert any(sentence in str(problem) for problem in restricted_problems(pod_spec(job)))


def test_every_template_passes_every_check() -> None:
    paths = sorted(data_dir("job_templates").glob("job*.yaml"))
    assert len(paths) >= 4
    for path in paths:
        job = load_template(path.name)
        assert (path.name, job_problems(job), restricted_problems(pod_spec(job))) == (path.name, [], [])


def test_quantities_are_read_as_kubernetes_reads_them() -> None:
    numbers = {"100m": 0.1, "1Gi": 2**30, "1G": 10**9, "2": 2, "0.5": 0.5, "8k": 8000, "3Mi": 3 * 2**20}
    assert {text: float(quantity(text) or 0) for text in numbers} == numbers
    assert [quantity(text) for text in ("", "1 Gi", "1gb", "-1", True)] == [None] * 5


def test_the_templates_are_for_people_to_read() -> None:
    for path in data_dir("job_templates").glob("*.yaml"):
        assert path.read_text().startswith("# "), path
        assert all(isinstance(each, dict) for each in yaml.safe_load_all(path.read_text())), path
