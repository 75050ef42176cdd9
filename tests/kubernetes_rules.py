"""What a Kubernetes API server refuses of an object, for the fake one: names, unknown fields, Jobs and pods.

Each function gives faults: `(field, reason, message)` as a Status has them in `details.causes`.
The field names of built-in kinds are those of kubernetes-validate's newest OpenAPI schema.
"""

import base64
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.cluster.checks import quantity

Fault = tuple[str, str, str]

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
_LABEL_VALUE = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
_LABEL_KEY = rf"({SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_LABEL_KINDS = ("Namespace", "Service")
_PATH_NAMES = ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
_SUBDOMAIN_SAYS = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_SAYS = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_KEY_SAYS = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_VALUE_SAYS = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_DATA_KEY_SAYS = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or "
    "'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
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
def definition_of(group: str, version: str, kind: str) -> dict[str, Any] | None:
    wanted = {"group": group, "version": version, "kind": kind}
    for definition in _definitions().values():
        if wanted in definition.get("x-kubernetes-group-version-kind", ()):
            return definition
    return None


def undecodable(manifest: Mapping[str, Any], group: str, version: str, kind: str) -> tuple[list[str], list[str]]:
    """Unknown fields, and values of a wrong type, of a built-in kind, as paths."""
    definition = definition_of(group, version, kind)
    if definition is None:
        return [], []
    unknown: list[str] = []
    wrong: list[str] = []
    _walk(manifest, definition, "", kind, unknown, wrong)
    return unknown, wrong


def resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return _definitions()[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema  # type: ignore[no-any-return]


def _walk(value: Any, schema: Mapping[str, Any], path: str, struct: str, unknown: list[str], wrong: list[str]) -> None:
    """`struct` is the Go type that the value is a field of."""
    named = schema.get("$ref", "").rpartition(".")[2]
    struct = named if named and isinstance(value, dict) else struct
    schema = resolved(schema)
    if value is None or schema.get("format") == "int-or-string" or named in ("Quantity", "RawExtension"):
        return
    wanted = _type_of(schema)
    kinds = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict, "number": (int, float)}
    if wanted in kinds and (
        not isinstance(value, kinds[wanted]) or (isinstance(value, bool) and wanted in ("integer", "number"))
    ):
        is_at = re.sub(r"\[\d+\]", "", path)
        wrong.append(f"{_json_type(value)} into Go struct field {struct}.{is_at} of type {_go_type(schema)}")
        return
    properties, extra = schema.get("properties"), schema.get("additionalProperties")
    if isinstance(value, dict) and properties is not None:
        for name, inner in value.items():
            inside = f"{path}.{name}" if path else name
            if name in properties:
                _walk(inner, properties[name], inside, struct, unknown, wrong)
            elif not isinstance(extra, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
                unknown.append(inside)
    elif isinstance(value, dict) and isinstance(extra, dict):
        for inner in value.values():
            _walk(inner, extra, path, struct, unknown, wrong)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            _walk(inner, schema["items"], f"{path}[{index}]", struct, unknown, wrong)


def _type_of(schema: Mapping[str, Any]) -> Any:
    wanted = schema.get("type")
    return next((one for one in wanted if one != "null"), None) if isinstance(wanted, list) else wanted


def _json_type(value: Any) -> str:
    names = {bool: "bool", str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return names[type(value)]


def _go_type(schema: Mapping[str, Any]) -> str:
    match _type_of(schema):
        case "integer":
            return str(schema.get("format", "int64"))
        case "boolean":
            return "bool"
        case "array":
            return f"[]{_go_type(resolved(schema.get('items', {})))}"
        case "object":
            return f"map[string]{_go_type(resolved(schema.get('additionalProperties') or {'type': 'string'}))}"
    return "string"


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


def faults_of_custom(
    new: Mapping[str, Any], old: Mapping[str, Any] | None, schema: Mapping[str, Any], *, evaluates_rules: bool
) -> tuple[list[Fault], list[str]]:
    """What schema and CEL rules say of a custom resource, and what they only warn of: what was so before."""
    from tests.crd_server import has_rules, refusals_by_rules, refusals_by_schema

    refused = refusals_by_schema(schema, new)
    blocking = [each for each in refused if each.reason in _BLOCKING]
    if evaluates_rules and not blocking:
        refused += refusals_by_rules(schema, new, old)
    faults = [(each.path or "<nil>", each.reason, each.said) for each in refused if not _was_so(each.path, new, old)]
    warned = [f"{each.path or '<nil>'}: {each.said}" for each in refused if _was_so(each.path, new, old)]
    if evaluates_rules and blocking and has_rules(schema):
        faults.append(("<nil>", "FieldValueInvalid", _UNCHECKED))
    return faults, warned


_BLOCKING = tuple(f"FieldValue{each}" for each in ("Required", "TypeInvalid", "NotSupported", "TooLong", "TooMany"))
_UNCHECKED = (
    "Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing "
    "errors to complete validation"
)


def _was_so(path: str, new: Mapping[str, Any], old: Mapping[str, Any] | None) -> bool:
    """Whether the value there is what it was: servers since 1.30 bear with that. Items of a list have no past."""
    if old is None or not path:
        return False
    way = path.partition("[")[0].split(".")
    values = []
    for value in (new, old):
        for name in way:
            value = value.get(name) if isinstance(value, Mapping) else None  # type: ignore[assignment]
        values.append(value)
    return values[0] == values[1]


def faults_of_crd(crd: Mapping[str, Any]) -> list[Fault]:
    """Rules whose price is too high."""
    from tests.crd_server import too_dear

    versions = crd["spec"]["versions"]
    faults = []
    for index, version in enumerate(versions):
        where = f"spec.versions[{index}].schema" if len(versions) > 1 else "spec.validation"
        found = too_dear(version["schema"]["openAPIV3Schema"])
        faults += [(f"{where}.openAPIV3Schema{path}", "FieldValueForbidden", said) for path, said in found]
    return faults


def without_unknown(manifest: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The object without the fields at these paths, as Go decodes it."""
    for path in paths:
        *way, last = re.findall(r"[^.\[\]]+", path)
        place: Any = manifest
        for name in way:
            place = place[int(name)] if isinstance(place, list) else place[name]
        place.pop(last, None)
    return manifest


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
            yield "metadata.annotations", "FieldValueInvalid", f'Invalid value: "{key}": {_KEY_SAYS}'
        if not isinstance(value, str):
            yield "metadata.annotations", "FieldValueInvalid", f"Invalid value: {value!r}: must be a string"
    for index, owner in enumerate(metadata.get("ownerReferences") or ()):
        for needed in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(needed):
                yield f"metadata.ownerReferences[{index}].{needed}", "FieldValueRequired", "Required value"


def faults_of_labels(field: str, labels: Mapping[str, Any]) -> Iterator[Fault]:
    for key, value in labels.items():
        if not re.fullmatch(_LABEL_KEY, key) or len(key.rpartition("/")[2]) > 63:
            yield field, "FieldValueInvalid", f'Invalid value: "{key}": {_KEY_SAYS}'
        if not isinstance(value, str) or len(value) > 63 or not re.fullmatch(_LABEL_VALUE, value):
            more = "must be no more than 63 bytes" if len(str(value)) > 63 else _VALUE_SAYS
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
        case "ControllerRevision":
            found += _faults_of_revision(manifest)
        case "Event":
            found += _faults_of_event(manifest)
    return found


def _faults_of_data(kind: str, manifest: Mapping[str, Any]) -> Iterator[Fault]:
    size = 0
    for part in ("data", "binaryData"):
        for key, value in (manifest.get(part) or {}).items():
            if not re.fullmatch(r"[-._a-zA-Z0-9]+", key) or len(key) > 253:
                yield f"{part}[{key}]", "FieldValueInvalid", f'Invalid value: "{key}": {_DATA_KEY_SAYS}'
            size += len(value)
    if size > (1 << 20):
        yield "", "FieldValueTooLong", "Too long: may not be more than 1048576 bytes"
    if kind == "Secret" and manifest.get("type") == "kubernetes.io/dockerconfigjson":
        yield from _faults_of_docker_config(manifest.get("data") or {})


def _faults_of_docker_config(data: Mapping[str, str]) -> Iterator[Fault]:
    field = "data[.dockerconfigjson]"
    if ".dockerconfigjson" not in data:
        yield field, "FieldValueRequired", "Required value"
        return
    try:
        json.loads(base64.b64decode(data[".dockerconfigjson"]))
    except ValueError:
        said = 'Invalid value: "<secret contents redacted>": unexpected end of JSON input'
        yield field, "FieldValueInvalid", said


def undecodable_data(data: Mapping[str, Any]) -> str | None:
    """What is said of bytes that are not base64."""
    for value in data.values():
        bad = re.search(r"[^A-Za-z0-9+/=]", str(value))
        if bad or len(str(value)) % 4:
            return f"illegal base64 data at input byte {bad.start() if bad else len(str(value)) // 4 * 4}"
    return None


def _faults_of_revision(manifest: Mapping[str, Any]) -> Iterator[Fault]:
    if manifest.get("data") is None:
        yield "data", "FieldValueRequired", "Required value: data is mandatory"
    elif not isinstance(manifest["data"], Mapping):
        yield "data", "FieldValueRequired", "Required value: data must be a valid JSON object"


def _faults_of_event(event: Mapping[str, Any]) -> Iterator[Fault]:
    namespace = (event.get("metadata") or {}).get("namespace")
    about = event.get("involvedObject") or {}
    if not event.get("eventTime"):  # of the core group: the checks of events.k8s.io are not made
        if about.get("namespace", "") not in (namespace, "") or (not about.get("namespace") and namespace != "default"):
            yield "involvedObject.namespace", "FieldValueInvalid", "Invalid value: does not match event.namespace"
        return
    for name, most in (("reportingComponent", 253), ("reportingInstance", 128), ("action", 128), ("reason", 128)):
        if not event.get(name):
            yield name, "FieldValueRequired", "Required value"
        elif len(str(event[name])) > most:
            yield name, "FieldValueInvalid", f'Invalid value: "": can have at most {most} characters'
    if len(str(event.get("message", "")).encode()) > 1024:  # "characters", the server says, and counts bytes
        yield "message", "FieldValueInvalid", 'Invalid value: "": can have at most 1024 characters'
    if event.get("type") not in ("Normal", "Warning"):
        yield "type", "FieldValueInvalid", f'Invalid value: "": has invalid value: {event.get("type")}'


# ── Jobs and pods ────────────────────────────────────────────────────────────────────────────────────────────────────


def _faults_of_job(job: Mapping[str, Any]) -> Iterator[Fault]:
    spec = job.get("spec") or {}
    template = spec.get("template") or {}
    pod = template.get("spec") or {}
    if (spec.get("backoffLimit") or 0) < 0:
        said = f"Invalid value: {spec['backoffLimit']}: must be greater than or equal to 0"
        yield "spec.backoffLimit", "FieldValueInvalid", said
    restart = pod.get("restartPolicy", "Always")
    if (policy := spec.get("podFailurePolicy")) is not None:
        yield from _faults_of_policy(policy, pod)
        if spec.get("podReplacementPolicy", "Failed") != "Failed":
            said = f'Unsupported value: "{spec["podReplacementPolicy"]}": supported values: "Failed"'
            yield "spec.podReplacementPolicy", "FieldValueNotSupported", said
    yield from faults_of_labels("spec.template.labels", (template.get("metadata") or {}).get("labels") or {})
    yield from _faults_of_pod(pod, "spec.template.spec")
    if restart == "Always":
        said = 'Required value: valid values: "OnFailure", "Never"'
        yield "spec.template.spec.restartPolicy", "FieldValueRequired", said
    elif restart not in ("Never", "OnFailure"):
        said = f'Unsupported value: "{restart}": supported values: "OnFailure", "Never"'
        yield "spec.template.spec.restartPolicy", "FieldValueNotSupported", said
    elif restart != "Never" and policy is not None:
        said = f'Invalid value: "{restart}": only "Never" is supported when podFailurePolicy is specified'
        yield "spec.template.spec.restartPolicy", "FieldValueInvalid", said


def _faults_of_policy(policy: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[Fault]:
    rules = policy.get("rules") or []
    if len(rules) > 20:
        yield "spec.podFailurePolicy.rules", "FieldValueTooMany", f"Too many: {len(rules)}: must have at most 20 items"
    containers = [*(pod.get("initContainers") or ()), *(pod.get("containers") or ())]
    names = {container.get("name") for container in containers}
    for index, rule in enumerate(rules):
        where = f"spec.podFailurePolicy.rules[{index}]"
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes and conditions:
            said = "Invalid value: specifying both OnExitCodes and OnPodConditions is not supported"
            yield where, "FieldValueInvalid", said
        elif not codes and not conditions:
            said = "Invalid value: specifying one of OnExitCodes and OnPodConditions is required"
            yield where, "FieldValueInvalid", said
        if codes:
            yield from _faults_of_exit_codes(codes, names, f"{where}.onExitCodes")


def _faults_of_exit_codes(codes: Mapping[str, Any], names: set[Any], where: str) -> Iterator[Fault]:
    if (name := codes.get("containerName")) not in (None, *names):
        said = f'Invalid value: "{name}": must be one of the container or initContainer names in the pod template'
        yield f"{where}.containerName", "FieldValueInvalid", said
    values = codes.get("values") or []
    if not values:
        yield f"{where}.values", "FieldValueInvalid", "Invalid value: []: at least one value is required"
    for index, value in enumerate(values):
        if value == 0 and codes.get("operator") == "In":
            said = "Invalid value: 0: must not be 0 for the In operator"
            yield f"{where}.values[{index}]", "FieldValueInvalid", said
        elif value in values[:index]:
            yield f"{where}.values[{index}]", "FieldValueDuplicate", f"Duplicate value: {value}"
    if values != sorted(values):
        shown = json.dumps(values, separators=(",", ":"))
        yield f"{where}.values", "FieldValueInvalid", f"Invalid value: {shown}: must be ordered"


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
    for part in ("containers", "initContainers"):
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
    yield from _faults_of_resources(container.get("resources") or {}, f"{where}.resources")


def _faults_of_resources(resources: Mapping[str, Any], where: str) -> Iterator[Fault]:
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for resource in sorted({*requests, *limits}):
        asked, most = requests.get(resource), limits.get(resource)
        if "/" in resource and not resource.startswith("kubernetes.io/"):
            if most is None:
                said = "Required value: Limit must be set for non overcommitable resources"
                yield f"{where}.limits", "FieldValueRequired", said
            elif asked not in (None, most):
                said = f'Invalid value: "{asked}": must be equal to {resource} limit of {most}'
                yield f"{where}.requests", "FieldValueInvalid", said
        elif asked is not None and most is not None and (quantity(asked) or 0) > (quantity(most) or 0):
            said = f'Invalid value: "{asked}": must be less than or equal to {resource} limit of {most}'
            yield f"{where}.requests", "FieldValueInvalid", said


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


def _metadata_of_template(job: Mapping[str, Any]) -> Any:
    return ((job.get("spec") or {}).get("template") or {}).get("metadata")


def immutable_faults(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Fault]:
    """What an update may not change."""

    def at(manifest: Mapping[str, Any], path: str) -> Any:
        value: Any = manifest
        for part in path.split("."):
            value = (value or {}).get(part)
        return value

    found: list[Fault] = []
    if kind == "Job":
        paths = [
            "spec.completions",
            "spec.completionMode",
            "spec.selector",
            "spec.podFailurePolicy",
            "spec.template.spec",
        ]
        is_held = at(old, "spec.suspend") and at(new, "spec.suspend") is not None and not at(old, "status.startTime")
        if is_held:
            # a queue may set where the pods of a Job go that has never run
            old_pod, new_pod = (dict(at(one, "spec.template.spec") or {}) for one in (old, new))
            for movable in ("nodeSelector", "tolerations", "affinity", "schedulingGates"):
                old_pod.pop(movable, None), new_pod.pop(movable, None)
            if old_pod == new_pod:
                paths.remove("spec.template.spec")
        elif _metadata_of_template(old) != _metadata_of_template(new):
            paths[-1] = "spec.template"
        for path in paths:
            if at(old, path) != at(new, path):
                shown = json.dumps(at(new, path)) if not path.startswith("spec.template") else '{"Volumes":null}'
                found.append((path, "FieldValueInvalid", f"Invalid value: {shown}: field is immutable"))
    if kind in ("ConfigMap", "Secret") and old.get("immutable"):
        for path in ("data", "binaryData", "immutable"):
            if old.get(path) != new.get(path):
                found.append((path, "FieldValueForbidden", "Forbidden: field is immutable when `immutable` is set"))
    if kind == "Pod" and at(old, "spec.containers") != at(new, "spec.containers"):
        found.append(("spec", "FieldValueForbidden", "Forbidden: pod updates may not change fields other than …"))
    return found
