"""`tuner submit --wait` as a whole: objects at the strict API server, their pods as processes, a real registry.

What the pods mount is what the server has, so nothing that it drops, fills in or refuses is missed.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.data_files import message_rows, write_data
from tests.fake_kubernetes import FakeKubernetes
from tests.http_server import HttpServer
from tests.kubelet import Node, require_node
from tests.registries import RunningRegistry, docker_config, running_registry
from tuner.cli import main
from tuner.cluster import follow

pytestmark = [pytest.mark.train, pytest.mark.registry]

NAME = "tickets"


@pytest.fixture(scope="module")
def registry() -> Iterator[RunningRegistry]:
    require_node()
    with running_registry(htpasswd=True) as running:
        yield running


@pytest.fixture
def cluster(registry: RunningRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """One with a restricted namespace, the push secret, and a node that runs what is scheduled."""
    with FakeKubernetes() as fake:
        fake.patch(
            "namespaces", "default", {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
        )
        monkeypatch.setenv("KUBECONFIG", str(fake.write_kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("TUNER_IMAGE", "reg.example/tuner:1")
        monkeypatch.setattr(follow, "POLL_S", 0.2)
        text = base64.b64encode(docker_config(registry.host).encode()).decode()
        fake.put(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "push"}, "data": {".dockerconfigjson": text}}
        )
        with kubelet(fake, Node(tmp_path / "node")):
            yield fake


@contextmanager
def kubelet(cluster: FakeKubernetes, node: Node) -> Iterator[None]:
    """Runs each new pod as processes and tells the server what became of its containers."""
    stop, trouble = threading.Event(), list[BaseException]()

    def run(pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        cluster.schedule(name)
        node.objects[:] = [*cluster.objects("configmaps"), *cluster.objects("secrets")]
        template = {"metadata": pod["metadata"], "spec": pod["spec"]}
        outcome = node.start_pod({"spec": {"template": template}}).wait()
        for container in outcome.sidecars & outcome.containers.keys():
            cluster.say(name, container, outcome.containers[container].message)
        for container, ended in outcome.containers.items():
            cluster.log(name, container, *ended.log.splitlines())
            if container not in outcome.sidecars:
                cluster.finish(name, container, ended.exit_code, ended.message)

    def go() -> None:
        seen: set[str] = set()
        try:
            while not stop.wait(0.1):
                for pod in cluster.objects("pods"):
                    if pod["status"]["phase"] == "Pending" and pod["metadata"]["uid"] not in seen:
                        seen.add(pod["metadata"]["uid"])
                        run(pod)
        except BaseException as error:  # shown at the test's end
            trouble.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(60)
    assert trouble == []


def workspace(folder: Path, server: HttpServer, registry: RunningRegistry, data: str) -> str:
    manifest = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": NAME},
        "resource": {"labelSelector": {"matchLabels": {"app": NAME}}},
        "tuning": {
            "preset": {"name": "phi-3-mini-4k-instruct"},
            "method": "qlora",
            "input": {"urls": [f"{server.url}/{data}?sig=GEHEIM"]},
            "output": {"image": f"{registry.host}/adapters/tickets:real", "imagePushSecret": "push"},
        },
    }
    path = folder / "workspace.yaml"
    path.write_text(json.dumps(manifest))
    return str(path)


def submit(path: str, registry: RunningRegistry) -> int:
    image = f"{registry.host}/adapters/tickets:1"
    options = ["--smoke", "--check-job", "--wait", "--output", image, "--plain-http", "--allow-private-urls"]
    return main(["submit", path, *options, "--set", "TrainingArguments.max_steps=5"])


def test_a_workspace_becomes_a_pushed_image(
    cluster: FakeKubernetes, registry: RunningRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with HttpServer() as server:
        server.serve("/train.parquet", write_data(tmp_path / "train.parquet", message_rows(40)))
        assert submit(workspace(tmp_path, server, registry, "train.parquet"), registry) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{registry.host}/adapters/tickets@sha256:")
    assert "checking first, without a GPU" in err
    assert main(["status", NAME]) == 0
    assert out.strip() in capsys.readouterr().out
    assert main(["logs", NAME, "--stage", "train"]) == 0
    shown = capsys.readouterr().out
    assert "LoRA on" in shown
    everything = shown + err + json.dumps([cluster.objects(each) for each in ("jobs", "pods", "configmaps", "events")])
    assert "GEHEIM" not in everything
    assert main(["delete", NAME]) == 0
    assert [each["metadata"]["name"] for each in cluster.objects("secrets")] == ["push"]


def test_bad_rows_end_in_the_check_job(
    cluster: FakeKubernetes, registry: RunningRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with HttpServer() as server:
        server.serve("/bad.jsonl", b'{"prompt": "a"}\n' * 20)
        assert submit(workspace(tmp_path, server, registry, "bad.jsonl"), registry) == 65
    assert "no GPU was asked for" in capsys.readouterr().err
    assert [each["metadata"]["name"] for each in cluster.objects("jobs")] == [f"{NAME}--check"]
