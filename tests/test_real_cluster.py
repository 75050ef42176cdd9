"""On a real cluster: what the API server, its Job controller and its garbage collector make of our objects.

    KUBECONFIG=… TUNER_TEST_IMAGE=reg.example/tuner@sha256:… ./.venv/bin/python -m pytest tests/test_real_cluster.py

TUNER_TEST_IMAGE is the Dockerfile's target `run`, where the nodes can pull it. Runs are smoke runs on CPUs.
TUNER_TEST_DATA is a URL of rows that pods can reach, without a query; else KAITO's quick start's. Each run of the suite
has a namespace of its own in which Pod Security is `restricted`, and deletes it at its end.
"""

import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tuner.cli import main
from tuner.cluster.api import CONFIG_MAP, JOB, NAMESPACE, POD, Api
from tuner.cluster.api_errors import BadRequestError, InvalidError
from tuner.cluster.follow import describe, load_run

KUBECONFIG, IMAGE = os.environ.get("KUBECONFIG", ""), os.environ.get("TUNER_TEST_IMAGE", "")
DATA = os.environ.get(
    "TUNER_TEST_DATA",
    "https://huggingface.co/datasets/philschmid/dolly-15k-oai-style/resolve/main/data/"
    "train-00000-of-00001-54e3756291ca09c6.parquet",
)
NAME = "smoke"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not KUBECONFIG, reason="no real cluster: set KUBECONFIG and TUNER_TEST_IMAGE"),
    pytest.mark.skipif(not IMAGE, reason="no image for the cluster: set TUNER_TEST_IMAGE"),
]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace for this run of the suite, gone at its end."""
    api = Api.from_config(env={"KUBECONFIG": KUBECONFIG})
    name = f"tuner-test-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    yield name
    api.delete(NAMESPACE, name)


@pytest.fixture
def api(namespace: str, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setenv("KUBECONFIG", KUBECONFIG)
    monkeypatch.setenv("TUNER_IMAGE", IMAGE)
    return Api.from_config(namespace=namespace)


def workspace(folder: Path, url: str = DATA, name: str = NAME) -> str:
    """One whose adapter goes to a volume of the pod: no registry is needed."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: {name}}}
resource: {{labelSelector: {{matchLabels: {{app: {name}}}}}}}
tuning:
  preset: {{name: phi-3-mini-4k-instruct}}
  method: qlora
  input: {{urls: ["{url}"]}}
  output: {{volumeSource: {{emptyDir: {{}}}}}}
"""
    )
    return str(path)


def run(command: str, *arguments: str, namespace: str) -> int:
    return main([command, *arguments, "-n", namespace])


def test_every_object_is_admitted(api: Api, tmp_path: Path) -> None:
    assert run("submit", workspace(tmp_path), "--smoke", "--dry-run", namespace=api.namespace) == 0
    assert run("submit", workspace(tmp_path), "--dry-run", "--check-job", namespace=api.namespace) == 0
    assert api.find(JOB, NAME) is None


def test_the_server_refuses_what_the_fake_one_refuses(api: Api) -> None:
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "strict"}, "data": {}}
    with pytest.raises(BadRequestError, match="does not know this field: dta"):
        api.create({**config_map, "dta": {}}, dry_run=True)
    with pytest.raises(InvalidError, match=r"metadata\.name"):
        api.create({**config_map, "metadata": {"name": "Upper"}}, dry_run=True)


def test_a_run_goes_to_its_end_and_goes_when_deleted(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace(tmp_path)
    assert run("submit", path, "--smoke", "--wait", namespace=api.namespace) == 0
    status = describe(load_run(api, NAME), datetime.now(UTC))
    assert (status.phase, status.attempt) == ("succeeded", 1)
    capsys.readouterr()
    assert run("logs", NAME, namespace=api.namespace) == 0
    assert capsys.readouterr().out
    assert run("events", NAME, namespace=api.namespace) == 0
    assert "Pod/" in capsys.readouterr().out
    assert run("submit", path, "--smoke", namespace=api.namespace) == 0  # the same: nothing is done
    assert run("submit", path, "--smoke", "--set", "LoraConfig.r=4", namespace=api.namespace) == 78
    assert run("delete", NAME, namespace=api.namespace) == 0
    assert api.find(JOB, NAME) is None
    assert api.list(CONFIG_MAP, label_selector=f"kaito.sh/workspace={NAME}").items == ()


def test_a_failure_that_no_retry_mends_ends_the_job_at_once(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace(tmp_path, f"{DATA}-that-is-not-there", "missing")
    assert run("submit", path, "--smoke", "--wait", namespace=api.namespace) == 66
    pods = api.list(POD, label_selector="batch.kubernetes.io/job-name=missing").items
    assert len(pods) == 1  # podFailurePolicy: no second try
    assert "(exit 66)" in capsys.readouterr().err
    assert run("delete", "missing", namespace=api.namespace) == 0


def test_a_cancelled_run_stops(api: Api, tmp_path: Path) -> None:
    path = workspace(tmp_path, name="cancelled")
    assert run("submit", path, "--smoke", namespace=api.namespace) == 0
    assert run("cancel", "cancelled", namespace=api.namespace) == 0
    job = api.find(JOB, "cancelled")
    assert job is None or "deletionTimestamp" in job["metadata"] or job["spec"].get("suspend")
