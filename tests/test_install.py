"""The controller's installation: what is in it, what it may do, and that kustomize and `tuner install` agree."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tuner.cluster.crd import custom_resource_definition
from tuner.cluster.install import NAME, NAMESPACE, InstallOptions, installation
from tuner.cluster.templates import container, pod_spec
from tuner.data import data_dir
from tuner.errors import ConfigError
from tuner.presets import find_preset
from tuner.training_config import ConfigSource, resolve_training_config

BASE = data_dir("job_templates") / "install"
DEFAULT = installation(InstallOptions())


def key(manifest: dict[str, Any]) -> tuple[str, str, str]:
    return manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]


def by_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in manifests if each["kind"] == kind]


def one(manifests: list[dict[str, Any]], kind: str, name: str = NAME) -> dict[str, Any]:
    (found,) = (each for each in by_kind(manifests, kind) if each["metadata"]["name"] == name)
    return found


def load(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


# ── the same in both ways ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_kustomize_base_is_what_install_prints() -> None:
    names = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml", "namespace-role.yaml"}
    assert set(names) == files
    in_base = {key(each): each for name in names for each in load(BASE / name)}
    assert in_base == {key(each): each for each in DEFAULT}
    assert len(in_base) == 12


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, for its kustomize")
def test_kustomize_builds_it() -> None:
    built = subprocess.run(["kubectl", "kustomize", str(BASE)], check=True, capture_output=True, text=True).stdout
    assert {key(each): each for each in yaml.safe_load_all(built)} == {key(each): each for each in DEFAULT}


def test_the_crd_file_is_what_the_code_makes() -> None:
    """`python scripts/generate_crd.py` writes it."""
    assert load(BASE / "crd.yaml") == [custom_resource_definition()]


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("options", [InstallOptions(), InstallOptions(watch_namespaces=("ml",))])
def test_kubernetes_takes_every_object(options: InstallOptions, version: str) -> None:
    for manifest in installation(options):
        kubernetes_validate.validate(json.loads(json.dumps(manifest)), version, strict=True)


# ── what it may do ───────────────────────────────────────────────────────────────────────────────────────────────────


def allowed(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of every rule that is for any name."""
    return {
        (group, resource, verb)
        for rule in rules
        if "resourceNames" not in rule
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


CLUSTER_RULES = one(DEFAULT, "ClusterRole")["rules"]


def test_nothing_is_allowed_wholesale_and_secrets_cannot_be_read() -> None:
    for manifest in [*DEFAULT, *load(BASE / "namespace-role.yaml")]:
        for rule in manifest.get("rules", ()):
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
    verbs = {verb for group, resource, verb in allowed(CLUSTER_RULES) if resource == "secrets"}
    assert verbs == {"create"}
    assert {resource for _, resource, _ in allowed(CLUSTER_RULES)} == {
        *("workspaces", "workspaces/status", "workspaces/finalizers", "jobs", "controllerrevisions", "configmaps"),
        *("secrets", "pods", "pods/log", "events", "nodes"),
    }


def test_of_the_clusters_own_objects_it_reads_three_by_name() -> None:
    named = {
        (resource, name, verb)
        for rule in CLUSTER_RULES
        for resource in rule["resources"]
        for name in rule.get("resourceNames", ())
        for verb in rule["verbs"]
    }
    assert named == {
        ("deployments", "kaito-workspace", "list"),
        ("validatingwebhookconfigurations", "validation.workspace.kaito.sh", "get"),
        ("customresourcedefinitions", "workspaces.kaito.sh", "get"),
    }


def test_in_a_namespace_it_may_do_the_same_but_for_the_cluster() -> None:
    (role,) = by_kind(load(BASE / "namespace-role.yaml"), "Role")
    lacks = allowed(CLUSTER_RULES) - allowed(role["rules"])
    assert lacks == {("", "nodes", verb) for verb in ("get", "list", "watch")}
    assert allowed(role["rules"]) < allowed(CLUSTER_RULES)


def test_an_installation_for_namespaces_has_nothing_of_the_cluster_but_the_crd() -> None:
    manifests = installation(InstallOptions(namespace="tuning", watch_namespaces=("ml", "nlp")))
    cluster_wide = [each["kind"] for each in manifests if "namespace" not in each["metadata"]]
    assert cluster_wide == ["Namespace", "CustomResourceDefinition"]
    for namespace in ("ml", "nlp"):
        for kind in ("Role", "RoleBinding"):
            assert (kind, namespace, NAME) in map(key, manifests)
    args = container(one(manifests, "Deployment"), "controller")["args"]
    assert [each for each in args if each.startswith("--namespace")] == ["--namespace=ml", "--namespace=nlp"]


def test_every_binding_binds_the_deployments_account_to_a_role_that_is_there() -> None:
    for options in (InstallOptions(), InstallOptions(namespace="tuning", watch_namespaces=("ml", "tuning"))):
        manifests = installation(options)
        account = one(manifests, "ServiceAccount")
        assert account["metadata"]["namespace"] == options.namespace
        assert pod_spec(one(manifests, "Deployment"))["serviceAccountName"] == NAME
        bindings = [*by_kind(manifests, "RoleBinding"), *by_kind(manifests, "ClusterRoleBinding")]
        assert bindings
        for binding in bindings:
            role = binding["roleRef"]
            assert (role["kind"], binding["metadata"].get("namespace", ""), role["name"]) in map(key, manifests)
            assert binding["subjects"] == [
                {"kind": "ServiceAccount", "name": NAME, "namespace": options.namespace},
            ]


# ── the pods ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_pods_keep_to_the_restricted_standard() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    assert (
        one(DEFAULT, "Namespace", NAMESPACE)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )
    pod = pod_spec(one(DEFAULT, "Deployment"))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers", "hostUsers"}
    assert [set(each) - {"name"} for each in pod["volumes"]] == [{"emptyDir"}]
    for each in pod["containers"]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_two_replicas_of_which_one_may_go_are_probed_and_bounded() -> None:
    deployment, budget, policy = (one(DEFAULT, each) for each in ("Deployment", "PodDisruptionBudget", "NetworkPolicy"))
    assert deployment["spec"]["replicas"] == 2
    assert budget["spec"]["minAvailable"] == 1
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"], budget["spec"]["selector"], policy["spec"]["podSelector"]):
        assert selector["matchLabels"].items() <= labels.items()
    controller = container(deployment, "controller")
    ports = {each["name"]: each["containerPort"] for each in controller["ports"]}
    assert ports == {"metrics": 8080, "health": 8081}
    assert {f"--{name}-port={number}" for name, number in ports.items()} <= set(controller["args"])
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert controller[probe]["httpGet"] == {"path": path, "port": "health"}
    assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == set(ports)
    assert controller["resources"].keys() == {"requests", "limits"}
    assert "--leader-elect" in controller["args"]


def test_variables_in_arguments_are_defined() -> None:
    controller = container(one(DEFAULT, "Deployment"), "controller")
    assert "--image=$(RUN_IMAGE)" in controller["args"]
    assert "RUN_IMAGE" in {each["name"] for each in controller["env"]}


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def images(options: InstallOptions) -> tuple[str, str]:
    controller = container(one(installation(options), "Deployment"), "controller")
    return controller["image"], next(each["value"] for each in controller["env"] if each["name"] == "RUN_IMAGE")


def test_one_image_does_for_both_and_a_slim_one_can_be_named() -> None:
    assert images(InstallOptions(image="reg.example/tuner:1")) == ("reg.example/tuner:1", "reg.example/tuner:1")
    both = InstallOptions(image="reg.example/tuner:1", controller_image="reg.example/control:1")
    assert images(both) == ("reg.example/control:1", "reg.example/tuner:1")


def test_everything_but_the_crd_goes_into_the_namespace_and_says_so() -> None:
    manifests = installation(InstallOptions(namespace="tuning"))
    assert not [
        each for each in manifests if NAMESPACE in json.dumps(each) and each["kind"] != "CustomResourceDefinition"
    ]
    for each in manifests:
        if each["kind"] != "CustomResourceDefinition":
            assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "tuning"
        assert each["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "tuner"
    assert one(manifests, "Namespace", "tuning")
    pod_labels = one(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert pod_labels["app.kubernetes.io/instance"] == "tuning"


def test_an_opened_range_reaches_the_controller_and_leaves_the_crd_to_it() -> None:
    manifests = installation(InstallOptions(allow_cidrs=("10.1.0.0/16",)))
    assert "--allow-cidr=10.1.0.0/16" in container(one(manifests, "Deployment"), "controller")["args"]
    assert one(manifests, "CustomResourceDefinition", "workspaces.kaito.sh") == custom_resource_definition(opened=True)


@pytest.mark.parametrize("cidr", ["10.0.0.0/33", "169.254.0.0/16", "all"])
def test_a_range_that_is_none_or_is_never_opened_is_refused_before_anything_is_applied(cidr: str) -> None:
    with pytest.raises(ConfigError, match="--allow-cidr"):
        installation(InstallOptions(allow_cidrs=(cidr,)))


# ── the default configurations ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_default_configurations_are_our_defaults(method: Any, gpus: int) -> None:
    text = one(DEFAULT, "ConfigMap", f"{method}-params-template")["data"]["training_config.yaml"]
    preset = find_preset("phi-3-mini-4k-instruct")
    written = resolve_training_config(method=method, preset=preset, config_map=ConfigSource(text, "x"), world_size=gpus)
    default = resolve_training_config(method=method, preset=preset, world_size=gpus)
    values = {path: value for path, value, _ in written.origins()}
    assert values == {path: value for path, value, _ in default.origins()}
    assert written.notes == ()
    # what follows the machine is not pinned
    for follows in ("ModelConfig.dtype", "QuantizationConfig.bnb_4bit_compute_dtype", "TrainingArguments.max_length"):
        assert not written.is_written(*follows.split("."))
    assert not written.is_written("TrainingArguments", "gradient_accumulation_steps")
    assert written.is_written("LoraConfig", "r")
