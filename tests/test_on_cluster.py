"""The CRD and the installation on a real API server, for whoever has one to spare:

    TUNER_TEST_KUBECONFIG=~/.kube/kind pytest tests/test_on_cluster.py

It makes and deletes namespaces `tuner-test-…` and, where there is none, the CRD. Without one the same tests run against
the server of tests/fake_kubernetes.py, whose CEL is cel-python's: what they show of a real one is then nothing.
"""

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_crd import IMAGES, MISTAKES, SPEAKS_LESS, URLS, server_says
from test_workspace import changed

from tests.fake_kubernetes import FakeKubernetes
from tuner.cluster.api import (
    CUSTOM_RESOURCE_DEFINITION,
    DEPLOYMENT,
    NAMESPACE,
    WORKSPACE,
    Api,
)
from tuner.cluster.api_errors import ApiError, NotFoundError
from tuner.cluster.crd import NAME, custom_resource_definition
from tuner.cluster.install import InstallOptions, install, uninstall
from tuner.cluster.kaito import is_ours

KUBECONFIG = os.environ.get("TUNER_TEST_KUBECONFIG")


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.cluster)])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Api]:
    if request.param == "fake":
        with FakeKubernetes(workspaces=False, job_controller=False) as fake:
            fake.evaluates_rules = True
            yield Api.from_config(env={"KUBECONFIG": str(fake.write_kubeconfig(tmp_path / "config"))}, patience_s=5)
        return
    if not KUBECONFIG:
        pytest.skip("no cluster to spare: set TUNER_TEST_KUBECONFIG")
    yield Api.from_config(env={"KUBECONFIG": KUBECONFIG})


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    name = f"tuner-test-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    yield name
    api.delete(NAMESPACE, name)


@pytest.fixture
def crd(api: Api) -> Iterator[None]:
    """Ours, served; taken away again where it was not there."""
    before = api.find(CUSTOM_RESOURCE_DEFINITION, NAME)
    if before and not is_ours(before):
        pytest.skip("KAITO's CRD is in this cluster")
    api.apply(custom_resource_definition())
    deadline = time.monotonic() + 30
    while not api.serves(WORKSPACE):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield
    if not before:
        api.delete(CUSTOM_RESOURCE_DEFINITION, NAME)


def refused(api: Api, written: dict[str, Any], namespace: str) -> str:
    """What the server says to an apply that is only tried; "" when it takes it."""
    written = {**written, "metadata": {"name": "tickets", **written["metadata"], "namespace": namespace}}
    written.pop("status", None)
    try:
        api.create(written, dry_run=True)
    except ApiError as error:
        return error.server_message or error.message
    return ""


def test_the_server_says_what_the_parser_says(api: Api, crd: None, namespace: str) -> None:
    mistakes = [
        changed(path, value)
        for path, value, where in MISTAKES
        # of a name that no object can have the server speaks itself, before any rule
        if where is not SPEAKS_LESS and not (path == "metadata.name" and value in ("Tickets_1", "-a"))
    ]
    mistakes += [changed("tuning.input", {"image": image}) for image in IMAGES]
    mistakes += [changed("tuning.input.urls", [url]) for url in URLS]
    wrong = {}
    for written in mistakes:
        sentences = [each.message for each in server_says(written)]
        assert sentences
        said = refused(api, written, namespace)
        if not all(sentence in said for sentence in sentences):
            wrong[said] = sentences
    assert not wrong
    assert refused(api, changed("tuning.method", "QLoRA"), namespace) == ""


def test_what_the_parser_refuses_in_other_words_the_server_refuses_too(api: Api, crd: None, namespace: str) -> None:
    for path, value, where in MISTAKES:
        if where is SPEAKS_LESS:
            assert refused(api, changed(path, value), namespace), (path, value)


def test_an_update_is_held_to_what_cannot_be_changed(api: Api, crd: None, namespace: str) -> None:
    written = changed("metadata.namespace", namespace)
    api.apply(written)
    for path, value, sentence in (
        ("tuning.method", "lora", "the method cannot be changed"),
        ("tuning.preset.name", "phi-4", "the preset cannot be changed"),
        ("resource.instanceType", "other", "the instance type cannot be changed"),
        ("tuning.input.urls", ["http://169.254.169.254/"], "is a link-local address"),
    ):
        update = changed(path, value)
        update["metadata"]["namespace"] = namespace
        with pytest.raises(ApiError, match=sentence):
            api.apply(update)
    api.delete(WORKSPACE, "tickets", namespace)


def test_the_controller_is_installed_and_taken_away(api: Api, crd: None, namespace: str) -> None:
    said: list[str] = []
    options = InstallOptions(
        namespace=namespace, image="registry.example.com/tuner:0.1.0", watch_namespaces=(namespace,)
    )
    install(api, options, said.append)
    assert api.get(DEPLOYMENT, "tuner-controller", namespace)["spec"]["replicas"] == 2
    uninstall(api, namespace, said.append)
    with pytest.raises(NotFoundError):
        api.get(DEPLOYMENT, "tuner-controller", namespace)
    assert api.find(CUSTOM_RESOURCE_DEFINITION, NAME)
    assert api.serves(WORKSPACE)
