"""tuner/registry/push.py, probe.py and transport.py against Debian's docker-registry."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_registry import fake_registry
from tests.registries import (
    PASSWORD,
    USER,
    Fault,
    QuietHandler,
    RunningRegistry,
    docker_config,
    faulty,
    make_certificate,
    require,
    running_registry,
    running_server,
    running_token_server,
)
from tests.test_registry_image import ADAPTER, pack, write
from tuner.errors import ConfigError, DataError, DeniedError, InputMissingError, ServiceError
from tuner.reference import ImageReference, parse_reference
from tuner.registry import client_for
from tuner.registry.credentials import Credential, parse_credentials
from tuner.registry.image import Blob, Image, sha256_digest
from tuner.registry.probe import probe_push
from tuner.registry.push import Pushed, push_image
from tuner.registry.transport import Patience, RegistryClient
from tuner.retry import Backoff
from tuner.runspec import Network, Progress, Silent

pytestmark = pytest.mark.registry

QUICK = Patience(connect_timeout_s=2, read_timeout_s=2, backoff=Backoff(0.01, 0.05), first_contact_s=0.5, deadline_s=2)


class Recorder(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[Progress] = []

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress)


@pytest.fixture(scope="module")
def registry() -> Iterator[RunningRegistry]:
    with running_registry() as running:
        yield running


@pytest.fixture
def image(tmp_path: Path) -> Image:
    # Of every test its own: a registry keeps blobs for all repositories together.
    files = write(tmp_path / "adapter", {**ADAPTER, "run.lock.json": str(tmp_path).encode()})
    return pack(files, annotations={"sh.kaito.model.name": "phi-3"})


def client(host: str, *credentials: Credential, name: str = "adapters/phi", **options: object) -> RegistryClient:
    settings: dict[str, object] = {"plain_http": True, "patience": QUICK, **options}
    return RegistryClient(ImageReference(host, name, "v1"), credentials, **settings)  # type: ignore[arg-type]


def push(image: Image, host: str, *credentials: Credential, name: str = "adapters/phi", **options: object) -> Pushed:
    with client(host, *credentials, name=name, **options) as connected:
        return push_image(image, ImageReference(host, name, "v1"), connected, reporter=Silent())


def skopeo(*arguments: str) -> str:
    return subprocess.run([require("skopeo"), *arguments], capture_output=True, text=True, check=True).stdout


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_skopeo_sees_the_digest_that_was_returned(registry: RunningRegistry, image: Image) -> None:
    pushed = push(image, registry.host, name="skopeo/inspect")
    seen = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{registry.host}/skopeo/inspect:v1"))
    assert pushed.reference == f"{registry.host}/skopeo/inspect@{image.digest}"
    assert seen["Digest"] == pushed.digest == image.digest
    assert (seen["Architecture"], seen["Os"]) == ("amd64", "linux")
    assert seen["Labels"] == {"sh.kaito.model.name": "phi-3"}
    assert seen["Layers"] == [layer.digest for layer in image.layers]


def test_umoci_unpacks_the_very_files(registry: RunningRegistry, image: Image, tmp_path: Path) -> None:
    push(image, registry.host, name="umoci/unpack")
    source = f"docker://{registry.host}/umoci/unpack:v1"
    skopeo("--insecure-policy", "copy", "--src-tls-verify=false", source, f"oci:{tmp_path}/layout:v1")
    subprocess.run(
        [require("umoci"), "unpack", "--rootless", "--image", f"{tmp_path}/layout:v1", f"{tmp_path}/bundle"],
        capture_output=True,
        check=True,
    )
    unpacked = {path.name: path.read_bytes() for path in (tmp_path / "bundle/rootfs/data").iterdir()}
    assert unpacked == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}


def test_progress_counts_to_the_end_in_bytes(registry: RunningRegistry, image: Image) -> None:
    recorder = Recorder()
    with client(registry.host, name="progress") as connected:
        push_image(image, ImageReference(registry.host, "progress", "v1"), connected, reporter=recorder)
    done = [step.done for step in recorder.steps]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, image.size_bytes)
    assert {(step.stage, step.unit, step.total) for step in recorder.steps} == {("push", "B", image.size_bytes)}


def test_pushing_again_sends_nothing(registry: RunningRegistry, image: Image) -> None:
    first = push(image, registry.host, name="again")
    second = push(image, registry.host, name="again")
    assert first.bytes_sent == image.size_bytes
    assert (second.bytes_sent, second.blobs_skipped) == (0, 4)
    assert second.digest == first.digest


def test_another_card_sends_only_the_small_layer_and_the_config(
    registry: RunningRegistry, image: Image, tmp_path: Path
) -> None:
    push(image, registry.host, name="card")
    (tmp_path / "adapter/README.md").write_text(f"# Another {tmp_path}\n")
    other = pack({path.name: path for path in (tmp_path / "adapter").iterdir()})
    pushed = push(other, registry.host, name="card")
    assert pushed.bytes_sent == other.config.size_bytes + other.layers[0].size_bytes


def test_an_overwritten_tag_reports_its_old_digest(registry: RunningRegistry, image: Image) -> None:
    """KAITO fault 27: the tag is overwritten in silence, and no digest is reported."""
    assert push(image, registry.host, name="overwritten").previous_digest is None
    other = Image(image.manifest_bytes + b"\n", image.config, image.layers)
    assert push(other, registry.host, name="overwritten").previous_digest == image.digest


def test_a_tag_is_kept_when_it_may_not_be_overwritten(registry: RunningRegistry, image: Image) -> None:
    push(image, registry.host, name="kept")
    other = Image(image.manifest_bytes + b"\n", image.config, image.layers)
    reference = ImageReference(registry.host, "kept", "v1")
    with client(registry.host, name="kept") as connected:
        with pytest.raises(ConfigError, match=image.digest):
            push_image(other, reference, connected, overwrite=False, reporter=Silent())
        assert push_image(image, reference, connected, overwrite=False, reporter=Silent()).bytes_sent == 0


def test_a_push_to_a_digest_is_refused(registry: RunningRegistry, image: Image) -> None:
    reference = ImageReference(registry.host, "a", digest=image.digest)
    with client(registry.host) as connected, pytest.raises(ConfigError, match="push to a digest"):
        push_image(image, reference, connected, reporter=Silent())


def test_a_tag_moved_by_somebody_else_is_noticed(registry: RunningRegistry, image: Image) -> None:
    other = Image(image.manifest_bytes + b"\n", image.config, image.layers)

    class Racing(RegistryClient):
        def upload_manifest(self, content: bytes, media_type: str, name: str) -> None:
            super().upload_manifest(content, media_type, name)
            if name == "v1":
                super().upload_manifest(other.manifest_bytes, media_type, name)

    recorder = Recorder()
    reference = ImageReference(registry.host, "raced", "v1")
    with Racing(reference, plain_http=True, patience=QUICK) as connected:
        pushed = push_image(image, reference, connected, reporter=recorder)
    assert pushed.digest == image.digest
    assert len(recorder.warnings) == 1
    assert other.digest in recorder.warnings[0]


def test_a_file_changed_before_the_push_stops_it_without_a_tag(
    registry: RunningRegistry, image: Image, tmp_path: Path
) -> None:
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"other")
    (tmp_path / "adapter/README.md").write_bytes(b"other")
    with pytest.raises(DataError, match="changed"):
        push(image, registry.host, name="changed")
    assert registry.tags("changed") == []


# ── who may ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def htpasswd_registry() -> Iterator[RunningRegistry]:
    with running_registry(htpasswd=True) as running:
        yield running


def found(host: str, text: str) -> list[Credential]:
    return parse_credentials([text]).find(ImageReference(host, "adapters/phi", "v1"))


def test_a_password_pushes(htpasswd_registry: RunningRegistry, image: Image) -> None:
    host = htpasswd_registry.host
    assert push(image, host, *found(host, docker_config(host))).digest == image.digest


def test_a_wrong_password_is_denied_by_host_repository_user_and_key(htpasswd_registry: RunningRegistry) -> None:
    host = htpasswd_registry.host
    wrong = found(host, docker_config(host, USER, "hunter2"))
    with client(host, *wrong) as connected, pytest.raises(DeniedError) as caught:
        probe_push(ImageReference(host, "adapters/phi", "v1"), connected)
    for part in (host, "adapters/phi", f"user '{USER}'", f"key '{host}'", "push", "401 Unauthorized"):
        assert part in caught.value.message
    assert "hunter2" not in f"{caught.value.message}{caught.value.hint}"


def test_no_matching_key_is_said(htpasswd_registry: RunningRegistry) -> None:
    reference = ImageReference(htpasswd_registry.host, "adapters/phi", "v1")
    text = docker_config("other.azurecr.io")
    with (
        client_for(reference, Network(plain_http=True), [text]) as connected,
        pytest.raises(DeniedError, match="no credential") as caught,
    ):
        probe_push(reference, connected)
    assert caught.value.hint is not None
    assert "other.azurecr.io" in caught.value.hint


def test_every_matching_credential_is_tried_and_the_working_one_kept(
    htpasswd_registry: RunningRegistry, image: Image
) -> None:
    host = htpasswd_registry.host
    wrong, good = Credential(f"{host}/adapters", "old", "hunter2"), Credential(host, USER, PASSWORD)
    reference = ImageReference(host, "adapters/phi", "v1")
    with client(host, wrong, good) as connected:
        assert probe_push(reference, connected).credential == good.describe()
        assert push_image(image, reference, connected, reporter=Silent()).digest == image.digest


def test_the_probe_leaves_nothing_and_tells_the_tag(registry: RunningRegistry, image: Image) -> None:
    reference = ImageReference(registry.host, "probed", "v1")
    with client(registry.host, name="probed") as connected:
        assert probe_push(reference, connected).existing_digest is None
        assert registry.tags("probed") == []
        push_image(image, reference, connected, reporter=Silent())
        assert probe_push(reference, connected).existing_digest == image.digest


def test_netrc_is_not_asked(
    htpasswd_registry: RunningRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {USER} password wrong\n")
    monkeypatch.setenv("NETRC", str(netrc))
    host = htpasswd_registry.host
    with client(host, Credential(host, USER, PASSWORD)) as connected:
        probe_push(ImageReference(host, "adapters/phi", "v1"), connected)


@pytest.mark.parametrize("form", ["password", "identity token", "identity token, server without POST", "zero GUID"])
def test_a_token_server_is_answered(image: Image, form: str) -> None:
    zero = "00000000-0000-0000-0000-000000000000"
    with (
        running_token_server({USER: {"pull", "push"}}, refresh_tokens={"refresh": USER}) as tokens,
        running_registry(token_server=tokens) as registry,
    ):
        tokens.knows_post = "without POST" not in form
        credential = {
            "password": Credential("k", USER, PASSWORD),
            "zero GUID": Credential("k", zero, "refresh"),
        }.get(form, Credential("k", USER, identity_token="refresh"))
        assert push(image, registry.host, credential).digest == image.digest
        # asked for once with all that the push needs, then kept
        assert [request["method"] for request in tokens.requests] == [["POST" if form == "identity token" else "GET"]]
        assert tokens.requests[0]["scope"] == ["repository:adapters/phi:pull,push"]
        assert tokens.requests[0]["service"] == ["tests"]


def test_tokens_decide_who_may_push() -> None:
    reader, writer = Credential("k1", "reader", PASSWORD), Credential("k2", "writer", PASSWORD)
    with (
        running_token_server({"reader": {"pull"}, "writer": {"pull", "push"}}) as tokens,
        running_registry(token_server=tokens) as registry,
    ):
        reference = ImageReference(registry.host, "adapters/phi", "v1")
        with client(registry.host, reader) as connected, pytest.raises(DeniedError, match="'reader'"):
            probe_push(reference, connected)
        with client(registry.host, reader, writer) as connected:
            assert "'writer'" in probe_push(reference, connected).credential
        wrong = Credential("k", "writer", "hunter2")
        with client(registry.host, wrong) as connected, pytest.raises(DeniedError, match=r"token server.*who"):
            probe_push(reference, connected)


def test_a_token_that_ends_in_the_middle_is_renewed(image: Image) -> None:
    with (
        running_token_server({USER: {"pull", "push"}}) as tokens,
        running_registry(token_server=tokens) as registry,
    ):
        tokens.lifetime_s = 1
        reference = ImageReference(registry.host, "adapters/phi", "v1")
        with client(registry.host, Credential("k", USER, PASSWORD)) as connected:
            probe_push(reference, connected)
            time.sleep(1.1)
            assert push_image(image, reference, connected, reporter=Silent()).digest == image.digest
        assert len(tokens.requests) >= 2


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tls_and_its_three_mistakes(
    registry: RunningRegistry, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    pair = make_certificate(tmp_path)
    with running_registry(tls=pair) as secured:
        pushed = push(image, secured.host, plain_http=False, ca_file=str(pair.certificate))
        assert pushed.digest == image.digest
        with pytest.raises(ConfigError) as unknown:
            push(image, secured.host, plain_http=False)
        with pytest.raises(ConfigError) as plain:
            push(image, secured.host, plain_http=True)
    with pytest.raises(ConfigError) as secure:
        push(image, registry.host, plain_http=False)
    hints = [str(caught.value.hint) for caught in (unknown, plain, secure)]
    assert ["--ca" in hints[0], "leave out --plain-http" in hints[1], "add --plain-http" in hints[2]] == [True] * 3


def test_a_ca_file_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pem: not there"):
        client_for(parse_reference("a.b/c"), Network(ca_file="nowhere.pem"), [])


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────

UPLOAD = r"/blobs/uploads/"
FAULTS = {
    "408 on HEAD": Fault("HEAD", "/blobs/", 408),
    "500 on POST": Fault("POST", UPLOAD, 500),
    "502 on POST, four times": Fault("POST", UPLOAD, 502, times=4),
    "429 with Retry-After": Fault("POST", UPLOAD, 429, {"Retry-After": "0"}),
    "503 with a date": Fault("PUT", "/manifests/", 503, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}),
    "504 on PATCH": Fault("PATCH", UPLOAD, 504),
    "500 on PUT of a blob": Fault("PUT", UPLOAD, 500),
    "504 on PUT of a manifest": Fault("PUT", "/manifests/", 504),
    "reset on POST": Fault("POST", UPLOAD),
    "reset on PATCH": Fault("PATCH", UPLOAD),
    "reset on PATCH, three times": Fault("PATCH", UPLOAD, times=3),
    "PATCH done, answer lost": Fault("PATCH", UPLOAD, after=True),
    "PUT of a blob done, answer lost": Fault("PUT", UPLOAD, after=True),
    "PUT of a manifest done, answer lost": Fault("PUT", "/manifests/", after=True),
    "reset on the last HEAD": Fault("HEAD", "/manifests/", after=True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_passing_costs_no_push(registry: RunningRegistry, image: Image, name: str) -> None:
    fault = replace(FAULTS[name])
    with faulty(registry) as proxy:
        proxy.faults.append(fault)
        repository = "faults/" + re.sub("[^a-z0-9]+", "-", name.lower())
        pushed = push(image, proxy.host, name=repository)
        assert fault.times == 0, "the fault was not met"
    assert pushed.digest == image.digest
    assert registry.tags(repository) == ["v1"]
    assert pushed.bytes_sent <= 4 * image.size_bytes


class ResumableRegistry(QuietHandler):
    """Keeps what a broken PATCH has brought, as newer registries do; its connection breaks once after 400,000 bytes."""

    received: bytearray
    breaks: list[int]
    ranges: list[str | None]

    def do_POST(self) -> None:
        self.reply(202, b"", {"Location": "/v2/upload"})

    def do_PATCH(self) -> None:
        left = int(self.headers["Content-Length"])
        self.ranges.append(self.headers["Content-Range"])
        take = self.breaks.pop() if self.breaks else left
        self.received += self.rfile.read(take)
        if take < left:
            self.close_connection = True
            return
        self.reply(202, b"", {"Location": "/v2/upload?state=2"})

    def do_GET(self) -> None:
        self.reply(204, b"", {"Location": "/v2/upload?state=1", "Range": f"0-{len(self.received) - 1}"})

    def do_PUT(self) -> None:
        digest = sha256_digest(bytes(self.received))
        self.reply(201 if self.path.endswith(f"digest={digest}") else 400, b"")


def test_a_broken_upload_goes_on_where_the_registry_has_it(image: Image) -> None:
    class Handler(ResumableRegistry):
        received, breaks, ranges = bytearray(), [400_000], []

    layer = image.layers[2]
    with running_server(Handler) as host, client(host) as connected:
        connected.for_push()
        sent = connected.upload_blob(layer, on_progress=lambda _: None)
    assert Handler.ranges == [None, f"400000-{layer.size_bytes - 1}"]
    assert len(Handler.received) == layer.size_bytes
    assert sent < 2 * layer.size_bytes


@pytest.mark.parametrize("method", ["HEAD", "POST", "PATCH", "PUT"])
def test_a_registry_that_never_answers_is_asked_again(registry: RunningRegistry, image: Image, method: str) -> None:
    impatient = replace(QUICK, read_timeout_s=0.2, connect_timeout_s=0.2)
    with faulty(registry) as proxy:
        proxy.faults.append(Fault(method, "/", hang_s=0.6))
        pushed = push(image, proxy.host, name=f"hangs/{method.lower()}", patience=impatient)
    assert pushed.digest == image.digest


def test_a_lost_answer_does_not_send_the_blob_twice(registry: RunningRegistry, image: Image) -> None:
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", UPLOAD, after=True))
        assert push(image, proxy.host, name="lost").bytes_sent == image.size_bytes


def test_an_endless_fault_ends_with_the_registrys_words_and_without_a_tag(
    registry: RunningRegistry, image: Image
) -> None:
    body = b'{"errors": [{"code": "UNKNOWN", "message": "unknown error", "detail": "no space left on device"}]}'
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", UPLOAD, 500, body=body, times=10_000))
        with pytest.raises(ServiceError, match="no space left on device"):
            push(image, proxy.host, name="endless")
        assert sum(method == "DELETE" for method, _, _ in proxy.log) == 1, "the upload was not cancelled"
    assert registry.tags("endless") == []


def test_a_wait_past_the_deadline_is_not_begun(registry: RunningRegistry, image: Image) -> None:
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("HEAD", "/manifests/", 429, {"Retry-After": "3600"}, times=10_000))
        with pytest.raises(ServiceError, match="come back in 3600 s"):
            push(image, proxy.host)
        assert len(proxy.log) == 1


def test_a_denial_is_not_repeated_and_says_what_the_registry_said(registry: RunningRegistry, image: Image) -> None:
    body = b'{"errors": [{"code": "DENIED", "message": "quota of hunter2 exceeded, see https://x/y?sig=s3cr3t"}]}'
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("POST", UPLOAD, 403, body=body, times=10_000))
        with pytest.raises(DeniedError, match="DENIED: quota of … exceeded") as caught:
            push(image, proxy.host, Credential("k", "ci", "hunter2"))
        assert sum(method == "POST" for method, _, _ in proxy.log) == 1
    assert "s3cr3t" not in caught.value.message


def test_a_registry_that_cannot_be_reached_is_said_in_seconds() -> None:
    with client("127.0.0.1:1") as connected, pytest.raises(ServiceError, match="nothing listens there"):
        probe_push(ImageReference("127.0.0.1:1", "adapters/phi", "v1"), connected)


def test_a_missing_repository_is_input_missing(registry: RunningRegistry) -> None:
    with client(registry.host) as connected, pytest.raises(InputMissingError, match="404"):
        connected.get_manifest("nowhere")


def test_a_registry_that_receives_other_bytes_is_told_apart_from_a_changed_file(
    registry: RunningRegistry,
) -> None:
    here_wrong = Blob("x", sha256_digest(b"other"), 5, (b"bytes",))
    there_wrong = Blob("x", sha256_digest(b"bytes"), 5, (b"bytes",))
    with faulty(registry) as proxy, client(proxy.host) as connected:
        connected.for_push()
        with pytest.raises(DataError, match="have changed"):
            connected.upload_blob(here_wrong, on_progress=lambda _: None)
        proxy.faults.append(Fault("PUT", UPLOAD, 400, body=b'{"errors": [{"code": "DIGEST_INVALID"}]}'))
        with pytest.raises(ServiceError, match="other bytes"):
            connected.upload_blob(there_wrong, on_progress=lambda _: None)


def test_credentials_stay_with_the_registry_when_a_blob_lies_elsewhere(
    htpasswd_registry: RunningRegistry, registry: RunningRegistry, image: Image
) -> None:
    push(image, registry.host, name="adapters/phi")
    with faulty(htpasswd_registry) as proxy, faulty(registry) as storage:
        target = f"http://{storage.host}/v2/adapters/phi/blobs/{image.config.digest}?sig=s3cr3t"
        proxy.faults.append(Fault("GET", "/blobs/", 307, {"Location": target}))
        with client(proxy.host, Credential("k", USER, PASSWORD)) as connected:
            connected.for_push()
            connected.start_upload()
            content = b"".join(connected.download_blob(image.config.digest, image.config.size_bytes))
        assert content == image.config_bytes
        assert any("Authorization" in headers for _, _, headers in proxy.log)
        assert storage.log
        assert not any("Authorization" in headers for _, _, headers in storage.log)


@pytest.mark.parametrize(
    "location", ["http://169.254.169.254/x", "http://localhost/x", "http://10.0.0.1/x", "ftp://a/x"]
)
def test_an_upload_is_not_led_to_an_internal_address(registry: RunningRegistry, location: str) -> None:
    with faulty(registry) as proxy, client(proxy.host) as connected:
        proxy.faults.append(Fault("POST", UPLOAD, 202, {"Location": location}))
        with pytest.raises(DeniedError, match="not going to"):
            connected.start_upload()


def test_a_realm_elsewhere_inside_gets_no_password(registry: RunningRegistry) -> None:
    challenge = {"WWW-Authenticate": 'Bearer realm="http://169.254.169.254/token",service="x"'}
    with faulty(registry) as proxy, client(proxy.host, Credential("k", USER, PASSWORD)) as connected:
        proxy.faults.append(Fault("POST", UPLOAD, 401, challenge))
        with pytest.raises(DeniedError, match="token server"):
            connected.start_upload()


def test_a_broken_download_goes_on_where_it_broke(registry: RunningRegistry, image: Image) -> None:
    push(image, registry.host, name="ranges")
    layer = image.layers[2]
    with faulty(registry) as proxy:

        def cut(method: str, path: str, body: bytes) -> bytes:
            cut_at = 300_000 if "/blobs/" in path and len(body) == layer.size_bytes else len(body)
            return body[:cut_at]

        proxy.change_answer = cut
        with client(proxy.host, name="ranges") as connected, layer.open() as stream:
            assert b"".join(connected.download_blob(layer.digest, layer.size_bytes)) == stream.read()
        assert [headers.get("Range") for _, _, headers in proxy.log] == [None, "bytes=300000-"]


def test_a_download_that_breaks_again_and_again_still_arrives(registry: RunningRegistry, image: Image) -> None:
    push(image, registry.host, name="breaks")
    layer = image.layers[2]
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("GET", "/blobs/", cut_answer=200_000, times=100))
        with client(proxy.host, name="breaks") as connected, layer.open() as stream:
            assert b"".join(connected.download_blob(layer.digest, layer.size_bytes)) == stream.readall()
        starts = [headers.get("Range") for _, _, headers in proxy.log]
    assert starts == sorted(starts, key=lambda text: int((text or "bytes=0-")[6:-1]))
    assert len(starts) == len(set(starts)) > 5


# ── pieces and mounts ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_blob_goes_out_in_pieces_where_that_is_wanted(registry: RunningRegistry, image: Image) -> None:
    with faulty(registry) as proxy:
        pushed = push(image, proxy.host, name="pieces", chunk_bytes=500_000)
        ranges = [headers.get("Content-Range") for method, _, headers in proxy.log if method == "PATCH"]
    last = image.layers[2].size_bytes - 1
    assert pushed.bytes_sent == image.size_bytes
    assert ranges[3:] == ["0-499999", "500000-999999", f"1000000-{last}"]


def test_a_piece_that_breaks_goes_on_where_the_registry_has_it(image: Image) -> None:
    with fake_registry(break_after=[10**9] * 4 + [100]) as fake:
        assert push(image, fake.host, chunk_bytes=500_000).digest == image.digest
        ranges = [headers.get("Content-Range") for method, _, headers in fake.log if method == "PATCH"]
    assert ranges[4:6] == ["500000-999999", "500100-1000099"]


def test_pieces_are_not_smaller_than_the_registry_wants_them(image: Image) -> None:
    with fake_registry(least_chunk_bytes=1_000_000) as fake:
        push(image, fake.host, chunk_bytes=10)
        ranges = [headers.get("Content-Range") for method, _, headers in fake.log if method == "PATCH"]
    assert ranges[3:] == ["0-999999", f"1000000-{image.layers[2].size_bytes - 1}"]


def test_a_blob_of_another_repository_is_taken_over(registry: RunningRegistry, image: Image) -> None:
    push(image, registry.host, name="base")
    reference = ImageReference(registry.host, "mounted", "v1")
    with client(registry.host, name="mounted") as connected:
        probe_push(reference, connected)
        pushed = push_image(image, reference, connected, mount_from="base", reporter=Silent())
    assert (pushed.bytes_sent, pushed.blobs_skipped) == (0, 4)


@pytest.mark.parametrize("reason", ["not there", "no permission", "no mounts"])
def test_a_blob_that_can_not_be_taken_over_is_sent(image: Image, reason: str) -> None:
    if reason == "no mounts":
        with fake_registry(knows_mount=False) as fake, client(fake.host) as connected:
            reference = ImageReference(fake.host, "adapters/phi", "v1")
            probe_push(reference, connected)
            assert push_image(image, reference, connected, mount_from="base", reporter=Silent()).blobs_skipped == 0
            assert fake.uploads == {}, "an upload was left open"
        return
    with (
        running_token_server({USER: {"pull", "push"}}) as tokens,
        running_registry(token_server=tokens) as secured,
        faulty(secured) as proxy,
    ):
        if reason == "no permission":
            challenge = {
                "WWW-Authenticate": f'Bearer realm="{tokens.url}",service="tests",scope="repository:base:pull"'
            }
            proxy.faults.append(Fault("POST", "mount=", 401, challenge, times=100))
        reference = ImageReference(proxy.host, "adapters/phi", "v1")
        with client(proxy.host, Credential("k", USER, PASSWORD)) as connected:
            probe_push(reference, connected)
            pushed = push_image(image, reference, connected, mount_from="base", reporter=Silent())
        assert pushed.digest == image.digest
        assert pushed.blobs_skipped == 0


def test_a_refused_mount_is_not_asked_for_again_with_the_next_token(image: Image) -> None:
    with (
        running_token_server({USER: {"pull", "push"}}) as tokens,
        running_registry(token_server=tokens) as secured,
        faulty(secured) as proxy,
    ):
        tokens.lifetime_s = 1
        parameters = f'realm="{tokens.url}",service="tests",scope="repository:base:pull"'
        challenge = {"WWW-Authenticate": f"Bearer {parameters}"}
        proxy.faults.append(Fault("POST", "mount=", 401, challenge, times=100))
        proxy.faults.append(Fault("PUT", "/manifests/", 503, hang_s=1))
        reference = ImageReference(proxy.host, "adapters/phi", "v1")
        with client(proxy.host, Credential("k", USER, PASSWORD)) as connected:
            probe_push(reference, connected)
            push_image(image, reference, connected, mount_from="base", reporter=Silent())
    scopes = [request["scope"] for request in tokens.requests]
    assert any("repository:base:pull" in scope for scope in scopes)
    assert scopes[-1] == ["repository:adapters/phi:pull,push"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_name_that_leads_inside_is_found_out_when_the_connection_stands(
    registry: RunningRegistry, image: Image, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *rest: object, **options: object) -> object:
        return real("127.0.0.1" if host == "storage.example.com" else host, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with faulty(registry) as proxy, faulty(registry) as inside, client(proxy.host) as connected:
        port = inside.host.rpartition(":")[2]
        target = {"Location": f"{scheme}://storage.example.com:{port}/v2/x?sig=s3cr3t"}
        proxy.faults.append(Fault("POST", UPLOAD, 202, target))
        connected.for_push()
        with pytest.raises(
            DeniedError, match=r"storage\.example\.com resolves to a forbidden address: 127\.0\.0\.1 is"
        ) as caught:
            connected.upload_blob(image.config, on_progress=lambda _: None)
        assert inside.log == []
    assert "s3cr3t" not in caught.value.message


def test_a_client_has_no_method_of_oras_that_goes_around_it() -> None:
    inherited = {"push", "pull", "login", "do_request", "get_blob", "delete_tag", "blob_exists", "chunked_upload"}
    assert not inherited & set(dir(RegistryClient))
