"""What a Kubernetes API server refuses of an object, for the fake one: names, unknown fields, Jobs and pods.

Each function gives faults: `(field, reason, message)` as a Status has them in `details.causes`.
The field names of built-in kinds are those of kubernetes-validate's newest OpenAPI schema.
"""

import base64
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Fault = tuple[str, str, str]

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
_LABEL_VALUE = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
_LABEL_KEY = rf"({SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_LABEL_KINDS = ("Namespace", "Service")
_PATH_NAMES = ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
_SUBDOMAIN_SAYS = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character"
)
_LABEL_SAYS = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character"
)


# ── unknown fields ───────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _definitions() -> dict[str, Any]:
    import kubernetes_validate

    folders = sorted(
        (Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema").glob("v*-local"),
        key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.name)],
    )
    return dict(json.loads((folders[-1] / "_definitions.json").read_text())["$defs"])


@functools.cache
def _definition(group: str, version: str, kind: str) -> dict[str, Any] | None:
    wanted = {"group": group, "version": version, "kind": kind}
    for definition in _definitions().values():
        if wanted in definition.get("x-kubernetes-group-version-kind", ()):
            return definition
    return None


def undecodable(manifest: Mapping[str, Any], group: str, version: str, kind: str) -> tuple[list[str], list[str]]:
    """Unknown fields, and values of a wrong type, of a built-in kind, as paths."""
    definition = _definition(group, version, kind)
    if definition is None:
        return [], []
    unknown: list[str] = []
    wrong: list[str] = []
    _walk(manifest, definition, "", unknown, wrong)
    return unknown, wrong


def _walk(value: Any, schema: Mapping[str, Any], path: str, unknown: list[str], wrong: list[str]) -> None:
    if "$ref" in schema:
        schema = _definitions()[schema["$ref"].rpartition("/")[2]]
    if value is None:
        return
    wanted = schema.get("type")
    wanted = next((one for one in wanted if one != "null"), None) if isinstance(wanted, list) else wanted
    if schema.get("format") == "int-or-string" or (wanted == "string" and _is_quantity(schema)):
        return
    kinds = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict, "number": (int, float)}
    if wanted in kinds and (
        not isinstance(value, kinds[wanted]) or (isinstance(value, bool) and wanted in ("integer", "number"))
    ):
        wrong.append(f"{path}: {type(value).__name__} where it must be {wanted}")
        return
    properties, extra = schema.get("properties"), schema.get("additionalProperties")
    if isinstance(value, dict) and properties is not None:
        for name, inner in value.items():
            inside = f"{path}.{name}" if path else name
            if name in properties:
                _walk(inner, properties[name], inside, unknown, wrong)
            elif not isinstance(extra, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
                unknown.append(inside)
    elif isinstance(value, dict) and isinstance(extra, dict):
        for name, inner in value.items():
            _walk(inner, extra, f"{path}.{name}", unknown, wrong)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            _walk(inner, schema["items"], f"{path}[{index}]", unknown, wrong)


def _is_quantity(schema: Mapping[str, Any]) -> bool:
    return "Quantity is a fixed-point" in schema.get("description", "")


# ── custom resources ─────────────────────────────────────────────────────────────────────────────────────────────────


def pruned(value: Any, schema: Mapping[str, Any], path: str = "") -> tuple[Any, list[str]]:
    """The value without what a structural schema does not know, with its defaults, and the paths that went."""
    gone: list[str] = []
    return _prune(value, schema, path, gone), gone


def _prune(value: Any, schema: Mapping[str, Any], path: str, gone: list[str]) -> Any:
    properties = schema.get("properties", {})
    if isinstance(value, dict):
        keeps = schema.get("x-kubernetes-preserve-unknown-fields", False)
        extra = schema.get("additionalProperties")
        kept: dict[str, Any] = {}
        for name, inner in value.items():
            inside = f"{path}.{name}" if path else name
            if inside == "metadata":  # whatever a schema says of it, it is what it always is
                kept[name] = inner
            elif name in properties:
                kept[name] = _prune(inner, properties[name], inside, gone)
            elif isinstance(extra, dict):
                kept[name] = _prune(inner, extra, inside, gone)
            elif keeps or extra is True or (not path and name in ("apiVersion", "kind")):
                kept[name] = inner
            else:
                gone.append(inside)
        for name, inner in properties.items():
            if name not in kept and "default" in inner:
                kept[name] = _prune(json.loads(json.dumps(inner["default"])), inner, f"{path}.{name}", gone)
        return kept
    if isinstance(value, list):
        items = schema.get("items", {})
        return [_prune(inner, items, f"{path}[{index}]", gone) for index, inner in enumerate(value)]
    return value


def faults_by_schema(value: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Fault]:
    """What a structural schema says of an object (types, enums, patterns, lengths, what is required)."""
    import jsonschema

    checker = jsonschema.Draft202012Validator({**schema, "$schema": "https://json-schema.org/draft/2020-12/schema"})
    return [
        (".".join(str(part) for part in error.absolute_path), "FieldValueInvalid", error.message)
        for error in checker.iter_errors(dict(value))
        if not (error.absolute_path and error.absolute_path[0] == "metadata")
    ]


def faults_by_rules(new: Mapping[str, Any], old: Mapping[str, Any] | None, schema: Mapping[str, Any]) -> list[Fault]:
    """What the CEL rules of a custom resource say."""
    from tests.crd_server import refusals_by_rules

    return [
        (each.path, "FieldValueInvalid", f'Invalid value: "{each.kind}": {each.message}')
        for each in refusals_by_rules(schema, new, old)
    ]


# ── every object ─────────────────────────────────────────────────────────────────────────────────────────────────────


def faults_of_metadata(kind: str, metadata: Mapping[str, Any]) -> Iterator[Fault]:
    name = str(metadata.get("name") or "")
    if not name:
        yield "metadata.name", "FieldValueRequired", "Required value: name or generateName is required"
    elif kind in _LABEL_KINDS:
        if len(name) > 63 or not re.fullmatch(LABEL, name):
            yield "metadata.name", "FieldValueInvalid", f'Invalid value: "{name}": {_LABEL_SAYS}'
    elif kind not in _PATH_NAMES and (len(name) > 253 or not re.fullmatch(SUBDOMAIN, name)):
        yield "metadata.name", "FieldValueInvalid", f'Invalid value: "{name}": {_SUBDOMAIN_SAYS}'
    yield from faults_of_labels("metadata.labels", metadata.get("labels") or {})
    for key, value in (metadata.get("annotations") or {}).items():
        if not re.fullmatch(_LABEL_KEY, key):
            yield "metadata.annotations", "FieldValueInvalid", f'Invalid value: "{key}": name part must consist of …'
        if not isinstance(value, str):
            yield "metadata.annotations", "FieldValueInvalid", f"Invalid value: {value!r}: must be a string"
    for index, owner in enumerate(metadata.get("ownerReferences") or ()):
        for needed in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(needed):
                yield f"metadata.ownerReferences[{index}].{needed}", "FieldValueRequired", "Required value"


def faults_of_labels(field: str, labels: Mapping[str, Any]) -> Iterator[Fault]:
    for key, value in labels.items():
        if not re.fullmatch(_LABEL_KEY, key) or len(key.rpartition("/")[2]) > 63:
            yield (
                field,
                "FieldValueInvalid",
                f'Invalid value: "{key}": name part must consist of alphanumeric characters',
            )
        if not isinstance(value, str) or len(value) > 63 or not re.fullmatch(_LABEL_VALUE, value):
            more = (
                "must be no more than 63 bytes"
                if len(str(value)) > 63
                else "a valid label must be an empty string or …"
            )
            yield field, "FieldValueInvalid", f'Invalid value: "{value}": {more}'


def faults_of(kind: str, manifest: Mapping[str, Any]) -> list[Fault]:
    found = list(faults_of_metadata(kind, manifest.get("metadata") or {}))
    match kind:
        case "Job":
            found += _faults_of_job(manifest)
        case "Pod":
            found += _faults_of_pod(manifest.get("spec") or {}, "spec")
        case "ConfigMap" | "Secret":
            found += _faults_of_data(kind, manifest)
        case "Event":
            found += _faults_of_event(manifest)
    return found


def _faults_of_data(kind: str, manifest: Mapping[str, Any]) -> Iterator[Fault]:
    size = 0
    for part in ("data", "binaryData"):
        for key, value in (manifest.get(part) or {}).items():
            if not re.fullmatch(r"[-._a-zA-Z0-9]+", key) or len(key) > 253:
                yield f"{part}[{key}]", "FieldValueInvalid", "Invalid value: a valid config key must consist of …"
            size += len(value)
            if kind == "Secret" or part == "binaryData":
                try:
                    base64.b64decode(value, validate=True)
                except ValueError:
                    yield f"{part}[{key}]", "FieldValueInvalid", "Invalid value: illegal base64 data"
    if size > (1 << 20):
        yield "", "FieldValueTooLong", "Too long: may not be more than 1048576 bytes"
    if (
        kind == "Secret"
        and manifest.get("type") == "kubernetes.io/dockerconfigjson"
        and ".dockerconfigjson" not in {**(manifest.get("data") or {}), **(manifest.get("stringData") or {})}
    ):
        yield "data[.dockerconfigjson]", "FieldValueRequired", "Required value"


def _faults_of_event(event: Mapping[str, Any]) -> Iterator[Fault]:
    namespace = (event.get("metadata") or {}).get("namespace")
    about = event.get("involvedObject") or {}
    if about.get("namespace", "") not in (namespace, "") or (not about.get("namespace") and namespace != "default"):
        yield "involvedObject.namespace", "FieldValueInvalid", "Invalid value: does not match event.namespace"
    if not event.get("eventTime"):
        return  # of the core group: the checks of events.k8s.io are not made
    for name, most in (("reportingComponent", 253), ("reportingInstance", 128), ("action", 128), ("reason", 128)):
        if not event.get(name):
            yield name, "FieldValueRequired", "Required value"
        elif len(str(event[name])) > most:
            yield name, "FieldValueInvalid", f"Invalid value: can have at most {most} characters"
    if len(str(event.get("message", "")).encode()) > 1024:  # "characters", the server says, and counts bytes
        yield "message", "FieldValueInvalid", "Invalid value: can have at most 1024 characters"
    if event.get("type") not in ("Normal", "Warning"):
        yield "type", "FieldValueInvalid", f'Invalid value: "{event.get("type")}"'


# ── Jobs and pods ────────────────────────────────────────────────────────────────────────────────────────────────────


def _faults_of_job(job: Mapping[str, Any]) -> Iterator[Fault]:
    spec = job.get("spec") or {}
    template = spec.get("template") or {}
    pod = template.get("spec") or {}
    name = str((job.get("metadata") or {}).get("name", ""))
    if len(name) > 63:
        yield "spec.template.labels", "FieldValueInvalid", f'Invalid value: "{name}": must be no more than 63 bytes'
    yield from faults_of_labels("spec.template.labels", (template.get("metadata") or {}).get("labels") or {})
    yield from _faults_of_pod(pod, "spec.template.spec")
    restart = pod.get("restartPolicy", "Always")
    if restart not in ("Never", "OnFailure"):
        yield (
            "spec.template.spec.restartPolicy",
            "FieldValueNotSupported",
            f'Unsupported value: "{restart}": supported values: "OnFailure", "Never"',
        )
    policy = spec.get("podFailurePolicy")
    if policy is None:
        return
    if restart != "Never":
        yield (
            "spec.template.spec.restartPolicy",
            "FieldValueInvalid",
            f'Invalid value: "{restart}": only "Never" is supported when podFailurePolicy is specified',
        )
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        yield (
            "spec.podReplacementPolicy",
            "FieldValueNotSupported",
            f'Unsupported value: "{spec["podReplacementPolicy"]}": supported values: "Failed"',
        )
    rules = policy.get("rules") or []
    if len(rules) > 20:
        yield "spec.podFailurePolicy.rules", "FieldValueTooMany", f"Too many: {len(rules)}: must have at most 20 items"
    names = {container.get("name") for part in ("initContainers", "containers") for container in pod.get(part) or ()}
    for index, rule in enumerate(rules):
        where = f"spec.podFailurePolicy.rules[{index}]"
        if bool(rule.get("onExitCodes")) == bool(rule.get("onPodConditions")):
            yield where, "FieldValueInvalid", "Invalid value: one of onExitCodes and onPodConditions must be specified"
        codes = rule.get("onExitCodes")
        if not codes:
            continue
        if codes.get("containerName") not in (None, *names):
            yield (
                f"{where}.onExitCodes.containerName",
                "FieldValueInvalid",
                f'Invalid value: "{codes["containerName"]}": must be one of the container or initContainer names in '
                "the pod template",
            )
        values = codes.get("values") or []
        if values != sorted(set(values)) or not values:
            yield f"{where}.onExitCodes.values", "FieldValueInvalid", "Invalid value: must be ordered and unique"
        if codes.get("operator") == "In" and 0 in values:
            yield (
                f"{where}.onExitCodes.values[0]",
                "FieldValueInvalid",
                "Invalid value: 0: must not be 0 for the In operator",
            )


def _faults_of_pod(pod: Mapping[str, Any], where: str) -> Iterator[Fault]:
    volumes = [str(volume.get("name", "")) for volume in pod.get("volumes") or ()]
    for index, name in enumerate(volumes):
        field = f"{where}.volumes[{index}].name"
        if "." in name:
            yield field, "FieldValueInvalid", f'Invalid value: "{name}": must not contain dots'
        elif len(name) > 63 or not re.fullmatch(LABEL, name):
            yield field, "FieldValueInvalid", f'Invalid value: "{name}": {_LABEL_SAYS}'
        if name in volumes[:index]:
            yield field, "FieldValueDuplicate", f'Duplicate value: "{name}"'
    if not pod.get("containers"):
        yield f"{where}.containers", "FieldValueRequired", "Required value"
    seen: list[str] = []
    for part in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(part) or ()):
            yield from _faults_of_container(container, f"{where}.{part}[{index}]", volumes, seen)
            seen.append(str(container.get("name")))


def _faults_of_container(
    container: Mapping[str, Any], where: str, volumes: list[str], seen: list[str]
) -> Iterator[Fault]:
    name = str(container.get("name", ""))
    if len(name) > 63 or not re.fullmatch(LABEL, name):
        yield f"{where}.name", "FieldValueInvalid", f'Invalid value: "{name}": {_LABEL_SAYS}'
    if name in seen:
        yield f"{where}.name", "FieldValueDuplicate", f'Duplicate value: "{name}"'
    if not container.get("image"):
        yield f"{where}.image", "FieldValueRequired", "Required value"
    paths: set[str] = set()
    for index, mount in enumerate(container.get("volumeMounts") or ()):
        if mount.get("name") not in volumes:
            yield f"{where}.volumeMounts[{index}].name", "FieldValueNotFound", f'Not found: "{mount.get("name")}"'
        if mount.get("mountPath") in paths:
            field = f"{where}.volumeMounts[{index}].mountPath"
            yield field, "FieldValueInvalid", f'Invalid value: "{mount["mountPath"]}": must be unique'
        paths.add(mount.get("mountPath"))
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for resource in {*requests, *limits}:
        if "/" not in resource or resource.startswith("kubernetes.io/"):
            continue
        if resource not in limits:
            yield (
                f"{where}.resources.limits",
                "FieldValueRequired",
                "Required value: Limit must be set for non overcommitable resources",
            )
        elif str(requests.get(resource, limits[resource])) != str(limits[resource]):
            field = f"{where}.resources.requests"
            yield (
                field,
                "FieldValueInvalid",
                f'Invalid value: "{requests[resource]}": must be equal to {resource} limit',
            )


def restricted_violations(pod: Mapping[str, Any]) -> list[str]:
    """What Pod Security's restricted level says of a pod spec, in its own words."""
    containers = [*(pod.get("initContainers") or ()), *(pod.get("containers") or ())]
    whole = pod.get("securityContext") or {}

    def without(bad: Any) -> str:
        names = [f'"{container["name"]}"' for container in containers if bad(container.get("securityContext") or {})]
        return f"container{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else ""

    found = []
    if names := without(lambda own: own.get("allowPrivilegeEscalation") is not False):
        found.append(
            f"allowPrivilegeEscalation != false ({names} must set securityContext.allowPrivilegeEscalation=false)"
        )
    if names := without(lambda own: "ALL" not in (own.get("capabilities") or {}).get("drop", ())):
        found.append(f'unrestricted capabilities ({names} must set securityContext.capabilities.drop=["ALL"])')
    if not whole.get("runAsNonRoot") and (names := without(lambda own: own.get("runAsNonRoot") is not True)):
        found.append(f"runAsNonRoot != true (pod or {names} must set securityContext.runAsNonRoot=true)")
    if not whole.get("seccompProfile") and (names := without(lambda own: not own.get("seccompProfile"))):
        found.append(
            f"seccompProfile (pod or {names} must set securityContext.seccompProfile.type to "
            '"RuntimeDefault" or "Localhost")'
        )
    if any("hostPath" in volume for volume in pod.get("volumes") or ()):
        found.append("restricted volume types (hostPath)")
    return found


def immutable_faults(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Fault]:
    """What an update may not change."""

    def at(manifest: Mapping[str, Any], path: str) -> Any:
        value: Any = manifest
        for part in path.split("."):
            value = (value or {}).get(part)
        return value

    says = "Invalid value: field is immutable"
    found: list[Fault] = []
    if kind == "Job":
        paths = ["spec.completions", "spec.completionMode", "spec.selector", "spec.podFailurePolicy", "spec.template"]
        if at(old, "spec.suspend") and at(new, "spec.suspend") is not None and not at(old, "status.startTime"):
            # a queue may set where the pods of a Job go that has never run
            old_pod, new_pod = (dict(at(one, "spec.template.spec") or {}) for one in (old, new))
            for movable in ("nodeSelector", "tolerations", "affinity", "schedulingGates"):
                old_pod.pop(movable, None), new_pod.pop(movable, None)
            if old_pod == new_pod:
                paths.remove("spec.template")
        found += [(path, "FieldValueInvalid", says) for path in paths if at(old, path) != at(new, path)]
    if kind in ("ConfigMap", "Secret") and old.get("immutable"):
        for path in ("data", "binaryData", "immutable"):
            if old.get(path) != new.get(path):
                found.append((path, "FieldValueForbidden", "Forbidden: field is immutable when `immutable` is set"))
    if kind == "Pod" and at(old, "spec.containers") != at(new, "spec.containers"):
        found.append(("spec", "FieldValueForbidden", "Forbidden: pod updates may not change fields other than …"))
    return found
