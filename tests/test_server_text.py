"""What a cluster says is shown without what it quotes: a server's refusal may hold the whole object."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster_objects import make_workspace
from tuner.cluster.api_errors import Asked, error_of_response
from tuner.cluster.server_text import secrets_of, shown


@pytest.mark.parametrize(
    ("said", "is_shown"),
    [
        # as kube-apiserver 1.36.2 says it
        (
            'data: Invalid value: {"resource":{"a":"}"},"tuning":{"input":{"urls":["https://h/a?sig=S"]}}}: field is '
            "immutable",
            "data: Invalid value: field is immutable",
        ),
        (
            'Job.batch "x" is invalid: spec.template: Invalid value: core.PodTemplateSpec{ObjectMeta:v1.ObjectMeta{'
            'Name:"", Labels:map[string]string{"a":"b"}}}: field is immutable',
            'Job.batch "x" is invalid: spec.template: Invalid value: field is immutable',
        ),
        (
            'tuning.method: Invalid value: "string": must be lora or qlora',
            "tuning.method: Invalid value: must be lora or qlora",
        ),
        (
            'spec.restartPolicy: Unsupported value: "Somet\\"imes": supported values: "Never", "OnFailure"',
            'spec.restartPolicy: Unsupported value: supported values: "Never", "OnFailure"',
        ),
        (
            "[spec.backoffLimit: Invalid value: -1: must be 0 or more, spec.x: Duplicate value: \"a\"]",
            "[spec.backoffLimit: Invalid value: must be 0 or more, spec.x: Duplicate value]",
        ),
        ("data: Invalid value: {\"a\": \"cut of", "data: Invalid value"),
        ("spec.template: Invalid value: field is immutable", "spec.template: Invalid value: field is immutable"),
        # a webhook's or a policy's
        ('denied: the object {"spec": {"a": 1}} is not mine', "denied: the object {…} is not mine"),
        ("denied: map[a:map[b:c] d:e] is not mine", "denied: map[…] is not mine"),
        ("GET https://me:PASS@h.example/a/b?sv=1\\u0026sig=S&x#f: 403", "GET https://h.example/a/b?…: 403"),
        ('url "https://h.example/a?sig=S" is refused', 'url "https://h.example/a?…" is refused'),
        ("sig=abc%3D is old, so is X-Amz-Signature=1f", "sig=… is old, so is X-Amz-Signature=…"),
        ("sent Authorization: Bearer eyJh.b-c", "sent Authorization: Bearer …"),
    ],
)  # fmt: skip
def test_what_is_shown_of_what_a_server_says(said: str, is_shown: str) -> None:
    assert shown(said) == is_shown


def test_the_values_of_a_secret_that_was_sent_never_come_back() -> None:
    config = json.dumps({"auths": {"r.example": {"username": "user-of-it", "password": "the-password"}}})
    encoded = base64.b64encode(config.encode()).decode()
    secret = {
        "kind": "Secret",
        "data": {".dockerconfigjson": encoded, "short": "YQ=="},
        "stringData": {"k": "plain-text"},
    }
    known = secrets_of(secret)
    said = f"webhook: {encoded} has the-password of user-of-it, and plain-text; a is no secret"
    assert shown(said, known) == "webhook: … has … of …, and …; a is no secret"
    assert secrets_of({"kind": "ConfigMap", "data": {"a": "public-text"}}) == frozenset()


@pytest.mark.parametrize(
    "said",
    [
        'User "jo" cannot get resource "jobs" in API group "batch" in the namespace "ml"',
        "exceeded quota: q, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=0",
        'container "a" must set securityContext.capabilities.drop=["ALL"])',
        "an unfilled template expression: {{ .Values.image }}",
        "0/3 nodes are available: 1 node(s) had untolerated taint(s) {gpu: yes}. preemption: 0/3 nodes are available",
        "Post https://a.svc:443/mutate: context deadline exceeded",
    ],
)
def test_what_is_no_secret_stays_as_it_is(said: str) -> None:
    assert shown(said) == said


# ── canaries ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def filled(value: Any, canaries: Iterator[int]) -> Any:
    """The same with a canary for each text."""
    if isinstance(value, dict):
        return {key: filled(each, canaries) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, canaries) for each in value]
    if isinstance(value, str) and value.startswith("https://"):
        return f"https://canary{next(canaries)}.example.com/canary?sv=canary&sig=canary{next(canaries)}#canary"
    return f"canary{next(canaries)}"


def go_dump(value: Any) -> str:
    """As Go's %#v prints it."""
    if isinstance(value, dict):
        return "map[string]interface {}{" + ", ".join(f'"{key}":{go_dump(each)}' for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[]interface {}{" + ", ".join(map(go_dump, value)) + "}"
    return json.dumps(value)


WORKSPACE = {
    **make_workspace(config="config", instance_type="box"),
    "tuning": {
        **make_workspace(config="config")["tuning"],
        "input": {"urls": ["https://a", "https://b"], "name": "n", "image": "i", "imagePullSecrets": ["a", "b"]},
    },
}
del WORKSPACE["apiVersion"], WORKSPACE["kind"], WORKSPACE["metadata"]


def quoted_in_every_way(thing: Any) -> Iterator[str]:
    """One thing as a server quotes it."""
    compact = json.dumps(thing, separators=(",", ":"))
    yield compact
    yield json.dumps(thing, indent=1)
    yield compact.replace("&", "\\u0026")
    yield json.dumps(compact)  # JSON in a JSON text
    yield go_dump(thing)
    yield f"map[{' '.join(f'{key}:{each}' for key, each in thing.items())}]"
    yield compact[: len(compact) * 2 // 3]  # cut off


def refusals(quoted: str) -> Iterator[tuple[int, str, str, list[dict[str, str]]]]:
    """Status, reason, message and causes of each kind of refusal, all of them quoting."""
    said = f"Invalid value: {quoted}: field is immutable"
    yield 422, "Invalid", f'Workspace.kaito.sh "w" is invalid: tuning: {said}', [{"field": "tuning", "message": said}]
    yield 422, "Invalid", f"[tuning: {said}, x: Duplicate value: {quoted}, y: Not found: {quoted}]", []
    yield 400, "BadRequest", f"Workspace in version v1beta1 cannot be handled: json: cannot unmarshal {quoted}", []
    yield 400, "BadRequest", f'admission webhook "a.b" denied the request: {quoted} is not allowed', []
    yield 403, "Forbidden", f'admission webhook "a.b" denied the request: {quoted} is not allowed', []
    yield 403, "Forbidden", f"ValidatingAdmissionPolicy 'p' with binding 'b' denied request: {quoted}", []
    yield 409, "Conflict", f"Operation cannot be fulfilled: {quoted} was changed", []
    yield 410, "Expired", f"too old: {quoted}", []
    yield 429, "TooManyRequests", f"wait with {quoted}", []
    yield 500, "InternalError", f'failed calling webhook "a.b": failed to call webhook: {quoted}', []
    yield 500, "InternalError", f"Internal error occurred: {quoted}", []
    yield 418, "Teapot", f"what is {quoted}?", []


def test_no_refusal_of_any_kind_shows_what_stands_in_a_workspace() -> None:
    workspace = filled(WORKSPACE, iter(range(1, 1000)))
    asked = Asked("patch", "workspaces.kaito.sh", "https://c", "kaito.sh", "workspaces", "ml", "w", "Workspace")
    tried = 0
    for quoted in quoted_in_every_way(workspace):
        for status, reason, message, causes in refusals(quoted):
            body = {"message": message, "reason": reason, "details": {"causes": causes}}
            error = error_of_response(asked, status, body, {})
            for text in (error.message, str(error.hint), error.server_message):
                tried += 1
                assert "canary" not in text, (message, text)
    assert tried > 200


@pytest.mark.parametrize("field", ["urls", "image"])
def test_one_field_that_is_quoted_alone_is_not_shown_by_the_server_itself(field: str) -> None:
    value = "https://canary.example.com/canary?sig=canary" if field == "urls" else "canary/canary:1"
    said = f'tuning.input.{field}[0]: Too long: may not be more than 5 bytes, tuning.x: Invalid value: "{value}": no'
    assert "canary" not in shown(said)
