"""A file of job_templates/ → the manifest in it, and the ways to change one: by name, never by index, never as text.

The files are complete manifests with example values. What is asked for by a name that is not there is a mistake in a
template or in the code that fills it in, not the user's: KeyError.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from tuner.data import data_dir

Manifest = dict[str, Any]
DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
EXAMPLE_NAME = "my-adapter"  # the Workspace of the templates, as which their trainer is called

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: ten times as quick


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks that people can read, where YAML has such for them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def load_template(name: str) -> Manifest:
    """The one manifest of job_templates/`name`, for the caller to change."""
    (manifest,) = load_templates(name)
    return manifest


def load_templates(name: str) -> list[Manifest]:
    """Every manifest of job_templates/`name`."""
    text = (data_dir("job_templates") / name).read_text(encoding="utf-8")
    return [document for document in yaml.load_all(text, _Loader) if document]


def dump_manifests(manifests: Iterable[Mapping[str, Any]]) -> str:
    """YAML that kubectl takes, a document for each manifest; keys in the order they have."""
    documents = [
        yaml.dump(dict(each), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096, default_flow_style=False)
        for each in manifests
    ]
    return "---\n".join(documents)


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def label(manifest: Manifest, labels: Mapping[str, str]) -> None:
    """Add labels to an object or a pod template."""
    manifest.setdefault("metadata", {}).setdefault("labels", {}).update(labels)


def annotate(manifest: Manifest, annotations: Mapping[str, str]) -> None:
    """Add annotations to an object or a pod template."""
    manifest.setdefault("metadata", {}).setdefault("annotations", {}).update(annotations)


def pod_template(job: Mapping[str, Any]) -> Manifest:
    template: Manifest = job["spec"]["template"]
    return template


def pod_spec(job: Mapping[str, Any]) -> Manifest:
    spec: Manifest = job["spec"]["template"]["spec"]
    return spec


# ── containers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def containers(job: Mapping[str, Any]) -> Iterator[Manifest]:
    """Init containers first, as they run."""
    spec = job["spec"]["template"]["spec"]
    yield from spec.get("initContainers", ())
    yield from spec.get("containers", ())


def container(job: Mapping[str, Any], name: str) -> Manifest:
    return _named(containers(job), name)


def has_container(job: Mapping[str, Any], name: str) -> bool:
    return any(each["name"] == name for each in containers(job))


def rename_container(job: Manifest, name: str, new_name: str) -> None:
    """With what speaks of it: the failure policy's rules and the container that kubectl logs takes."""
    container(job, name)["name"] = new_name
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", ()):
        if rule.get("onExitCodes", {}).get("containerName") == name:
            rule["onExitCodes"]["containerName"] = new_name
    annotations = pod_template(job)["metadata"].get("annotations", {})
    if annotations.get(DEFAULT_CONTAINER) == name:
        annotations[DEFAULT_CONTAINER] = new_name


def set_env(container: Manifest, name: str, value: str) -> None:
    """A variable in clear, in the place of one of that name."""
    put(container.setdefault("env", []), {"name": name, "value": value})


def set_secret_env(container: Manifest, name: str, secret: str, key: str) -> None:
    """A variable from a Secret that must be there."""
    source = {"secretKeyRef": {"name": secret, "key": key, "optional": False}}
    put(container.setdefault("env", []), {"name": name, "valueFrom": source})


def remove_env(container: Manifest, name: str) -> None:
    container["env"] = [each for each in container.get("env", ()) if each["name"] != name]


# ── volumes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def volume(job: Mapping[str, Any], name: str) -> Manifest:
    return _named(job["spec"]["template"]["spec"].get("volumes", ()), name)


def has_volume(job: Mapping[str, Any], name: str) -> bool:
    return any(each["name"] == name for each in job["spec"]["template"]["spec"].get("volumes", ()))


def set_volume(job: Manifest, name: str, source: Mapping[str, Any]) -> None:
    """A volume of this source, in the place of one of that name."""
    put(pod_spec(job).setdefault("volumes", []), {"name": name, **source})


def remove_volume(job: Manifest, name: str) -> None:
    """With its mounts."""
    pod_spec(job)["volumes"] = [each for each in pod_spec(job)["volumes"] if each["name"] != name]
    for each in containers(job):
        unmount(each, name)


def mount(container: Manifest, volume_name: str, path: str, *, read_only: bool = False) -> None:
    """The volume at a path, wherever it was before."""
    mounts = container.setdefault("volumeMounts", [])
    put(mounts, {"name": volume_name, "mountPath": path, **({"readOnly": True} if read_only else {})})


def unmount(container: Manifest, volume_name: str) -> None:
    container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] != volume_name]


def mounts_of(container: Mapping[str, Any], volume_name: str) -> list[Manifest]:
    return [each for each in container.get("volumeMounts", ()) if each["name"] == volume_name]


def move_mounts(job: Manifest, volume_name: str, path: str) -> None:
    """The volume at another path, in every container that has it."""
    for each in containers(job):
        for found in mounts_of(each, volume_name):
            found["mountPath"] = path


def make_read_only(job: Manifest, volume_name: str) -> None:
    for each in containers(job):
        for found in mounts_of(each, volume_name):
            found["readOnly"] = True


# ── by name ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _named(items: Iterable[Manifest], name: str) -> Manifest:
    for each in items:
        if each["name"] == name:
            return each
    raise KeyError(name)


def put(items: list[Manifest], item: Manifest) -> None:
    """In the place of the one of that name, else at the end."""
    for index, each in enumerate(items):
        if each["name"] == item["name"]:
            items[index] = item
            return
    items.append(item)
