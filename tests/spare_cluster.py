"""A cluster to spare for tests, named by one file:

    TUNER_TEST_CLUSTER=cluster.json pytest tests/test_real_cluster.py

    {"kubeconfig": "/home/me/.kube/kind", "image": "reg.example/tuner@sha256:…"}

`image` is the Dockerfile's target `run`, where the nodes can pull it. `data` may name a URL of rows that pods reach,
without a query; else it is the quick start's. Where pods run on this machine, with its network, `loopback` says how
they get at what the suite serves them, and whole runs under the controller are possible without a GPU and the internet:

    "loopback": {"hosts": "/lab/hosts", "certificates": "/lab/ca.pem"}

are files that pods see as /etc/hosts and trust as authorities. The suite writes both: huggingface.co and
contoso.azurecr.io are this machine then, with a tiny model, data and a registry.
"""

import json
import os
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest

from tests.http_server import HttpServer
from tests.hub import publish_model
from tests.registries import RunningRegistry, Tls, docker_config, require, running_registry

HUB, REGISTRY = "huggingface.co", "contoso.azurecr.io"
QUICK_START_DATA = (
    "/datasets/philschmid/dolly-15k-oai-style/resolve/main/data/train-00000-of-00001-54e3756291ca09c6.parquet"
)


@dataclass(frozen=True)
class SpareCluster:
    kubeconfig: str
    image: str
    data: str
    loopback: Mapping[str, str] | None

    @classmethod
    def read(cls) -> "SpareCluster | None":
        path = os.environ.get("TUNER_TEST_CLUSTER")
        if not path:
            return None
        written: dict[str, Any] = json.loads(Path(path).read_text())
        return cls(
            kubeconfig=written["kubeconfig"],
            image=written["image"],
            data=written.get("data", f"https://{HUB}{QUICK_START_DATA}"),
            loopback=written.get("loopback"),
        )


@dataclass(frozen=True)
class Services:
    """What pods find under the names of the Hub and of a registry. `registry` is with its port, as images have it."""

    hub: HttpServer
    running: RunningRegistry
    registry: str
    certificate: Path

    def digest_of(self, repository: str, tag: str) -> str:
        """As the registry says it."""
        (login,) = json.loads(docker_config("r"))["auths"].values()
        trusting = ssl.create_default_context(cafile=str(self.certificate))
        accept = "application/vnd.oci.image.manifest.v1+json"
        with closing(HTTPSConnection(self.running.host, context=trusting, timeout=30)) as connection:
            headers = {"Authorization": f"Basic {login['auth']}", "Accept": accept}
            connection.request("HEAD", f"/v2/{repository}/manifests/{tag}", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.status
            return str(answer.headers["Docker-Content-Digest"])


@contextmanager
def loopback_services(directory: Path, cluster: SpareCluster) -> Iterator[Services]:
    """The Hub and the registry on this machine, told to the pods. Needs the right to listen on port 443."""
    if cluster.loopback is None:
        pytest.skip("pods do not run on this machine: there is no `loopback` in the cluster's file")
    pair = _certificate(directory)
    hosts, authorities = Path(cluster.loopback["hosts"]), Path(cluster.loopback["certificates"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    with ExitStack() as stack:
        hub = stack.enter_context(HttpServer(context, port=443))
        running = stack.enter_context(running_registry(htpasswd=True, tls=pair))
        hosts.write_text(f"127.0.0.1 localhost {HUB} {REGISTRY}\n")
        authorities.write_bytes(pair.certificate.read_bytes())
        port = running.host.rpartition(":")[2]
        yield Services(hub, running, f"{REGISTRY}:{port}", pair.certificate)


def _certificate(directory: Path) -> Tls:
    pair = Tls(directory / "key.pem", directory / "certificate.pem")
    names = f"subjectAltName=IP:127.0.0.1,DNS:{HUB},DNS:{REGISTRY}"
    asked = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tests", "-addext", names]
    files = ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run([require("openssl"), *asked, *files], check=True, capture_output=True)
    return pair


def publish_tiny(hub: HttpServer, preset_name: str) -> None:
    """A tiny model in place of a preset's."""
    from tests.tiny import tiny_base
    from tuner.presets import find_preset

    preset = find_preset(preset_name)
    assert preset.revision is not None
    files = {path.name: path.read_bytes() for path in tiny_base(preset_name).iterdir() if path.is_file()}
    publish_model(hub, files, preset.model_id, preset.revision)
