"""The API server of the tests answers as a real one was recorded to (tests/record_real_server.py)."""

import http.client
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.crd_server import too_dear
from tests.fake_kubernetes import FakeKubernetes
from tests.record_real_server import FOLDER, NAMESPACE, answered, bytes_of

FILES = sorted(FOLDER.glob("kubernetes-*.json"))
RECORDED = [(path, json.loads(path.read_text())) for path in FILES]
CASES = [
    pytest.param(case["steps"], id=f"{path.stem}: {case['name']}") for path, told in RECORDED for case in told["cases"]
]
COSTS = [
    pytest.param(each["schema"], each["says"], id=f"{path.stem}: {number}")
    for path, told in RECORDED
    for number, each in enumerate(told["costs"])
]


def test_there_is_a_recording() -> None:
    assert len(CASES) > 40
    assert len(COSTS) > 40


def ask(cluster: FakeKubernetes, step: Mapping[str, Any]) -> tuple[int, Any, list[str]]:
    headers = {
        "Authorization": f"Bearer {cluster.token}",
        "Content-Type": step.get("contentType", "application/json"),
    }
    connection = http.client.HTTPConnection(urlsplit(cluster.url).netloc, timeout=30)
    try:
        connection.request(step["method"], step["path"], bytes_of(step), headers)
        answer = connection.getresponse()
        content = answer.read().decode()
        warnings = re.findall(r'299 - "((?:[^"\\]|\\.)*)"', ", ".join(answer.headers.get_all("Warning", [])))
    finally:
        connection.close()
    try:
        return answer.status, json.loads(content), warnings
    except ValueError:
        return answer.status, content.strip(), warnings


@pytest.mark.parametrize("steps", CASES)
def test_the_same_requests_are_answered_alike(steps: list[Mapping[str, Any]]) -> None:
    with FakeKubernetes(workspaces=False, job_controller=False, namespaces=("default", NAMESPACE)) as cluster:
        cluster.evaluates_rules = True
        cluster.allow_secrets()
        if any(step.get("byNobody") for step in steps):
            cluster.allow_only([])
        answers = list(answered(steps, lambda step: ask(cluster, step)))
    for step, answer in zip(steps, answers, strict=True):
        assert answer == step["answer"], f"{step['method']} {step['path']} {step.get('body', '')[:300]}"


@pytest.mark.parametrize(("schema", "says"), COSTS)
def test_a_rule_is_as_dear_as_the_server_reckons(schema: Mapping[str, Any], says: list[str]) -> None:
    assert [f"{where}: {said.partition(' (try')[0]}" for where, said in too_dear(schema)] == says


def test_the_recording_is_of_the_cases_that_there_are() -> None:
    """Else: record again, on a cluster to spare."""
    from tests.record_real_server import cases

    for _, told in RECORDED:
        assert [each["name"] for each in told["cases"]] == [name for name, _ in cases()]
