"""tuner/registry/azure.py: a pod without a secret pushes to an Azure registry."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.fake_registry import FakeHandler, FakeRegistry
from tests.registries import docker_config, running_server
from tests.test_registry_image import ADAPTER, pack, write
from tests.test_registry_push import client, push
from tuner.errors import ConfigError, DeniedError, InputMissingError, ServiceError
from tuner.reference import ImageReference, parse_reference
from tuner.registry import client_for
from tuner.registry.azure import WorkloadIdentity, is_azure_registry, parse_reply, workload_identity
from tuner.registry.credentials import Credential
from tuner.registry.image import Image
from tuner.registry.probe import probe_push
from tuner.runspec import Network

CLIENT, TENANT = "11111111-2222-3333-4444-555555555555", "tenant-1"
FEDERATED, ACCESS, REFRESH = "f3d3rat3d", "acc3ss-t0k3n", "r3fr3sh-t0k3n"


@dataclass
class Azure:
    """Entra ID and an Azure registry under one roof, each as strict as the real one."""

    host: str = ""
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    federated_token: str = FEDERATED
    asked: list[str] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)  # paths that answer 503 once
    realm: str | None = None

    def identity(self, token_file: Path) -> WorkloadIdentity:
        return WorkloadIdentity(CLIENT, TENANT, token_file, f"http://{self.host}")


@contextlib.contextmanager
def running_azure() -> Iterator[Azure]:
    azure = Azure()

    class Handler(FakeHandler):
        registry = azure.registry

        def _route(self) -> None:
            self._unread = int(self.headers.get("Content-Length") or 0)
            path = urlsplit(self.path).path
            if "oauth2" not in path:
                if self.headers.get("Authorization") == "Bearer push":
                    super()._route()
                    return
                self._body()
                realm = azure.realm or f"http://{azure.host}/oauth2/token"
                self.reply(401, b"", {"WWW-Authenticate": f'Bearer realm="{realm}",service="{azure.host}"'})
                return
            azure.asked.append(path)
            form = {name: values[0] for name, values in parse_qs(self._body().decode()).items()}
            if path in azure.failing:
                azure.failing.remove(path)
                self.reply(503, b"")
            elif path == f"/{TENANT}/oauth2/v2.0/token":
                self._entra_id(form)
            elif path == "/oauth2/exchange":
                wanted = {
                    "grant_type": "access_token", "service": azure.host, "tenant": TENANT, "access_token": ACCESS
                }  # fmt: skip
                self._give({"refresh_token": REFRESH} if form == wanted else None)
            else:
                scope_is_right = form.get("scope", "").startswith("repository:adapters/phi:pull,push")
                is_right = form.get("refresh_token") == REFRESH and scope_is_right
                self._give({"access_token": "push"} if is_right else None)

        def _entra_id(self, form: dict[str, str]) -> None:
            wanted = {
                "grant_type": "client_credentials",
                "client_id": CLIENT,
                "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
                "client_assertion": azure.federated_token,
                "scope": "https://containerregistry.azure.net/.default",
            }
            if form == wanted:
                self._give({"token_type": "Bearer", "access_token": ACCESS})
                return
            text = "AADSTS700024: Client assertion is not within its valid time range. Trace ID: 1"
            self.reply(401, json.dumps({"error": "invalid_client", "error_description": text}).encode())

        def _give(self, reply: object) -> None:
            self.reply(200 if reply else 401, json.dumps(reply).encode())

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _route

    with running_server(Handler) as host:
        azure.host = azure.registry.host = host
        yield azure


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{FEDERATED}\n")
    return path


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return pack(write(tmp_path / "adapter", ADAPTER))


def test_a_workload_identity_pushes_without_a_secret(image: Image, token_file: Path) -> None:
    with running_azure() as azure:
        credential = Credential("AZURE_CLIENT_ID", workload_identity=azure.identity(token_file))
        assert push(image, azure.host, credential).digest == image.digest
        # once for the whole push
        assert azure.asked == [f"/{TENANT}/oauth2/v2.0/token", "/oauth2/exchange", "/oauth2/token"]


def test_the_token_file_is_read_again_for_each_token(image: Image, token_file: Path) -> None:
    with running_azure() as azure:
        credential = Credential("AZURE_CLIENT_ID", workload_identity=azure.identity(token_file))
        push(image, azure.host, credential)
        azure.federated_token = "renewed"
        token_file.write_text("renewed")
        assert push(image, azure.host, credential).bytes_sent == 0


@pytest.mark.parametrize("path", [f"/{TENANT}/oauth2/v2.0/token", "/oauth2/exchange", "/oauth2/token"])
def test_a_hiccup_on_the_way_to_the_token_costs_nothing(image: Image, token_file: Path, path: str) -> None:
    with running_azure() as azure:
        azure.failing.append(path)
        credential = Credential("AZURE_CLIENT_ID", workload_identity=azure.identity(token_file))
        assert push(image, azure.host, credential).digest == image.digest


def test_a_refusal_names_the_identity_and_entra_ids_reason_and_no_token(token_file: Path) -> None:
    token_file.write_text("st4l3-t0k3n")
    with running_azure() as azure:
        credential = Credential("AZURE_CLIENT_ID", workload_identity=azure.identity(token_file))
        with client(azure.host, credential) as connected, pytest.raises(DeniedError) as caught:
            probe_push(ImageReference(azure.host, "adapters/phi", "v1"), connected)
    assert f"the Azure workload identity {CLIENT}" in caught.value.message
    assert "AADSTS700024" in caught.value.message
    assert "st4l3" not in f"{caught.value.message}{caught.value.hint}{credential!r}"


def test_the_identity_is_shown_to_no_other_token_server(token_file: Path) -> None:
    with running_azure() as azure, running_azure() as other:
        azure.realm = f"http://{other.host}/oauth2/token"
        credential = Credential("AZURE_CLIENT_ID", workload_identity=azure.identity(token_file))
        with client(azure.host, credential) as connected, pytest.raises(DeniedError, match="is not for"):
            probe_push(ImageReference(azure.host, "adapters/phi", "v1"), connected)
        assert (azure.asked, other.asked) == ([], [])


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with running_azure() as azure:
        credential = Credential("AZURE_CLIENT_ID", workload_identity=azure.identity(tmp_path / "nowhere"))
        with client(azure.host, credential) as connected, pytest.raises(InputMissingError, match="nowhere: the feder"):
            probe_push(ImageReference(azure.host, "adapters/phi", "v1"), connected)


ENV = {"AZURE_CLIENT_ID": CLIENT, "AZURE_TENANT_ID": TENANT, "AZURE_FEDERATED_TOKEN_FILE": "/t"}


def test_the_environment_gives_the_identity_whole_or_not_at_all() -> None:
    assert workload_identity(ENV) == WorkloadIdentity(CLIENT, TENANT, Path("/t"))
    for name in ENV:
        assert workload_identity({**ENV, name: ""}) is None


def test_a_sovereign_cloud_has_its_own_authority() -> None:
    identity = workload_identity({**ENV, "AZURE_AUTHORITY_HOST": "https://login.microsoftonline.us/"})
    assert identity is not None
    assert identity.token_url() == f"https://login.microsoftonline.us/{TENANT}/oauth2/v2.0/token"


def test_an_authority_over_http_is_refused() -> None:
    with pytest.raises(ConfigError, match="https"):
        workload_identity({**ENV, "AZURE_AUTHORITY_HOST": "http://login.microsoftonline.us/"})


@pytest.mark.parametrize(
    ("host", "is_azure"),
    [
        ("my.azurecr.io", True),
        ("MY.azurecr.cn:443", True),
        ("azurecr.io.evil.com", False),
        ("ghcr.io", False),
        ("127.0.0.1:5000", False),
    ],
)
def test_only_azure_registries_are_given_the_identity(
    host: str, is_azure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_azure_registry(host) == is_azure
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    with client_for(parse_reference(f"{host}/adapters/phi:v1"), Network(), []) as connected:
        assert (connected.credential.workload_identity is not None) == is_azure


def test_a_secret_goes_before_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    configs = [docker_config("my.azurecr.io")]
    with client_for(parse_reference("my.azurecr.io/adapters/phi:v1"), Network(), configs) as connected:
        assert connected.credential.username == "tuner"


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"access_token": 1}', b'{"access_token": "a\\nb"}'])
def test_a_reply_without_a_token_is_refused(body: bytes) -> None:
    with pytest.raises(ServiceError, match="no access_token"):
        parse_reply(body, "access_token", "a.b")
