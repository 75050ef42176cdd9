"""Every Workspace of tests/workspaces and every variant, rendered: as read in review, and as a server would take it.

`pytest tests/test_golden.py --update-golden` writes tests/golden/ anew; read what changed before you commit it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.fake_kubernetes import FakeKubernetes
from tuner.cli import main
from tuner.cluster.api import Api
from tuner.cluster.beside import render_retry_push
from tuner.cluster.checks import job_problems, restricted_problems
from tuner.cluster.templates import containers, dump_manifests, load_templates
from tuner.data import data_dir
from tuner.workspace import parse_workspace_text

HERE = Path(__file__).parent
WORKSPACES, GOLDEN = HERE / "workspaces", HERE / "golden"
IMAGE = "registry.example.com/tuner@sha256:" + "0123456789abcdef" * 4
ADAPTER = "contoso.azurecr.io/adapters/phi-3@sha256:" + "fedcba9876543210" * 4
OLDEST = "1.29"  # that the plain Job is promised for
NEWEST = max(
    (
        path.name.split(".")
        for path in Path(kubernetes_validate.__file__).parent.glob("kubernetes-json-schema/v*-local")
    ),
    key=lambda parts: int(parts[1]),
)[1]


@dataclass(frozen=True)
class Case:
    """A Workspace and what is typed. `since` is the oldest Kubernetes whose schema knows all of it."""

    workspace: str
    flags: tuple[str, ...] = ()
    since: str = OLDEST
    patch: str | None = field(default=None, repr=False)


CASES: dict[str, Case] = {
    "quick-start": Case("quick_start_filled.yaml"),
    "from-cluster": Case("from_cluster.yaml"),
    "image-input": Case("image_input.yaml"),
    "several-documents": Case("several_documents.yaml"),
    "v1alpha1": Case("v1alpha1.yaml"),
    "volumes": Case("volumes.yaml"),
    "check-job": Case("image_input.yaml", ("--check-job",)),
    "check-job-volumes": Case("volumes.yaml", ("--check-job",)),
    "claims": Case("quick_start_filled.yaml", ("--results-volume", "results", "--weights-volume", "weights")),
    "eight-gpus": Case("from_cluster.yaml", ("--instance-type", "Standard_ND96isr_H100_v5")),
    "identity": Case(
        "from_cluster.yaml",
        ("--service-account", "tuner", "--workload-identity", "--image-pull-secret", "our-registry"),
    ),
    "image-volume": Case("image_input.yaml", ("--image-volume",), since="1.31"),
    "patched": Case(
        "from_cluster.yaml",
        patch="""
spec:
  template:
    metadata: {annotations: {team/cost-centre: "42"}}
    spec:
      tolerations: [{key: team, operator: Equal, value: nlp, effect: NoSchedule}]
      hostAliases: [{ip: 10.0.0.7, hostnames: [registry.internal]}]
      initContainers:
        - name: data-downloader
          env: [{name: HTTPS_PROXY, value: "http://proxy.internal:3128"}]
      containers:
        - name: trainer
          resources: {requests: {cpu: "12", memory: 64Gi}, limits: {memory: 128Gi}}
      volumes:
        - {name: data-volume, $retainKeys: [name, ephemeral], ephemeral: {volumeClaimTemplate: {spec: {
            accessModes: [ReadWriteOnce], resources: {requests: {storage: 500Gi}}}}}}
""",
    ),
    "queue": Case(
        "from_cluster.yaml",
        (
            *("--spot", "--queue", "gpus", "--queue-priority", "high", "--priority-class", "batch"),
            *("--scheduler", "volcano", "--runtime-class", "nvidia", "--ttl", "86400", "--deadline", "43200"),
            *("--retries", "6", "--push-hold", "600", "--namespace", "tuning"),
        ),
    ),
    "smoke": Case("quick_start_filled.yaml", ("--smoke", "--output", "contoso.azurecr.io/adapters/phi-3:smoke")),
    "serving-kaito": Case("from_cluster.yaml", ("--serving", "kaito", "--adapter", ADAPTER)),
    "serving-kaito-strength": Case(
        "from_cluster.yaml", ("--serving", "kaito", "--adapter", ADAPTER, "--strength", "0.8")
    ),
    "serving-vllm": Case("from_cluster.yaml", ("--serving", "vllm", "--adapter", ADAPTER)),
    "serving-vllm-volume": Case("volumes.yaml", ("--serving", "vllm", "--gpus", "2")),
}
NOT_FOR_A_CLUSTER = {
    "inference.yaml": "this command runs tuning",
    "outdated_falcon.yaml": "Standard_NC12s_v3: V100-16 has compute capability 7.0",
    "quick_start.yaml": "has placeholders of an example",
}


def rendered(case: Case, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    flags = [*case.flags]
    if case.patch:
        (tmp_path / "patch.yaml").write_text(case.patch)
        flags += ["--patch", str(tmp_path / "patch.yaml")]
    assert main(["render", str(WORKSPACES / case.workspace), "--set-image", IMAGE, *flags]) == 0
    return capsys.readouterr().out


def golden(name: str) -> list[dict[str, Any]]:
    documents = list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))
    assert documents
    return documents


def is_same(name: str, text: str, request: pytest.FixtureRequest) -> bool:
    path = GOLDEN / f"{name}.yaml"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return path.is_file() and path.read_text() == text


@pytest.mark.parametrize("name", CASES)
def test_a_workspace_becomes_what_was_read_in_review(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = rendered(CASES[name], capsys, tmp_path)
    assert is_same(name, text, request), f"golden/{name}.yaml differs: --update-golden, then read the difference"


def test_a_second_push_becomes_what_was_read_in_review(request: pytest.FixtureRequest) -> None:
    (job,) = [each for each in golden("claims") if each["kind"] == "Job"]
    assert is_same("retry-push", dump_manifests([render_retry_push(job)]), request)


def test_every_example_workspace_is_rendered_or_refused_for_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    there = {path.name for path in WORKSPACES.glob("*.yaml")}
    assert there == {case.workspace for case in CASES.values()} | NOT_FOR_A_CLUSTER.keys()
    for name, reason in NOT_FOR_A_CLUSTER.items():
        assert main(["render", str(WORKSPACES / name), "--set-image", IMAGE]) == 78
        assert reason in capsys.readouterr().err


def test_there_is_a_golden_file_for_every_case_and_no_other() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == {*CASES, "retry-push"}


# ── what a server would say ──────────────────────────────────────────────────────────────────────────────────────────


def validate(manifest: dict[str, Any], minor: str) -> None:
    kubernetes_validate.validate(manifest, minor, strict=True)


@pytest.mark.parametrize("name", [*CASES, "retry-push"])
def test_each_manifest_is_of_the_strict_schema_of_its_oldest_kubernetes_and_of_the_newest(name: str) -> None:
    since = CASES[name].since if name in CASES else OLDEST
    for manifest in golden(name):
        if manifest["apiVersion"].startswith("kaito.sh/"):
            continue  # KAITO's own: below
        for minor in (since, f"1.{NEWEST}"):
            validate(manifest, minor)


def test_the_schema_check_sees_what_is_not_in_an_older_kubernetes() -> None:
    (job,) = [each for each in golden("image-volume") if each["kind"] == "Job"]
    with pytest.raises(kubernetes_validate.ValidationError, match="image"):
        validate(job, "1.30")
    with pytest.raises(kubernetes_validate.ValidationError, match="imgae"):
        validate({**job, "spec": {**job["spec"], "imgae": 1}}, f"1.{NEWEST}")


@pytest.mark.parametrize("name", [*CASES, "retry-push"])
def test_each_job_passes_every_check_and_a_restricted_namespace_takes_its_pods(name: str) -> None:
    for manifest in golden(name):
        if manifest["kind"] == "Job":
            assert job_problems(manifest) == []
        if manifest["kind"] in ("Job", "Deployment"):
            assert restricted_problems(manifest["spec"]["template"]["spec"]) == []


def test_the_serving_workspace_is_one_that_kaito_takes() -> None:
    for name in ("serving-kaito", "serving-kaito-strength"):
        (document,) = golden(name)
        file = parse_workspace_text(yaml.safe_dump(document), name)
        assert file.workspace.inference
        (adapter,) = file.workspace.inference["adapters"]
        assert adapter["source"]["image"] == ADAPTER
        runtime = file.workspace.metadata.annotations.get("kaito.sh/runtime")
        assert (runtime, adapter.get("strength")) in ((None, None), ("transformers", "0.8"))


def test_each_template_is_of_the_strict_schema_as_it_is() -> None:
    names = sorted(path.name for path in data_dir("job_templates").glob("*.yaml"))
    assert len(names) >= 6
    for name in names:
        for manifest in load_templates(name):
            if not manifest["apiVersion"].startswith("kaito.sh/"):
                validate(manifest, OLDEST)
                validate(manifest, f"1.{NEWEST}")


def test_a_server_takes_them_with_strict_fields_and_a_restricted_namespace_makes_their_pods(tmp_path: Path) -> None:
    """Two sets of rules that were written apart, ours and the fake server's, agree on every golden manifest."""
    names = [name for name in (*CASES, "retry-push") if not name.startswith("serving")]
    with FakeKubernetes(namespaces=("kube-system",)) as cluster:
        api = Api.from_config(env={"KUBECONFIG": str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))})
        for index, name in enumerate(names):
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            namespace = f"case-{index}"
            cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
            for manifest in golden(name):
                moved = {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}
                api.create(moved, namespace, dry_run=True, strict=True)
                api.create(moved, namespace, strict=True)
        for index, name in enumerate(names):
            assert len(cluster.objects("pods", f"case-{index}")) == 1, name


def test_no_golden_file_has_a_secret_in_clear() -> None:
    for name in CASES:
        for manifest in golden(name):
            if manifest["kind"] != "Secret":
                assert not any(word in json.dumps(manifest) for word in ("open-sesame", "sig=", "download=true")), name


def test_a_smoke_run_needs_no_gpu_and_any_node_will_do() -> None:
    (job,) = [each for each in golden("smoke") if each["kind"] == "Job"]
    assert "nvidia.com/gpu" not in json.dumps(job["spec"]["template"]["spec"]["containers"])
    assert "affinity" not in job["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("serving")] + ["retry-push"])
def test_the_failure_policy_speaks_of_containers_that_are_there(name: str) -> None:
    """The rules are tried one by one in test_job_policy.py."""
    (job,) = [each for each in golden(name) if each["kind"] == "Job"]
    first, *rules = job["spec"]["podFailurePolicy"]["rules"]
    assert (first["action"], first["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    ends = [each["name"] for each in containers(job) if each.get("restartPolicy") != "Always"]
    assert [rule["onExitCodes"]["containerName"] for rule in rules] == ends
