"""The controller into a cluster: the manifests of job_templates/install/ with values set by name, applied or printed.

    InstallOptions ──► installation ──► [Namespace, CRD, RBAC, ConfigMaps, Deployment, …] ──► install ──► the API server

The files are the source: `kubectl apply -k job_templates/install` applies what `tuner install --dry-run` prints.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tuner.cluster.api import (
    ALL_NAMESPACES,
    CLUSTER_ROLE,
    CLUSTER_ROLE_BINDING,
    CONFIG_MAP,
    CUSTOM_RESOURCE_DEFINITION,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    NAMESPACE,
    NETWORK_POLICY,
    ROLE,
    ROLE_BINDING,
    SERVICE_ACCOUNT,
    WORKSPACE,
    Api,
    Resource,
    refuse_old_server,
    resource_of,
)
from tuner.cluster.api_errors import ForbiddenError, NotFoundError
from tuner.cluster.crd import NAME as CRD_NAME
from tuner.cluster.crd import custom_resource_definition
from tuner.cluster.kaito import is_ours, refuse_beside_kaito
from tuner.cluster.templates import Manifest, container, label, load_template, load_templates, set_env
from tuner.errors import ConfigError, Problem, UsageError
from tuner.reference import parse_reference
from tuner.urls import Allowed
from tuner.workspace import LABEL, LABEL_CHARACTERS, NOT_A_LABEL

FOLDER = "install"
DEFAULT_NAMESPACE = "tuner-system"
NAME = "tuner-controller"
APP = "app.kubernetes.io/name"
INSTANCE = "app.kubernetes.io/instance"  # the namespace: which of several installations an object is of


Say = Callable[[str], None]


@dataclass(frozen=True)
class InstallOptions:
    """`image` is the one that trains, `controller_image` the controller's: the same if there is but one."""

    namespace: str = DEFAULT_NAMESPACE
    image: str | None = None
    controller_image: str | None = None
    allow_cidrs: tuple[str, ...] = ()
    watch_namespaces: tuple[str, ...] = ()


def installation(options: InstallOptions) -> list[Manifest]:
    """Every object, in the order to apply them.

    Raises ConfigError for a namespace or an image that can be none, and an --allow-cidr that is no range or is never
    opened.
    """
    if problems := list(_name_problems(options)):
        raise ConfigError.of(problems)
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


def _name_problems(options: InstallOptions) -> Iterator[Problem]:
    namespaces = [("--namespace", options.namespace)]
    namespaces += [("--watch-namespace", name) for name in options.watch_namespaces]
    for flag, name in namespaces:
        if len(name) > LABEL_CHARACTERS or not LABEL.fullmatch(name):
            yield Problem(NOT_A_LABEL.format(repr(name)), path=flag)
    for flag, image in (("--image", options.image), ("--controller-image", options.controller_image)):
        try:
            if image is not None:
                parse_reference(image)
        except ConfigError as error:
            yield Problem(error.message, path=flag, hint=error.hint)


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
        set_env(controller, "TUNER_IMAGE", options.image)
    controller["args"] += [f"--namespace={namespace}" for namespace in options.watch_namespaces]
    controller["args"] += [f"--allow-cidr={cidr}" for cidr in options.allow_cidrs]
    return deployment


def _put_into(manifest: Manifest, namespace: str) -> None:
    """Everything that stands in the templates' namespace into this one."""
    metadata = manifest["metadata"]
    if manifest["kind"] == "Namespace":
        metadata["name"] = namespace
    elif metadata.get("namespace") == DEFAULT_NAMESPACE:
        metadata["namespace"] = namespace
    for subject in manifest.get("subjects", ()):
        subject["namespace"] = namespace
    labelled = [manifest] if INSTANCE in metadata.get("labels", {}) else []
    if manifest["kind"] == "Deployment":
        labelled.append(manifest["spec"]["template"])
    for each in labelled:
        label(each, {INSTANCE: namespace})


# ── into a cluster, and out of it ────────────────────────────────────────────────────────────────────────────────────


def install(api: Api, options: InstallOptions, say: Say) -> None:
    """Apply `installation`; what is there already is brought to the same. A line for each object.

    ConfigError, before anything is written, where KAITO's own controller runs. KAITO's CRD stays as it is, and so does
    a namespace that is there.
    """
    if not options.image:
        raise UsageError(
            "give --image, the image of tuner that trains",
            hint="build the target `run` of the Dockerfile and push it; --controller-image names the slim one",
        )
    manifests = installation(options)
    refuse_old_server(api)
    refuse_beside_kaito(api)
    for manifest in manifests:
        resource, title = resource_of(manifest), _title(manifest)
        if reason := _stays(api, manifest):
            say(f"{title}: {reason}")
            continue
        before = api.find(resource, manifest["metadata"]["name"], manifest["metadata"].get("namespace"))
        after = api.apply(manifest)
        unchanged = before and before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]
        say(f"{title}: {'unchanged' if unchanged else 'changed' if before else 'made'}")


def _stays(api: Api, manifest: Manifest) -> str | None:
    """Why this one is not touched, or None."""
    if manifest["kind"] == "Namespace":
        return "is there" if _is_there(api, NAMESPACE, manifest["metadata"]["name"]) else None
    if manifest["kind"] != "CustomResourceDefinition":
        return None
    try:
        crd = api.find(CUSTOM_RESOURCE_DEFINITION, CRD_NAME)
    except ForbiddenError:
        if not api.serves(WORKSPACE):
            raise
        return "is there, and not yours to change"
    if crd is None or is_ours(crd):
        return None
    return (
        "KAITO's is there and stays; with it only the controller refuses what is wrong, and the progress is in "
        "status.performance.metrics"
    )


def _is_there(api: Api, resource: Resource, name: str) -> bool:
    """An object of which not even that may be known is taken to be there."""
    try:
        return api.find(resource, name) is not None
    except ForbiddenError:
        return True


def uninstall(api: Api, namespace: str, say: Say, *, dry_run: bool = False) -> None:
    """Take away what `install` made for this namespace, by its labels. A line for each object.

    Workspaces stay, and with them the CRD, whose deletion would delete them all; so do Jobs, which go on without a
    controller, and the namespace.
    """
    for resource, found in _installed(api, namespace):
        name, where = found["metadata"]["name"], found["metadata"].get("namespace")
        try:
            api.delete(resource, name, where, uid=found["metadata"]["uid"], dry_run=dry_run)
        except NotFoundError:
            continue  # somebody was quicker
        say(f"{_title(found)}: {'would be ' if dry_run else ''}deleted")
    say(f"CustomResourceDefinition {CRD_NAME}, Workspaces, Jobs and Namespace {namespace} stay")


_OF_THE_NAMESPACE = (DEPLOYMENT, DISRUPTION_BUDGET, NETWORK_POLICY, CONFIG_MAP, SERVICE_ACCOUNT)
_OF_THE_CLUSTER = (CLUSTER_ROLE_BINDING, CLUSTER_ROLE)
_ANYWHERE = (ROLE_BINDING, ROLE)


def _installed(api: Api, namespace: str) -> Iterator[tuple[Resource, Manifest]]:
    """The Deployment first, so that nothing runs without its permissions."""
    selector = f"{APP}={NAME},{INSTANCE}={namespace}"
    for resource in _OF_THE_NAMESPACE:
        for found in api.list(resource, namespace, label_selector=selector).items:
            yield resource, found
    for resource in _ANYWHERE:
        try:
            items = api.list(resource, ALL_NAMESPACES, label_selector=selector).items
        except ForbiddenError:
            items = api.list(resource, namespace, label_selector=selector).items
        for found in items:
            yield resource, found
    for resource in _OF_THE_CLUSTER:
        try:
            items = api.list(resource, label_selector=selector).items
        except ForbiddenError:
            continue  # then it was no such installation that was made
        for found in items:
            yield resource, found


def _title(manifest: Manifest) -> str:
    """`Role ml/tuner-controller`"""
    metadata = manifest["metadata"]
    where = f"{metadata['namespace']}/" if metadata.get("namespace") else ""
    return f"{manifest['kind']} {where}{metadata['name']}"
