"""What an API server makes of an object of a built-in kind before it stores it: what is empty goes, amounts get the
form that it likes, and what was not written is filled in. As recorded of 1.36 (tests/record_real_server.py).
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tests.kubernetes_rules import definition_of, resolved

Object = dict[str, Any]

# What Go has a pointer to is stored when it is false or empty too: of what is false all but these, of texts only these.
_KEPT_WHEN_EMPTY = frozenset({"holderIdentity"})
_DROPPED_WHEN_FALSE = frozenset({"readOnly", "hostNetwork", "hostPID", "hostIPC", "stdin", "stdinOnce", "tty"})


def as_stored(manifest: Mapping[str, Any], group: str, version: str, kind: str) -> Object:
    """A copy without what Go leaves out of JSON, and with amounts as the server writes them."""
    schema = definition_of(group, version, kind)
    stored: Object = _kept(manifest, schema) if schema else dict(manifest)
    return stored


def _kept(value: Any, schema: Mapping[str, Any]) -> Any:
    if schema.get("$ref", "").endswith(".resource.Quantity"):
        return canonical(value)
    schema = resolved(schema)
    if isinstance(value, Mapping):
        properties, extra = schema.get("properties"), schema.get("additionalProperties")
        if properties is None:
            return {name: _kept(each, extra if isinstance(extra, dict) else {}) for name, each in value.items()}
        return {
            name: _kept(each, properties.get(name, {}))
            for name, each in value.items()
            if name in schema.get("required", ()) or not _is_left_out(name, each, properties.get(name, {}))
        }
    if isinstance(value, list):
        return [_kept(each, schema.get("items", {})) for each in value]
    return value


def _is_left_out(name: str, value: Any, schema: Mapping[str, Any]) -> bool:
    """`omitempty`. An empty object is kept where it is a struct, which Go has a pointer to, and not a map."""
    if value == {}:
        return "additionalProperties" in resolved(schema)
    return value in (None, []) or (value == "" and name not in _KEPT_WHEN_EMPTY) or _is_no(name, value)


def _is_no(name: str, value: Any) -> bool:
    return value is False and name in _DROPPED_WHEN_FALSE


_BINARY, _DECIMAL = ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki"), ("E", "P", "T", "G", "M", "k", "", "m", "u", "n")


def canonical(amount: Any) -> Any:
    """`0.5` → `500m`, `2048Mi` → `2Gi`: the largest unit of the same kind without a fraction."""
    found = re.fullmatch(r"([+-]?[\d.]+)([EPTGM]i?|Ki|[kmun]?)", str(amount))
    if not found:
        return amount
    number, unit = Decimal(found[1]), found[2]
    if unit in _BINARY:
        number *= 1024 ** (len(_BINARY) - _BINARY.index(unit))
        units = {suffix: Decimal(1024 ** (len(_BINARY) - place)) for place, suffix in enumerate(_BINARY)} | {
            "": Decimal(1)
        }
    else:
        units = {suffix: Decimal(1000) ** (6 - place) for place, suffix in enumerate(_DECIMAL)}
        number *= units[unit]
    for suffix, size in units.items():
        if number % size == 0 and number:
            return f"{int(number / size)}{suffix}"
    return "0"


def fill_in_job(spec: Object) -> None:
    for name, value in (
        ("backoffLimit", 6), ("completionMode", "NonIndexed"), ("completions", 1), ("manualSelector", False),
        ("parallelism", 1), ("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed"),
        ("suspend", False),
    ):  # fmt: skip
        spec.setdefault(name, value)
    for rule in (spec.get("podFailurePolicy") or {}).get("rules") or ():
        for condition in rule.get("onPodConditions") or ():
            condition.setdefault("status", "True")
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    fill_in_pod(template.setdefault("spec", {}))


def fill_in_pod(spec: Object) -> None:
    for name, value in (
        ("dnsPolicy", "ClusterFirst"), ("restartPolicy", "Always"), ("schedulerName", "default-scheduler"),
        ("securityContext", {}), ("terminationGracePeriodSeconds", 30),
    ):  # fmt: skip
        spec.setdefault(name, value)
    if "serviceAccountName" in spec:
        spec.setdefault("serviceAccount", spec["serviceAccountName"])
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        _fill_in_container(container)
    for volume in spec.get("volumes") or ():
        _fill_in_volume(volume)


def _fill_in_container(container: Object) -> None:
    image = str(container.get("image", ""))
    is_moving = "@" not in image and image.rpartition("/")[2].partition(":")[2] in ("", "latest")
    for name, value in (
        ("imagePullPolicy", "Always" if is_moving else "IfNotPresent"), ("resources", {}),
        ("terminationMessagePath", "/dev/termination-log"), ("terminationMessagePolicy", "File"),
    ):  # fmt: skip
        container.setdefault(name, value)
    for variable in container.get("env") or ():
        if field := (variable.get("valueFrom") or {}).get("fieldRef"):
            field.setdefault("apiVersion", "v1")
    for port in container.get("ports") or ():
        port.setdefault("protocol", "TCP")


def _fill_in_volume(volume: Object) -> None:
    for kind in ("configMap", "secret", "projected", "downwardAPI"):
        if kind in volume:
            volume[kind].setdefault("defaultMode", 0o644)
    if "hostPath" in volume:
        volume["hostPath"].setdefault("type", "")
    if claim := (volume.get("ephemeral") or {}).get("volumeClaimTemplate"):
        claim.setdefault("metadata", {})
        claim.setdefault("spec", {}).setdefault("volumeMode", "Filesystem")
