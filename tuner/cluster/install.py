"""The controller into a cluster: the manifests of job_templates/install/ with values set by name, applied or printed.

    InstallOptions ──► installation ──► [Namespace, CRD, RBAC, ConfigMaps, Deployment, …] ──► install ──► the API server

The files are the source: `kubectl apply -k job_templates/install` applies what `tuner install --dry-run` prints.
"""

from dataclasses import dataclass

from tuner.cluster.crd import custom_resource_definition
from tuner.cluster.templates import Manifest, container, label, load_template, load_templates, set_env
from tuner.urls import Allowed

FOLDER = "install"
NAMESPACE = "tuner-system"
NAME = "tuner-controller"
INSTANCE = "app.kubernetes.io/instance"  # the namespace: which of several installations an object is of


@dataclass(frozen=True)
class InstallOptions:
    """`image` is the one that trains, `controller_image` the controller's: the same if there is but one."""

    namespace: str = NAMESPACE
    image: str | None = None
    controller_image: str | None = None
    allow_cidrs: tuple[str, ...] = ()
    watch_namespaces: tuple[str, ...] = ()


def installation(options: InstallOptions) -> list[Manifest]:
    """Every object, in the order to apply them; ConfigError for an --allow-cidr that is no range or is never opened."""
    Allowed.of(options.allow_cidrs, private=False)
    manifests = [
        load_template(f"{FOLDER}/namespace.yaml"),
        custom_resource_definition(opened=bool(options.allow_cidrs)),
        load_template(f"{FOLDER}/service-account.yaml"),
        *_permissions(options),
        *load_templates(f"{FOLDER}/own-namespace-role.yaml"),
        *load_templates(f"{FOLDER}/default-configs.yaml"),
        load_template(f"{FOLDER}/network-policy.yaml"),
        load_template(f"{FOLDER}/disruption-budget.yaml"),
        _deployment(options),
    ]
    for manifest in manifests:
        _put_into(manifest, options.namespace)
    return manifests


def _permissions(options: InstallOptions) -> list[Manifest]:
    """For the whole cluster, or for each namespace that is watched."""
    if not options.watch_namespaces:
        return load_templates(f"{FOLDER}/cluster-role.yaml")
    manifests = []
    for namespace in options.watch_namespaces:
        for manifest in load_templates(f"{FOLDER}/namespace-role.yaml"):
            manifest["metadata"]["namespace"] = namespace
            manifests.append(manifest)
    return manifests


def _deployment(options: InstallOptions) -> Manifest:
    deployment = load_template(f"{FOLDER}/deployment.yaml")
    controller = container(deployment, "controller")
    if image := options.controller_image or options.image:
        controller["image"] = image
    if options.image:
        set_env(controller, "RUN_IMAGE", options.image)
    controller["args"] += [f"--namespace={namespace}" for namespace in options.watch_namespaces]
    controller["args"] += [f"--allow-cidr={cidr}" for cidr in options.allow_cidrs]
    return deployment


def _put_into(manifest: Manifest, namespace: str) -> None:
    """Everything that stands in the templates' namespace into this one."""
    metadata = manifest["metadata"]
    if manifest["kind"] == "Namespace":
        metadata["name"] = namespace
    elif metadata.get("namespace") == NAMESPACE:
        metadata["namespace"] = namespace
    for subject in manifest.get("subjects", ()):
        subject["namespace"] = namespace
    labelled = [manifest] if INSTANCE in metadata.get("labels", {}) else []
    if manifest["kind"] == "Deployment":
        labelled.append(manifest["spec"]["template"])
    for each in labelled:
        label(each, {INSTANCE: namespace})
