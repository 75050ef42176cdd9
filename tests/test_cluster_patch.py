"""A user's patch: what it can do to a Job, and what it cannot."""

import json
import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cluster_job import NAME, render, workspace

from tuner.cluster.beside import render_check_job, render_retry_push
from tuner.cluster.checks import job_problems, restricted_problems
from tuner.cluster.patch import apply_patches, merge, parse_patches
from tuner.cluster.templates import container, containers, pod_spec, volume
from tuner.errors import ConfigError

POD = "spec: {template: {spec: {%s}}}"
JOB = render(workspace()).job


def patched(text: str, **options: Any) -> dict[str, Any]:
    return apply_patches(render(workspace(), **options).job, parse_patches(text, "patch.yaml"))


def refusals(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        patched(text)
    return [str(problem) for problem in caught.value.problems] or [caught.value.message]


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "patch", "merged"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"c": 2}}),
        ({"a": {"b": 1}}, {"a": {"$patch": "replace", "c": 2}}, {"a": {"c": 2}}),
        ({"a": {"b": 1}, "d": 1}, {"a": {"$patch": "delete"}}, {"d": 1}),
        ({"tolerations": [{"key": "x"}]}, {"tolerations": [{"key": "y"}]}, {"tolerations": [{"key": "y"}]}),
        (
            {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
            {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
            {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}]},
        ),
        (
            {"volumeMounts": [{"name": "v", "mountPath": "/a"}]},
            {"volumeMounts": [{"name": "v", "mountPath": "/b"}]},
            {"volumeMounts": [{"name": "v", "mountPath": "/b"}, {"name": "v", "mountPath": "/a"}]},
        ),
        (
            {"ports": [{"containerPort": 1, "name": "a"}]},
            {"ports": [{"containerPort": 1, "name": "b"}]},
            {"ports": [{"containerPort": 1, "name": "b"}]},
        ),
        (
            {"env": [{"name": "A"}, {"name": "B"}]},
            {"env": [{"$patch": "delete", "name": "A"}]},
            {"env": [{"name": "B"}]},
        ),
        ({"env": [{"name": "A"}]}, {"env": [{"$patch": "replace"}, {"name": "B"}]}, {"env": [{"name": "B"}]}),
        (
            {"volumes": [{"name": "v", "emptyDir": {}}]},
            {"volumes": [{"name": "v", "$retainKeys": ["name", "nfs"], "nfs": {"path": "/"}}]},
            {"volumes": [{"name": "v", "nfs": {"path": "/"}}]},
        ),
    ],
)
def test_patches_merge_as_kubectl_merges_them(value: Any, patch: Any, merged: Any) -> None:
    before = deepcopy(value)
    assert merge(value, patch) == merged
    assert value == before


@pytest.mark.parametrize(
    ("patch", "order"),
    [
        ("x", "xabc"),  # what is new stands before what is there …
        ("ax", "axbc"),  # … but after what the patch names before it
        ("cx", "abcx"),
        ("xc", "xabc"),
        ("ba", "bac"),  # the patch's order is the order
    ],
)
def test_items_stand_where_kubectl_puts_them(patch: str, order: str) -> None:
    items = {"containers": [{"name": name} for name in "abc"]}
    merged = merge(items, {"containers": [{"name": name} for name in patch]})
    assert "".join(each["name"] for each in merged["containers"]) == order


# Of every kind of field and every directive; what the guard says of it is another matter.
AGAINST_KUBECTL = [
    POD % "containers: [{name: tickets, env: [{name: A, value: '1'}, {name: HOME, value: /x}]}]",
    POD % "containers: [{name: tickets, env: [{name: HOME, $patch: delete}]}]",
    POD % "containers: [{$patch: replace}, {name: side, image: x}]",
    POD % "initContainers: [{name: pusher, $patch: delete}, {name: side, image: x}]",
    POD % "tolerations: [{key: a, operator: Exists}]",
    POD % "imagePullSecrets: [{name: a}, {name: b}]",
    POD % "volumes: [{name: data-volume, emptyDir: {sizeLimit: 1Ti}}, {name: extra, emptyDir: {}}]",
    POD % "volumes: [{name: data-volume, $retainKeys: [name, nfs], nfs: {server: s, path: /}}]",
    POD % "volumes: [{name: data-volume, emptyDir: null, nfs: {server: s, path: /}}]",
    POD % "containers: [{name: tickets, volumeMounts: [{mountPath: /extra, name: tmp}]}]",
    POD % "containers: [{name: tickets, volumeMounts: [{mountPath: /tmp, $patch: delete}]}]",
    POD % "containers: [{name: tickets, resources: {$patch: replace, limits: {memory: 1Gi}}}]",
    POD % "containers: [{name: tickets, resources: {limits: {memory: null}}}]",
    POD % "containers: [{name: tickets, resources: {$patch: delete}}]",
    POD % "containers: [{name: tickets, args: [a, b], ports: [{containerPort: 1, name: a}]}]",
    POD % "containers: [{name: tickets, envFrom: [{configMapRef: {name: a}}]}]",
    POD % "containers: [{name: tickets, securityContext: {capabilities: {drop: [X]}}}]",
    POD % "initContainers: [{name: data-downloader}, {name: new, image: y}, {name: preflight}]",
    POD % "affinity: null",
    POD % "securityContext: {runAsUser: 1000, seccompProfile: null}",
    POD % "topologySpreadConstraints: [{topologyKey: a, maxSkew: 1, whenUnsatisfiable: DoNotSchedule}]",
    POD % "hostAliases: [{ip: 1.2.3.4, hostnames: [a]}]",
    POD % "resourceClaims: [{name: a, resourceClaimName: b}]",
    "metadata: {labels: {x: y}, annotations: {tuner/run-digest: null}}",
    "spec: {podFailurePolicy: {rules: [{action: Count, onExitCodes: {operator: In, values: [1]}}]}}",
    "spec: {ttlSecondsAfterFinished: 5, backoffLimit: null}",
    "spec: {template: {metadata: {labels: {$patch: replace, a: b}}}}",
]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kubectl_itself_makes_the_same_of_every_patch(tmp_path: Path) -> None:
    def kubectl(file: Path, patch: Any) -> Any:
        how = ["kubectl", "patch", "--local", "--type=strategic", "-o", "json"]
        done = subprocess.run([*how, "-f", file, "-p", json.dumps(patch)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    file = tmp_path / "job.json"
    file.write_text(json.dumps(JOB))
    file.write_text(json.dumps(kubectl(file, {})))  # in its own words: what is empty is left out
    before = json.loads(file.read_text())
    for text in AGAINST_KUBECTL:
        patch = yaml.safe_load(text)
        assert _full(merge(before, patch)) == _full(kubectl(file, patch)), text


def _full(value: Any) -> Any:
    """Without what is empty: kubectl leaves some of that out."""
    if isinstance(value, dict):
        return {key: _full(each) for key, each in value.items() if each not in ({}, [], None)}
    return [_full(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must be a mapping, as a Job is"),
        ("", "there is no patch in it"),
        ("a: [", "not YAML"),
        ("containers: []", "a Job has no 'containers'"),
        ("kind: Deployment", "is for a Deployment, and only the Job can be patched"),
        (POD % "containers: [{image: x}]", "containers[0]: has no name, by which such lists are merged"),
        (POD % "volumes: [{$patch: delete, name: none}]", "volumes[name=none]: there is none to delete"),
        (POD % "$patch: remove", "$patch is merge, replace or delete, not 'remove'"),
        (POD % "$setElementOrder/volumes: []", "the directive $setElementOrder/volumes is not known here"),
    ],
)
def test_what_no_patch_can_say_is_refused_with_its_place(text: str, message: str) -> None:
    (refusal,) = refusals(text)
    assert message in refusal


def test_a_patch_says_the_line_of_each_mistake() -> None:
    text = """\
spec:
  backoffLimit: 1
  backoffLimit: 2
containers: []
---
on: x
metadata: {labels: {a: !env B}}
"""
    assert refusals(text) == [
        "patch.yaml:3 spec.backoffLimit: written twice, on lines 2 and 3",
        "patch.yaml:6: the key on is true or false, not text",
        "patch.yaml:7 metadata.labels.a: the YAML tag !env means nothing here",
    ]
    assert refusals("a: 1\nspecs: {}\nkind: Deployment\n") == [
        "patch.yaml:1: a Job has no 'a'",
        "patch.yaml:2: a Job has no 'specs'",
        "patch.yaml:3: is for a Deployment, and only the Job can be patched",
    ]
    text = "spec: {template: {spec: {volumes: [\n  {name: tmp},\n  {$patch: delete,\n   name: none}]}}}\n"
    assert refusals(text) == ["patch.yaml:3 spec.template.spec.volumes[name=none]: there is none to delete"]


def test_a_patch_is_read_as_kubectl_reads_it() -> None:
    (patch,) = parse_patches("spec: {a: 0640, b: yes, c: 2026-01-01, d: 1e3, e: null}", "patch.yaml")
    assert patch.value == {"spec": {"a": 0o640, "b": True, "c": "2026-01-01", "d": 1000.0, "e": None}}


def test_a_patch_for_many_workspaces_calls_the_trainer_by_what_it_does() -> None:
    job = patched(POD % "containers: [{name: trainer, resources: {requests: {cpu: '8'}}}]")
    assert container(job, NAME)["resources"]["requests"]["cpu"] == "8"
    assert len(list(containers(job))) == 4


def test_a_users_own_fields_are_theirs() -> None:
    job = patched(
        """
spec:
  ttlSecondsAfterFinished: 60
  template:
    metadata: {annotations: {team/cost-centre: "42"}}
    spec:
      hostAliases: [{ip: 10.0.0.1, hostnames: [registry]}]
      volumes: [{name: data-volume, emptyDir: {sizeLimit: 1Ti}}]
      initContainers: [{name: data-downloader, env: [{name: HTTPS_PROXY, value: "http://proxy:3128"}]}]
"""
    )
    assert job["spec"]["ttlSecondsAfterFinished"] == 60
    assert volume(job, "data-volume")["emptyDir"]["sizeLimit"] == "1Ti"
    assert container(job, "data-downloader")["env"][0]["name"] == "HTTPS_PROXY"
    assert pod_spec(job)["hostAliases"]


JUNK: list[Any] = [None, 1, "x", [], {}, [1], ["x"], [None], [{}], [{"name": "x"}], [[]], {"a": 1}, {"name": 1}, True]
JUNK += [{"$patch": "delete"}, {"$patch": "replace"}, [{"$patch": "replace"}], [{"$patch": "delete", "name": "tmp"}]]


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in children for place in places(each, (*path, key)))]


def patch_at(job: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """The patch that puts `value` at a place of the Job; an item of a list is named as it is there."""
    if not place:
        return value
    key, *rest = place
    inner = patch_at(job[key], tuple(rest), value)
    if isinstance(key, str):
        return {key: inner}
    names = {name: job[key][name] for name in ("name", "mountPath") if isinstance(job[key], dict) and name in job[key]}
    return [{**names, **inner} if isinstance(inner, dict) else inner]


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(places(JOB)), value=st.sampled_from(JUNK))
def test_whatever_a_patch_holds_anywhere_it_is_refused_in_words_or_gives_a_job(
    place: tuple[str | int, ...], value: Any
) -> None:
    try:
        job = apply_patches(JOB, parse_patches(json.dumps(patch_at(JOB, place, value)), "patch.yaml"))
    except ConfigError:
        return
    assert all(str(problem) for problem in (*job_problems(job), *restricted_problems(pod_spec(job))))
    ours = [each["name"] for each in containers(JOB)]
    assert [each.get("name") for each in containers(job) if each.get("name") in ours] == ours
    assert job["metadata"]["name"] == NAME


# ── the guard ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("metadata: {name: other}", "metadata.name"),
        ("metadata: {labels: {kaito.sh/workspace: other}}", "metadata.labels[kaito.sh/workspace]"),
        ("metadata: {labels: {$patch: delete}}", "metadata.labels[kaito.sh/workspace]"),
        ("metadata: {annotations: {tuner/run-digest: x}}", "metadata.annotations[tuner/run-digest]"),
        ("metadata: {ownerReferences: []}", "metadata.ownerReferences"),
        ("spec: {parallelism: 2}", "spec.parallelism"),
        ("spec: {podReplacementPolicy: TerminatingOrFailed}", "spec.podReplacementPolicy"),
        ("spec: {podFailurePolicy: {rules: []}}", "spec.podFailurePolicy.rules"),
        ("spec: {podFailurePolicy: null}", "spec.podFailurePolicy.rules"),
        (POD % "restartPolicy: OnFailure", "spec.template.spec.restartPolicy"),
        (POD % "automountServiceAccountToken: true", "spec.template.spec.automountServiceAccountToken"),
        (POD % "shareProcessNamespace: true", "spec.template.spec.shareProcessNamespace"),
        (POD % "containers: [{name: trainer, args: [shell]}]", f"containers[name={NAME}].args"),
        (POD % "containers: [{name: pusher, resources: {limits: {memory: 2Gi}}}]", "containers[name=pusher]"),
        (POD % "initContainers: [{name: pusher, restartPolicy: null}]", "initContainers[name=pusher].restartPolicy"),
        (POD % "initContainers: [{name: pusher, command: [sh]}]", "initContainers[name=pusher].command"),
        (POD % "initContainers: [{name: pusher, $patch: delete}]", "initContainers[name=pusher]"),
        (POD % "containers: [{$patch: replace}, {name: x, image: y}]", f"containers[name={NAME}]"),
        (POD % "volumes: [{name: run, emptyDir: {medium: Memory}}]", "volumes[name=run]"),
        (POD % "volumes: [{name: docker-config, secret: {secretName: other}}]", "volumes[name=docker-config]"),
        (
            POD % "initContainers: [{name: pusher, volumeMounts: [{$patch: delete, mountPath: /run/tuner}]}]",
            "initContainers[name=pusher].volumeMounts[mountPath=/run/tuner]",
        ),
        (
            POD % "containers: [{name: trainer, volumeMounts: [{name: docker-config, mountPath: /x}]}]",
            f"containers[name={NAME}].volumeMounts[mountPath=/x]",
        ),
        (
            POD % "containers: [{name: trainer, env: [{name: T, valueFrom: {secretKeyRef: {name: a, key: b}}}]}]",
            f"containers[name={NAME}].env[name=T]",
        ),
        (POD % "containers: [{name: trainer, envFrom: [{secretRef: {name: a}}]}]", f"containers[name={NAME}].envFrom"),
        ("spec: {template: {$patch: delete}}", "spec.template.spec.restartPolicy"),
        ("spec: {$patch: delete}", "spec"),
    ],
)
def test_what_would_break_the_run_or_give_its_secrets_away_is_refused(text: str, path: str) -> None:
    assert any(f"patch, {path}:" in refusal or f".{path}:" in refusal for refusal in refusals(text)), refusals(text)


def test_every_refusal_of_a_patch_comes_at_once_and_says_why() -> None:
    found = refusals("metadata: {name: other}\n" + POD % "restartPolicy: Always, hostPID: true")
    assert found == [
        "patch, metadata.name: is not for a patch to change: its objects go together",
        "patch, spec.template.spec.restartPolicy: is not for a patch to change: podFailurePolicy needs Never",
        "patch, spec.template.spec.hostPID: is not for a patch to change: the trainer could read the other containers' "
        "secrets",
    ]


def test_rules_of_ones_own_go_after_ours() -> None:
    ours = render(workspace()).job["spec"]["podFailurePolicy"]["rules"]
    mine = {"action": "Count", "onExitCodes": {"containerName": NAME, "operator": "In", "values": [1]}}
    job = patched(yaml.safe_dump({"spec": {"podFailurePolicy": {"rules": [*ours, mine]}}}))
    assert job["spec"]["podFailurePolicy"]["rules"][-1] == mine


# ── where patches come from ──────────────────────────────────────────────────────────────────────────────────────────

PATCHES = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "patches"},
    "data": {"big": POD % "containers: [{name: trainer, resources: {requests: {cpu: '16'}}}]"},
}
ANNOTATED = {"annotations": {"tuner/job-patch": "patches/big"}}


def test_an_annotation_names_a_patch_and_typed_ones_come_after_it() -> None:
    job = render(workspace(**ANNOTATED), PATCHES, patch_annotation=True).job
    assert container(job, NAME)["resources"]["requests"]["cpu"] == "16"
    typed = parse_patches(POD % "containers: [{name: trainer, resources: {requests: {cpu: '4'}}}]", "typed")
    job = render(workspace(**ANNOTATED), PATCHES, patch_annotation=True, patches=tuple(typed)).job
    assert container(job, NAME)["resources"]["requests"]["cpu"] == "4"


def test_whoever_renders_with_other_rights_leaves_the_annotation_out_and_says_so() -> None:
    objects = render(workspace(**ANNOTATED), PATCHES)
    assert container(objects.job, NAME)["resources"]["requests"]["cpu"] == "2"
    assert any("the annotation tuner/job-patch is left out" in note for note in objects.notes)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("patches", "'patches' is not CONFIGMAP/KEY"),
        ("other/big", "ConfigMap 'other' is not in the Workspace's file"),
        ("patches/small", "the key 'small' of ConfigMap 'patches' is not in the Workspace's file"),
    ],
)
def test_a_patch_that_is_not_there_is_said(written: str, message: str) -> None:
    annotated = workspace(annotations={"tuner/job-patch": written})
    with pytest.raises(Exception, match=message.replace("[", "\\[")):
        render(annotated, PATCHES, patch_annotation=True)


def test_a_patched_job_is_checked_as_any_other() -> None:
    small = parse_patches(POD % "volumes: [{name: dshm, emptyDir: {sizeLimit: 1Ti}}]", "patch.yaml")
    with pytest.raises(ConfigError, match=f"may hold more than {NAME} may use of memory"):
        render(workspace(), patches=tuple(small))
    two_kinds = parse_patches(POD % "volumes: [{name: data-volume, nfs: {server: a, path: /}}]", "patch.yaml")
    with pytest.raises(ConfigError, match="must be exactly one kind of volume; it is emptyDir, nfs"):
        render(workspace(), patches=tuple(two_kinds))


# ── typos ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("patch", "said", "meant"),
    [
        ("spec: {templte: {spec: {nodeSelector: {a: b}}}}", "Kubernetes has no 'templte' there", "template"),
        (POD % "tolerationss: []", "Kubernetes has no 'tolerationss' there", "tolerations"),
        (POD % "containers: [{name: traner, image: x}]", "is no container of the run", "trainer"),
        (POD % "containers: [{name: trainer, resorces: {}}]", "Kubernetes has no 'resorces' there", "resources"),
    ],
)
def test_a_typo_in_a_patch_is_said_with_what_was_meant(patch: str, said: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        patched(patch)
    problem = caught.value.problems[0]
    assert said in str(problem)
    assert problem.hint == f'did you mean "{meant}"?'


def test_what_only_a_newer_server_knows_and_a_sidecar_of_ones_own_pass() -> None:
    made = patched(POD % "quantumLink: {}, initContainers: [{name: proxy, image: x, restartPolicy: Always}]")
    assert "quantumLink" in pod_spec(made)
    assert "proxy" in [each["name"] for each in pod_spec(made)["initContainers"]]


def test_the_patch_for_openshift_leaves_the_uid_to_the_cluster_in_every_job_of_a_run() -> None:
    """restricted-v2 refuses a uid that is not of the namespace's range; that the image takes any is run elsewhere."""
    page = (Path(__file__).parents[1] / "docs" / "kubernetes.md").read_text()
    (block,) = [
        each for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if each.startswith("# openshift.yaml")
    ]
    job = patched(block, results_volume="results")
    for each in (job, render_check_job(job), render_retry_push(job)):
        security = pod_spec(each)["securityContext"]
        assert not security.keys() & {"runAsUser", "runAsGroup", "fsGroup"}
        assert security["runAsNonRoot"] is True
        assert restricted_problems(pod_spec(each)) == []
        assert job_problems(each) == []
