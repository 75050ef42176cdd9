"""The controller's installation: what is in it, what it may do, and that kustomize and `tuner install` agree."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from tests.fake_kubernetes import FakeKubernetes
from tuner.cli import main
from tuner.cli.commands import app
from tuner.cluster.api import SECRET, WORKSPACE, Api
from tuner.cluster.api_errors import ApiError, ForbiddenError
from tuner.cluster.crd import custom_resource_definition
from tuner.cluster.install import DEFAULT_NAMESPACE, NAME, InstallOptions, install, installation, uninstall
from tuner.cluster.kaito import kaitos_controller, refuse_beside_kaito
from tuner.cluster.templates import container, pod_spec
from tuner.data import data_dir
from tuner.errors import ConfigError, UsageError
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


def test_it_may_change_and_delete_what_it_does_and_nothing_else() -> None:
    changes = {each for each in allowed(CLUSTER_RULES) if each[2] not in ("get", "list", "watch")}
    assert changes == {
        ("kaito.sh", "workspaces", "patch"),
        ("kaito.sh", "workspaces/status", "patch"),
        ("kaito.sh", "workspaces/finalizers", "update"),
        ("batch", "jobs", "create"),
        ("batch", "jobs", "delete"),
        ("apps", "controllerrevisions", "create"),
        ("apps", "controllerrevisions", "delete"),
        ("", "configmaps", "create"),
        ("", "secrets", "create"),
        ("events.k8s.io", "events", "create"),
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
    assert lacks == {("", "nodes", verb) for verb in ("list", "watch")}
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
        one(DEFAULT, "Namespace", DEFAULT_NAMESPACE)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
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


def test_the_controller_understands_its_arguments() -> None:
    options = InstallOptions(allow_cidrs=("10.0.0.0/8",), watch_namespaces=("ml", "nlp"))
    name, *args = container(one(installation(options), "Deployment"), "controller")["args"]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    parsed = command.make_context(name, list(args)).params
    assert (parsed["namespace"], parsed["allow_cidr"]) == (["ml", "nlp"], ["10.0.0.0/8"])
    assert (parsed["leader_elect"], parsed["metrics_port"], parsed["health_port"]) == (True, 8080, 8081)


def test_variables_in_arguments_are_defined() -> None:
    controller = container(one(DEFAULT, "Deployment"), "controller")
    assert "--image=$(TUNER_IMAGE)" in controller["args"]
    assert "TUNER_IMAGE" in {each["name"] for each in controller["env"]}


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def images(options: InstallOptions) -> tuple[str, str]:
    controller = container(one(installation(options), "Deployment"), "controller")
    return controller["image"], next(each["value"] for each in controller["env"] if each["name"] == "TUNER_IMAGE")


def test_names_that_kubernetes_or_a_registry_would_refuse_are_all_said() -> None:
    options = InstallOptions(namespace="Bad", image="Tuner", controller_image="a b", watch_namespaces=("ml", "n_s"))
    with pytest.raises(ConfigError) as caught:
        installation(options)
    assert [str(problem).partition(": ")[0] for problem in caught.value.problems] == [
        "--namespace",
        "--watch-namespace",
        "--image",
        "--controller-image",
    ]


def test_one_image_does_for_both_and_a_slim_one_can_be_named() -> None:
    assert images(InstallOptions(image="reg.example/tuner:1")) == ("reg.example/tuner:1", "reg.example/tuner:1")
    both = InstallOptions(image="reg.example/tuner:1", controller_image="reg.example/control:1")
    assert images(both) == ("reg.example/control:1", "reg.example/tuner:1")


def test_everything_but_the_crd_goes_into_the_namespace_and_says_so() -> None:
    manifests = installation(InstallOptions(namespace="tuning"))
    assert not [
        each
        for each in manifests
        if DEFAULT_NAMESPACE in json.dumps(each) and each["kind"] != "CustomResourceDefinition"
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
    values = {path: value for path, value, _ in written.explained()}
    assert values == {path: value for path, value, _ in default.explained()}
    assert written.notes == ()
    # what follows the machine is not pinned
    for follows in ("ModelConfig.dtype", "QuantizationConfig.bnb_4bit_compute_dtype", "TrainingArguments.max_length"):
        assert follows not in written.origins
    assert "TrainingArguments.gradient_accumulation_steps" not in written.origins
    assert "LoraConfig.r" in written.origins


# ── into a cluster ───────────────────────────────────────────────────────────────────────────────────────────────────

OPTIONS = InstallOptions(image="reg.example/tuner:1")


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    with FakeKubernetes(workspaces=False, job_controller=False, namespaces=("default", "ml")) as fake:
        yield fake


@pytest.fixture
def kubeconfig(cluster: FakeKubernetes, tmp_path: Path) -> Path:
    return cluster.write_kubeconfig(tmp_path / "kubeconfig")


@pytest.fixture
def api(kubeconfig: Path) -> Api:
    return Api.from_config(namespace="default", env={"KUBECONFIG": str(kubeconfig)}, patience_s=5)


def install_into(api: Api, options: InstallOptions = OPTIONS) -> list[str]:
    said: list[str] = []
    install(api, options, said.append)
    return said


def names(cluster: FakeKubernetes) -> set[tuple[str, str, str]]:
    plurals = "namespaces customresourcedefinitions serviceaccounts clusterroles clusterrolebindings roles rolebindings"
    plurals += " configmaps networkpolicies poddisruptionbudgets deployments"
    return {key(each) for plural in plurals.split() for each in cluster.objects(plural)}


def test_install_makes_what_it_prints_and_workspaces_can_be_made(cluster: FakeKubernetes, api: Api) -> None:
    before = names(cluster)
    assert all(line.endswith(": made") for line in install_into(api))
    assert names(cluster) - before == {key(each) for each in installation(OPTIONS)}
    assert api.serves(WORKSPACE)


def test_installing_twice_changes_nothing_and_another_image_one_object(cluster: FakeKubernetes, api: Api) -> None:
    install_into(api)
    again = install_into(api)
    assert {line.rpartition(": ")[2] for line in again} == {"unchanged", "is there"}
    changed = [line for line in install_into(api, InstallOptions(image="reg.example/tuner:2")) if "changed" in line]
    assert [line for line in changed if not line.endswith("unchanged")] == [
        "Deployment tuner-system/tuner-controller: changed"
    ]


def test_a_namespace_that_is_there_keeps_its_labels(cluster: FakeKubernetes, api: Api) -> None:
    said = install_into(api, InstallOptions(image="reg.example/tuner:1", namespace="ml"))
    assert said[0] == "Namespace ml: is there"
    (namespace,) = (each for each in cluster.objects("namespaces") if each["metadata"]["name"] == "ml")
    assert "pod-security.kubernetes.io/enforce" not in namespace["metadata"].get("labels", {})


KAITOS_CRD = custom_resource_definition() | {"metadata": {"name": "workspaces.kaito.sh"}}


def test_kaitos_crd_is_never_overwritten(cluster: FakeKubernetes, api: Api) -> None:
    api.create(KAITOS_CRD)
    before = cluster.objects("customresourcedefinitions")
    (said,) = (line for line in install_into(api) if line.startswith("CustomResourceDefinition"))
    assert "KAITO's is there and stays" in said
    assert cluster.objects("customresourcedefinitions") == before


def test_our_own_crd_is_brought_up_to_date(cluster: FakeKubernetes, api: Api) -> None:
    install_into(api)
    opened = InstallOptions(image="reg.example/tuner:1", allow_cidrs=("10.0.0.0/8",))
    assert "CustomResourceDefinition workspaces.kaito.sh: changed" in install_into(api, opened)


def deployment(replicas: int = 1, name: str = "kaito-workspace") -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "ml"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {}}, "template": {}},
    }


WEBHOOK = {
    "apiVersion": "admissionregistration.k8s.io/v1",
    "kind": "ValidatingWebhookConfiguration",
    "metadata": {"name": "validation.workspace.kaito.sh"},
}


@pytest.mark.parametrize("there", [deployment(), WEBHOOK], ids=["deployment", "webhook"])
def test_beside_kaitos_controller_nothing_is_written(there: dict[str, Any], cluster: FakeKubernetes, api: Api) -> None:
    cluster.put(there)
    before = names(cluster)
    with pytest.raises(ConfigError, match="KAITO's own controller is in this cluster") as caught:
        install_into(api)
    assert "tuner submit" in (caught.value.hint or "")
    assert names(cluster) == before


def test_a_deployment_without_replicas_or_of_another_name_is_no_controller(cluster: FakeKubernetes, api: Api) -> None:
    cluster.put(deployment(replicas=0))
    cluster.put(deployment(name="workspace"))
    assert kaitos_controller(api) is None


def test_the_controller_may_ask_for_kaitos_with_its_own_permissions(cluster: FakeKubernetes, api: Api) -> None:
    cluster.allow_only(CLUSTER_RULES)
    cluster.put(deployment())
    assert kaitos_controller(api) == "Deployment kaito-workspace in namespace ml"
    with pytest.raises(ConfigError):
        refuse_beside_kaito(api)
    with pytest.raises(ForbiddenError):
        api.list(SECRET)


def test_who_may_see_nothing_of_the_cluster_asks_in_vain_and_goes_on(cluster: FakeKubernetes, api: Api) -> None:
    cluster.put(deployment())
    cluster.allow_only([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}])
    assert kaitos_controller(api) is None


def test_a_server_that_does_not_know_the_rules_is_too_old(tmp_path: Path) -> None:
    with FakeKubernetes(version=(1, 28)) as old:
        api = Api.from_config(env={"KUBECONFIG": str(old.write_kubeconfig(tmp_path / "old"))})
        with pytest.raises(ConfigError, match=r"1\.28.*, and 1\.29 or newer is needed"):
            install_into(api)


def test_without_an_image_nothing_is_installed(api: Api) -> None:
    with pytest.raises(UsageError, match="--image"):
        install_into(api, InstallOptions())


def written(**tuning: Any) -> dict[str, Any]:
    """`kubectl apply` of a Workspace, as it reaches the server."""
    section = {
        "preset": {"name": "phi-4-mini-instruct"},
        "method": "qlora",
        "input": {"urls": ["https://data.contoso.com/train.parquet"]},
        "output": {"image": "contoso.azurecr.io/adapters/tickets:1", "imagePushSecret": "contoso-registry"},
    }
    metadata = {"name": "tickets", "namespace": "default"}
    return {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": metadata, "tuning": section | tuning}


def test_after_it_each_mistake_is_refused_at_apply_with_its_sentence(cluster: FakeKubernetes, api: Api) -> None:
    install_into(api)
    cluster.evaluates_rules = True
    mistakes = {
        "must be lora or qlora, not 'dora'": {"method": "dora"},
        "must specify imagePushSecret with destination image": {"output": {"image": "contoso.azurecr.io/a:1"}},
        "169.254.169.254 is a link-local address": {"input": {"urls": ["http://169.254.169.254/latest?sig=sesame"]}},
        "exactly one of urls, image or volumeSource": {"input": {}},
        "ACR_REPO_HERE is a placeholder": {"output": {"image": "ACR_REPO_HERE.azurecr.io/a", "imagePushSecret": "x"}},
        "the cluster does not know this field: tuning.methd": {"methd": "lora"},
    }
    for sentence, mistake in mistakes.items():
        with pytest.raises(ApiError, match=re.escape(sentence)) as caught:
            api.apply(written(**mistake))
        assert "sesame" not in str(caught.value)
    api.apply(written())
    with pytest.raises(ApiError, match="the method cannot be changed"):
        api.apply(written(method="lora"))
    with pytest.raises(ApiError, match="is a loopback address"):
        api.apply(written(input={"urls": ["http://127.0.0.1/"]}))
    api.apply(written(method="QLoRA", config="other"))


# ── and out of it ────────────────────────────────────────────────────────────────────────────────────────────────────


def uninstall_from(api: Api, namespace: str = DEFAULT_NAMESPACE, **options: Any) -> list[str]:
    said: list[str] = []
    uninstall(api, namespace, said.append, **options)
    return said


def user_objects(cluster: FakeKubernetes) -> tuple[Any, ...]:
    return cluster.objects("workspaces"), cluster.objects("jobs"), cluster.objects("configmaps", "ml")


@pytest.mark.parametrize("watched", [(), ("ml", "default")])
def test_uninstall_takes_what_install_made_and_leaves_the_users(
    watched: tuple[str, ...], cluster: FakeKubernetes, api: Api
) -> None:
    before = names(cluster)
    install_into(api, InstallOptions(image="reg.example/tuner:1", watch_namespaces=watched))
    for kind, version in (("Workspace", "kaito.sh/v1beta1"), ("Job", "batch/v1"), ("ConfigMap", "v1")):
        cluster.put({"apiVersion": version, "kind": kind, "metadata": {"name": "mine", "namespace": "ml"}})
    mine = user_objects(cluster)
    assert all(mine)
    would = uninstall_from(api, dry_run=True)
    said = uninstall_from(api)
    assert [line.replace("would be ", "") for line in would] == said
    assert user_objects(cluster) == mine
    assert names(cluster) - before == {
        ("Namespace", "", DEFAULT_NAMESPACE),
        ("CustomResourceDefinition", "", "workspaces.kaito.sh"),
        ("ConfigMap", "ml", "mine"),
    }
    assert said[0] == "Deployment tuner-system/tuner-controller: deleted"
    assert said[-1].startswith("CustomResourceDefinition workspaces.kaito.sh, Workspaces, Jobs and Namespace")


def test_uninstall_leaves_another_installation_alone(cluster: FakeKubernetes, api: Api) -> None:
    install_into(api, InstallOptions(image="reg.example/tuner:1", watch_namespaces=("ml",)))
    before = names(cluster)
    other = InstallOptions(image="reg.example/tuner:1", namespace="other", watch_namespaces=("default",))
    install_into(api, other)
    uninstall_from(api, "other")
    assert names(cluster) - before == {("Namespace", "", "other")}


# ── as commands ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_install_prints_yaml_and_asks_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install", "--dry-run"]) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert printed == DEFAULT
    assert main(shlex.split("install --dry-run -n tuning --image reg.example/t:1 --watch-namespace ml")) == 0
    options = InstallOptions(namespace="tuning", image="reg.example/t:1", watch_namespaces=("ml",))
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == installation(options)


def test_install_and_uninstall_as_commands(
    cluster: FakeKubernetes, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    assert main(["install"]) == 64
    assert main(["install", "--image", "reg.example/tuner:1"]) == 0
    assert cluster.objects("deployments", "tuner-system")
    assert main(["uninstall"]) == 0
    assert not cluster.objects("deployments", "tuner-system")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rollout status deployment tuner-controller" in captured.err
    cluster.put(deployment())
    assert main(["install", "--image", "reg.example/tuner:1"]) == ConfigError.exit_code
