"""The robustness matrix: what happens to a push when everything around it goes wrong.

Each test is named for its row, R1 to R24. Debian's docker-registry behind a fault proxy where it can show it, the
registry of tests/fake_registry.py where it can not.
"""

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from tests.fake_registry import FakeRegistry, Received, fake_registry
from tests.registries import (
    PASSWORD,
    USER,
    Fault,
    QuietHandler,
    RunningRegistry,
    docker_config,
    faulty,
    make_certificate,
    running_registry,
    running_server,
    running_token_server,
)
from tests.test_registry_credentials import jwt
from tests.test_registry_image import ADAPTER, pack, write
from tests.test_registry_push import QUICK, UPLOAD, Recorder, client, found, push, registry
from tuner.errors import ConfigError, DataError, DeniedError, InterruptedRunError, NotPushedError, ServiceError
from tuner.open_files import OpenDirectory
from tuner.reference import ImageReference
from tuner.registry.credentials import Credential
from tuner.registry.image import Image, sha256_digest
from tuner.registry.probe import probe_push
from tuner.registry.push import Pushed, push_image
from tuner.registry.push_state import PUSH_STATE, PushOptions, load_push_state, push_resumably
from tuner.registry.transport import Patience
from tuner.runspec import Network, Reporter, Silent

__all__ = ["registry"]  # a fixture

pytestmark = pytest.mark.registry


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write(tmp_path / "adapter", {**ADAPTER, "run.lock.json": json.dumps({"run_digest": str(tmp_path)}).encode()})
    return tmp_path / "adapter"


@pytest.fixture
def image(adapter: Path) -> Image:
    return image_of(adapter)


def image_of(adapter: Path) -> Image:
    return pack({path.name: path for path in adapter.iterdir()})


def deliver(
    adapter: Path,
    host: str,
    *,
    name: str = "adapters/phi",
    docker_configs: tuple[str, ...] = (),
    reporter: Reporter | None = None,
    patience: Patience = QUICK,
    overwrite: bool = True,
    **options: Any,
) -> Pushed:
    """As a run pushes: from its work directory, which is the adapter's parent."""
    return push_resumably(
        image_of(adapter),
        ImageReference(host, name, "v1"),
        adapter=OpenDirectory.at(adapter),
        directory=OpenDirectory.at(adapter.parent),
        overwrite=overwrite,
        network=Network(plain_http=True),
        docker_configs=docker_configs,
        options=PushOptions(**options),
        reporter=reporter or Silent(),
        patience=patience,
    )


# ── R1 to R4: before anything is downloaded ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reason", ["wrong secret", "pull only", "repository denied"])
def test_r1_no_permission_is_found_by_the_preflight_and_says_who_and_where(reason: str) -> None:
    user, password = ("reader", PASSWORD) if reason == "pull only" else (USER, PASSWORD)
    if reason == "wrong secret":
        password = "hunter2"
    with (
        running_token_server({"reader": {"pull"}, USER: {"pull", "push"}}) as tokens,
        running_registry(token_server=tokens) as secured,
        faulty(secured) as proxy,
    ):
        if reason == "repository denied":
            body = b'{"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}'
            proxy.faults.append(Fault("POST", UPLOAD, 403, body=body, times=100))
        (credential,) = found(proxy.host, docker_config(proxy.host, user, password))
        with client(proxy.host, credential) as connected, pytest.raises(DeniedError) as caught:
            probe_push(ImageReference(proxy.host, "adapters/phi", "v1"), connected)
    assert caught.value.exit_code == 77
    for part in (proxy.host, "push to adapters/phi", f"user '{user}'", f"key '{proxy.host}'"):
        assert part in caught.value.message
    assert password not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.parametrize("answer", [401, 404, 405, None])
def test_r2_what_the_registry_says_to_the_cancel_is_ignored(registry: RunningRegistry, answer: int | None) -> None:
    with faulty(registry) as proxy, client(proxy.host, name="r2") as connected:
        proxy.faults.append(Fault("DELETE", UPLOAD, answer, times=100))
        assert probe_push(ImageReference(proxy.host, "r2", "v1"), connected).existing_digest is None
        assert [method for method, _, _ in proxy.log].count("DELETE") == 1


@pytest.mark.parametrize("mistake", ["unknown CA", "http to https", "https to http", "nobody there", "no such host"])
def test_r3_a_registry_that_can_not_be_spoken_to_is_said_with_the_remedy(
    registry: RunningRegistry, tmp_path: Path, mistake: str
) -> None:
    def probe(host: str, plain_http: bool) -> None:
        with client(host, plain_http=plain_http) as connected:
            probe_push(ImageReference(host, "adapters/phi", "v1"), connected)

    if mistake in ("unknown CA", "http to https"):
        with running_registry(tls=make_certificate(tmp_path)) as secured, pytest.raises(ConfigError) as caught:
            probe(secured.host, plain_http=mistake == "http to https")
        assert ("--ca" if mistake == "unknown CA" else "leave out --plain-http") in str(caught.value.hint)
    elif mistake == "https to http":
        with pytest.raises(ConfigError) as caught:
            probe(registry.host, plain_http=False)
        assert "add --plain-http" in str(caught.value.hint)
    else:
        host, reason = ("127.0.0.1:1", "nothing listens there") if mistake == "nobody there" else ("a.invalid", "host")
        with pytest.raises(ServiceError, match=reason):
            probe(host, plain_http=True)


def test_r4_the_probe_says_when_the_credential_in_use_ends(registry: RunningRegistry) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    token = jwt({"exp": end.timestamp()})
    with client(registry.host, Credential("k", USER, token), name="r4") as connected:
        probe = probe_push(ImageReference(registry.host, "r4", "v1"), connected)
    assert probe.expires_at == end
    assert token not in repr(probe)


# ── R5 to R11: hiccups ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("status", "form"), [(429, "seconds"), (503, "seconds"), (503, "date")])
def test_r5_retry_after_is_waited_for(registry: RunningRegistry, image: Image, status: int, form: str) -> None:
    reporter = Recorder()
    with faulty(registry) as proxy:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        proxy.faults.append(Fault("POST", UPLOAD, status, {"Retry-After": "1" if form == "seconds" else date}))
        reference = ImageReference(proxy.host, f"r5/{form}-{status}", "v1")
        patient = replace(QUICK, deadline_s=10)
        with client(proxy.host, name=reference.repository, patience=patient, reporter=reporter) as connected:
            assert push_image(image, reference, connected, reporter=Silent()).digest == image.digest
    (warning,) = reporter.warnings
    (waited,) = re.findall(r"trying again in ([0-9.]+) s", warning)
    assert float(waited) >= 0.9


@pytest.mark.parametrize("value", ["soon", "Fri, 31 Dec 20260000000000000000 23:59:59 GMT"])
def test_r5_a_retry_after_that_says_nothing_is_passed_over(registry: RunningRegistry, image: Image, value: str) -> None:
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("POST", UPLOAD, 503, {"Retry-After": value}))
        assert push(image, proxy.host, name="r5/nothing").digest == image.digest


def test_r5_a_registry_that_asks_for_ages_gets_no_further_try(registry: RunningRegistry, image: Image) -> None:
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("POST", UPLOAD, 503, {"Retry-After": "9" * 400}))
        with pytest.raises(ServiceError, match=r"asks to come back in 31536000 s \(1 tries"):
            push(image, proxy.host, name="r5/ages")


def test_r5_a_cookie_is_not_sent_back(registry: RunningRegistry, image: Image) -> None:
    """Harbor takes whoever sends one for a browser, and wants a CSRF token of it."""
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("POST", UPLOAD, 503, {"Set-Cookie": "sid=1; Path=/"}))
        push(image, proxy.host, name="r5/cookie")
        assert not any("Cookie" in headers for _, _, headers in proxy.log)


REQUESTS = {
    "HEAD": ("HEAD", r"/blobs/"),
    "POST": ("POST", UPLOAD),
    "PATCH": ("PATCH", UPLOAD),
    "PUT": ("PUT", UPLOAD),
    "manifest": ("PUT", "/manifests/"),
}


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_r6_a_passing_failure_is_tried_again(
    registry: RunningRegistry, image: Image, status: int, request_name: str
) -> None:
    fault = Fault(*REQUESTS[request_name], status)
    with faulty(registry) as proxy:
        proxy.faults.append(fault)
        pushed = push(image, proxy.host, name=f"r6/{request_name.lower()}-{status}")
    assert fault.times == 0, "the fault was not met"
    assert pushed.digest == image.digest


@pytest.mark.parametrize(
    ("fault", "most_times"),
    [
        pytest.param(Fault("PATCH", UPLOAD), 1, id="before PATCH"),
        pytest.param(Fault("PATCH", UPLOAD, cut_body=5), 1, id="in PATCH"),
        pytest.param(Fault("PATCH", UPLOAD, after=True), 2, id="after PATCH"),
        pytest.param(Fault("PUT", UPLOAD, after=True), 1, id="after PUT"),
        pytest.param(Fault("PUT", "/manifests/", after=True), 1, id="after manifest PUT"),
    ],
)
def test_r7_a_broken_connection_costs_at_most_one_blob(
    registry: RunningRegistry, image: Image, fault: Fault, most_times: int, request: pytest.FixtureRequest
) -> None:
    fault = replace(fault)
    name = "r7/" + re.sub(r"\W+", "-", request.node.callspec.id).lower()
    with faulty(registry) as proxy:
        proxy.faults.append(fault)
        pushed = push(image, proxy.host, name=name)
    assert fault.times == 0, "the fault was not met"
    assert pushed.digest == image.digest
    # the first blob, the config, is the one that the fault meets
    assert pushed.bytes_sent <= image.size_bytes + (most_times) * image.config.size_bytes


def test_r8_a_registry_that_hangs_is_asked_again(registry: RunningRegistry, image: Image) -> None:
    impatient = replace(QUICK, read_timeout_s=0.2)
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", "/manifests/", hang_s=0.5))
        assert push(image, proxy.host, name="r8", patience=impatient).digest == image.digest


def test_r8_a_registry_that_hangs_for_ever_is_given_up(registry: RunningRegistry, image: Image) -> None:
    impatient = replace(QUICK, read_timeout_s=0.1, deadline_s=0.5)
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", "/manifests/", hang_s=0.2, times=1000))
        with pytest.raises(ServiceError, match="no answer in time"):
            push(image, proxy.host, name="r8-endless", patience=impatient)


def weights_patches(fake: FakeRegistry) -> list[str | None]:
    return [headers.get("Content-Range") for method, _, headers in fake.log if method == "PATCH"][3:]


def test_r9_an_upload_goes_on_where_the_registry_has_it(image: Image) -> None:
    layer = image.layers[2]
    with fake_registry(break_after=[10**9, 10**9, 10**9, 400_000]) as fake:
        pushed = push(image, fake.host)
        assert weights_patches(fake) == [None, f"400000-{layer.size_bytes - 1}"]
        assert fake.received_bytes == image.size_bytes
    assert pushed.digest == image.digest


def test_r9_a_wrong_offset_is_put_right_by_what_the_registry_says(image: Image) -> None:
    layer = image.layers[2]
    with fake_registry(break_after=[10**9, 10**9, 10**9, 400_000]) as fake:
        changed: list[str] = []

        def add_behind_its_back(method: str, path: str) -> None:
            # the registry gets more of the old connection after it has said how much it has
            if method == "PATCH" and len(weights_patches(fake)) == 2 and not changed:
                (_, upload), stream = next(iter(fake.uploads.values())), layer.open()
                with stream:
                    stream.seek(upload.size_bytes)
                    upload.add(stream.read(1000) or b"")
                changed.append(path)

        fake.on_request = add_behind_its_back
        assert push(image, fake.host).digest == image.digest
        assert changed
        assert weights_patches(fake)[-1] == f"401000-{layer.size_bytes - 1}"


def test_r9_a_lost_upload_begins_again(image: Image) -> None:
    with fake_registry(break_after=[10**9, 10**9, 10**9, 400_000]) as fake:

        def forget(method: str, path: str) -> None:
            if method == "GET" and "/uploads/" in path:
                fake.uploads.clear()

        fake.on_request = forget
        assert push(image, fake.host).digest == image.digest
        assert weights_patches(fake) == [None, None]


def test_r9_two_ends_that_do_not_meet_begin_again(image: Image) -> None:
    with fake_registry(break_after=[10**9, 10**9, 10**9, 400_000]) as fake:

        def damage(method: str, path: str) -> None:
            if method == "GET" and "/uploads/" in path:
                (_, upload) = next(iter(fake.uploads.values()))
                upload._sha256.update(b"what the registry has is not what was sent")

        fake.on_request = damage
        assert push(image, fake.host).digest == image.digest


def test_r10_a_token_that_ends_between_blobs_is_renewed(image: Image) -> None:
    with (
        running_token_server({USER: {"pull", "push"}}) as tokens,
        running_registry(token_server=tokens) as secured,
        faulty(secured) as proxy,
    ):
        challenge = {"WWW-Authenticate": f'Bearer realm="{tokens.url}",service="tests",error="invalid_token"'}
        proxy.faults.append(Fault("HEAD", image.layers[1].digest, 401, challenge))
        assert push(image, proxy.host, Credential("k", USER, PASSWORD)).digest == image.digest
        assert len(tokens.requests) == 2


@pytest.mark.parametrize("after", [False, True], ids=["refused", "taken and refused"])
def test_r11_a_token_that_ends_in_the_middle_of_a_blob_is_renewed(image: Image, after: bool) -> None:
    with (
        running_token_server({USER: {"pull", "push"}}) as tokens,
        running_registry(token_server=tokens) as secured,
        faulty(secured) as proxy,
    ):
        challenge = {"WWW-Authenticate": f'Bearer realm="{tokens.url}",service="tests",error="invalid_token"'}
        proxy.faults.append(Fault("PATCH", UPLOAD, 401, challenge, after=after))
        assert push(image, proxy.host, Credential("k", USER, PASSWORD)).digest == image.digest
        assert len(tokens.requests) == 2


def test_r11_a_registry_that_has_taken_a_refused_body_gets_the_blob_from_the_start(image: Image) -> None:
    with (
        running_token_server({USER: {"pull", "push"}}) as tokens,
        fake_registry() as fake,
        faulty(fake) as proxy,
    ):
        challenge = {"WWW-Authenticate": f'Bearer realm="{tokens.url}",service="tests",error="invalid_token"'}
        proxy.faults.append(Fault("PATCH", UPLOAD, 401, challenge, after=True))
        assert push(image, proxy.host, Credential("k", USER, PASSWORD)).digest == image.digest
        assert fake.received_bytes == image.size_bytes + 2 * image.config.size_bytes


# ── R12 to R17: what can not be repaired ─────────────────────────────────────────────────────────────────────────────


def test_r12_a_digest_that_the_registry_does_not_find_is_said_with_the_side_that_differs(
    registry: RunningRegistry, image: Image
) -> None:
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", UPLOAD, 400, body=b'{"errors": [{"code": "DIGEST_INVALID"}]}'))
        with pytest.raises(ServiceError, match="the files here are unchanged"):
            push(image, proxy.host, name="r12")
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", "/manifests/", 201, {"Docker-Content-Digest": sha256_digest(b"other")}))
        with pytest.raises(ServiceError, match="the registry changed it"):
            push(image, proxy.host, name="r12")
    assert registry.tags("r12") == []


@pytest.mark.parametrize("disguise", ["none", "size, inode and time are the same"])
def test_r13_a_file_that_changes_while_it_is_pushed_is_noticed(adapter: Path, image: Image, disguise: str) -> None:
    weights = adapter / "adapter_model.safetensors"

    def change(method: str, path: str) -> None:
        if method == "HEAD" and path.endswith(image.layers[2].digest):
            status = weights.stat()
            with weights.open("r+b") as file:
                file.write(b"other")
            if disguise != "none":
                os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))

    with fake_registry(on_request=change) as fake:
        with pytest.raises(DataError, match="changed"):
            push(image, fake.host)
        assert fake.repository("adapters/phi").tags == {}


_FULL_DISK = """
import sys
from pathlib import Path
from tuner.errors import ServiceError
from tuner.reference import LayoutReference
from tuner.open_files import OpenFile
from tuner.registry.image import build_image
from tuner.registry.push import push_layout
from tuner.runspec import Silent
adapter, disk = Path(sys.argv[1]), Path(sys.argv[2])
try:
    push_layout(build_image({p.name: OpenFile.at(p) for p in adapter.iterdir()}), LayoutReference(disk / "out", "v1"),
                reporter=Silent())
except ServiceError as error:
    print(error.message, "|", sorted(p.name for p in disk.rglob("*") if p.is_file()))
"""


def test_r14_a_full_disk_is_said_and_leaves_no_half_file(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    script = f'mount -t tmpfs -o size=1m none "$2" && exec {sys.executable} -c "$0" "$1" "$2"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, _FULL_DISK, adapter, tmp_path / "disk"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no user namespaces here")
    said, _, files = done.stdout.partition(" | ")
    assert "No space left on device" in said
    assert "partial" not in files
    assert done.stderr == ""
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_r15_a_registry_whose_disk_is_full_is_asked_again_and_then_said(
    registry: RunningRegistry, adapter: Path
) -> None:
    body = b'{"errors": [{"code": "UNKNOWN", "message": "unknown error", "detail": "no space left on device"}]}'
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", UPLOAD, 500, body=body, times=10_000))
        with pytest.raises(NotPushedError, match="no space left on device"):
            deliver(adapter, proxy.host, name="r15")
        assert [method for method, path, _ in proxy.log if "digest=" in path].count("PUT") > 1
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not load_push_state(OpenDirectory.at(adapter.parent)).pushed


def test_r16_a_tag_moved_by_another_writer_is_said_with_both_digests(
    registry: RunningRegistry, adapter: Path, image: Image
) -> None:
    other = Image(image.manifest_bytes + b"\n", image.config, image.layers)
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", "/manifests/v1", 403, times=100))
        with pytest.raises(NotPushedError):
            deliver(adapter, proxy.host, name="r16")
        proxy.faults.clear()
        push(other, registry.host, name="r16")
        reporter = Recorder()
        pushed = deliver(adapter, proxy.host, name="r16", reporter=reporter)
        by_digest = ImageReference(registry.host, "r16", digest=image.digest)
        with client(registry.host, name="r16") as connected:
            assert sha256_digest(connected.get_manifest(str(by_digest.digest))[0]) == image.digest
    assert pushed.previous_digest == other.digest
    (warning,) = reporter.warnings
    assert other.digest in warning
    assert "moved the tag since the push began" in warning


@pytest.mark.parametrize(("status", "code"), [(403, "DENIED"), (409, "TAG_IMMUTABLE"), (400, "QUOTA_EXCEEDED")])
def test_r17_a_locked_tag_is_said_in_the_registrys_words_and_the_image_is_there(
    registry: RunningRegistry, adapter: Path, image: Image, status: int, code: str
) -> None:
    body = json.dumps({"errors": [{"code": code, "message": "the tag is locked"}]}).encode()
    with faulty(registry) as proxy:
        proxy.faults.append(Fault("PUT", "/manifests/v1$", status, body=body, times=100))
        with pytest.raises(NotPushedError, match=f"{code}: the tag is locked") as caught:
            deliver(adapter, proxy.host, name="r17")
    assert "push to another one" in str(caught.value.hint)
    assert image.digest in str(caught.value.hint)
    with client(registry.host, name="r17") as connected:
        assert connected.manifest_digest(image.digest) == image.digest


# ── R18 to R20: never lost ───────────────────────────────────────────────────────────────────────────────────────────

_PUSH = """
import sys
from pathlib import Path
from tuner.errors import TunerError
from tuner.reference import parse_reference
from tuner.registry import transport
from tuner.open_files import OpenDirectory, OpenFile
from tuner.registry.image import build_image
from tuner.registry.push_state import PushOptions, push_resumably
from tuner.runspec import Network, Silent
adapter, reference = Path(sys.argv[1]), sys.argv[2]
image = build_image({p.name: OpenFile.at(p) for p in adapter.iterdir()})
print("ready", flush=True)
sys.stdin.readline()
try:
    pushed = push_resumably(
        image, parse_reference(reference),
        adapter=OpenDirectory.at(adapter), directory=OpenDirectory.at(adapter.parent),
        network=Network(plain_http=True), docker_configs=(), options=PushOptions(), reporter=Silent(),
    )
    print(pushed.digest)
except TunerError as error:
    print(error.message, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start_push(adapter: Path, reference: str) -> "subprocess.Popen[str]":
    """A process that has measured the adapter and pushes it when it gets a line."""
    arguments = [sys.executable, "-c", _PUSH, str(adapter), reference]
    pipe = subprocess.PIPE
    process = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_r18_a_signal_cancels_the_upload_and_leaves_the_rest_to_be_sent(
    adapter: Path, image: Image, number: signal.Signals
) -> None:
    with fake_registry() as fake:
        process: subprocess.Popen[str] | None = None

        def stop(method: str, path: str) -> None:
            if process is not None and len(weights_patches(fake)) == 1 and method == "PATCH":
                process.send_signal(number)
                time.sleep(0.3)

        fake.on_request = stop
        process = start_push(adapter, f"{fake.host}/adapters/phi:v1")
        out, err = process.communicate("\n", timeout=30)
        assert (process.returncode, out) == (InterruptedRunError.exit_code, "")
        assert number.name in err
        assert [method for method, _, _ in fake.log].count("DELETE") == 1
        assert not load_push_state(OpenDirectory.at(adapter.parent)).pushed
        assert fake.repository("adapters/phi").tags == {}
        fake.on_request = lambda method, path: None
        pushed = deliver(adapter, fake.host)
    assert (pushed.blobs_skipped, pushed.bytes_sent) == (3, image.layers[2].size_bytes)


def test_r19_a_failed_push_says_how_to_finish_and_finishing_sends_what_is_missing(
    registry: RunningRegistry, adapter: Path, image: Image
) -> None:
    with faulty(registry) as proxy:

        def break_the_weights(method: str, path: str, body: bytes) -> bytes:
            if method == "HEAD" and path.endswith(image.layers[2].digest) and not proxy.faults:
                proxy.faults.append(Fault("PATCH", UPLOAD, cut_body=5000, times=1000))
            return body

        proxy.change_answer = break_the_weights
        with pytest.raises(NotPushedError) as caught:
            deliver(adapter, proxy.host, name="r19")
        assert caught.value.exit_code == 74
        assert f"tuner push --resume {adapter.parent}" in str(caught.value.hint)
        assert registry.tags("r19") == []
        proxy.change_answer = lambda method, path, body: body
        proxy.faults.clear()
        with OpenDirectory.at(adapter.parent) as beside:
            state = load_push_state(beside)
            kept = state.open_adapter(beside)
        assert (kept.path, state.digest) == (adapter, image.digest)
        state.check_image(image, kept)
        pushed = deliver(kept.path, proxy.host, name="r19")
    assert (pushed.blobs_skipped, pushed.bytes_sent) == (3, image.layers[2].size_bytes)
    assert registry.tags("r19") == ["v1"]
    assert load_push_state(OpenDirectory.at(adapter.parent)).pushed


def test_r20_at_no_point_of_failure_is_there_a_tag_whose_blobs_are_missing(adapter: Path, image: Image) -> None:
    with fake_registry() as fake:
        push(image, fake.host)
        requests = len(fake.log)
    assert requests > 10
    missing: list[str] = []
    for number in range(requests):
        with fake_registry() as fake:

            def fail_from_here_on(method: str, path: str, *, fake: FakeRegistry = fake, number: int = number) -> None:
                missing.extend(fake.missing_blobs())
                if len(fake.log) > number:
                    fake.answers[:] = [(method, "", 400)]

            fake.on_request = fail_from_here_on
            with pytest.raises(NotPushedError):
                deliver(adapter, fake.host)
            fake.on_request = lambda method, path: None
            fake.answers.clear()
            assert deliver(adapter, fake.host).digest == image.digest
            assert missing + fake.missing_blobs() == []
            assert fake.repository("adapters/phi").tags == {"v1": image.digest}


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=[pytest.mark.long] if moment >= 4 else []) for moment in range(20)]
)
def test_r20_a_push_that_is_killed_at_any_moment_can_be_done_again(
    registry: RunningRegistry, tmp_path: Path, moment: int
) -> None:
    chance = random.Random(moment)
    weights = chance.randbytes(8 << 20)
    adapter = tmp_path / "adapter"
    write(adapter, {**ADAPTER, "adapter_model.safetensors": weights})
    image, name = image_of(adapter), f"killed/{moment}"
    process = start_push(adapter, f"{registry.host}/{name}:v1")
    assert process.stdin is not None
    with process:
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
    with client(registry.host, name=name) as connected:
        digest = connected.manifest_digest("v1")
        if digest is not None:
            assert digest == image.digest
            assert all(connected.has_blob(blob.digest) for blob in image.blobs)
    pushed = deliver(adapter, registry.host, name=name)
    assert pushed.digest == image.digest
    with client(registry.host, name=name) as connected:
        assert connected.manifest_digest("v1") == image.digest


# ── R21 to R23: who gets to see a credential ─────────────────────────────────────────────────────────────────────────


def test_r21_an_upload_to_another_host_works_and_carries_no_credential(image: Image) -> None:
    with (
        running_registry(htpasswd=True) as secured,
        faulty(secured) as proxy,
        fake_registry() as storage,
    ):
        storage.uploads["1"] = "adapters/phi", Received(keep=True)
        target = f"http://{storage.host}/v2/adapters/phi/blobs/uploads/1?sig=s3cr3t"
        with client(proxy.host, Credential("k", USER, PASSWORD)) as connected:
            connected.for_push()
            connected.start_upload()  # the credential is in use now
            proxy.faults.append(Fault("POST", UPLOAD, 202, {"Location": target}))
            connected.upload_blob(image.config, on_progress=lambda _: None)
        assert storage.repository("adapters/phi").blobs == {image.config.digest: image.config_bytes}
        assert [method for method, _, _ in storage.log] == ["PATCH", "PUT"]
        assert not any("Authorization" in headers for _, _, headers in storage.log)


@pytest.mark.parametrize("location", ["http://10.0.0.1/x", "http://169.254.169.254/x", "http://[::1]/x"])
def test_r21_an_internal_address_is_refused_unless_it_is_the_registrys(
    registry: RunningRegistry, location: str
) -> None:
    with faulty(registry) as proxy, client(proxy.host) as connected:
        proxy.faults.append(Fault("POST", UPLOAD, 202, {"Location": location}))
        with pytest.raises(DeniedError, match="not going to"):
            connected.start_upload()


@pytest.mark.parametrize(
    "realm", ["http://169.254.169.254/token", "http://localhost:1/token", "file:///etc/passwd", "//10.1.2.3/t", ""]
)
def test_r22_a_malicious_realm_gets_no_credential(registry: RunningRegistry, realm: str) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{realm}",service="x"'}
    with faulty(registry) as proxy, client(proxy.host, Credential("k", USER, PASSWORD)) as connected:
        proxy.faults.append(Fault("POST", UPLOAD, 401, challenge, times=100))
        with pytest.raises(DeniedError, match="token server"):
            connected.start_upload()


def test_r22_a_realm_over_http_of_a_registry_over_https_gets_no_credential(tmp_path: Path) -> None:
    pair = make_certificate(tmp_path)
    asked: list[str] = []

    class TokenEavesdropper(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.reply(200, b'{"token": "t"}')

    with running_server(TokenEavesdropper) as host, running_token_server({USER: {"push"}}) as tokens:
        tokens.url = f"http://{host}/token"
        with (
            running_registry(tls=pair, token_server=tokens) as secured,
            client(
                secured.host, Credential("k", USER, PASSWORD), plain_http=False, ca_file=str(pair.certificate)
            ) as connected,
            pytest.raises(DeniedError, match="http instead of https"),
        ):
            probe_push(ImageReference(secured.host, "adapters/phi", "v1"), connected)
    assert asked == []


def test_r23_no_secret_is_in_any_output_log_or_file(
    adapter: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    password, refresh, token, signature = "hunter2-hunter2", "r3fr3sh-t0k3n", jwt({"exp": 1}), "s1gn3d"
    reporter, messages = Recorder(), []
    with (
        running_token_server({USER: {"pull", "push"}}, refresh_tokens={refresh: USER}) as tokens,
        running_registry(token_server=tokens) as secured,
        faulty(secured) as proxy,
    ):
        tokens.passwords[USER] = password
        for number, (secret, entry) in enumerate(
            [
                (password, {"username": USER, "password": password}),
                (password, {"username": "somebody else", "password": password}),
                (refresh, {"identitytoken": refresh}),
                (token, {"registrytoken": token}),
            ]
        ):
            echo = {"code": "X", "message": f"{secret} is no good, see https://a.b/c?sig={signature}"}
            body = json.dumps({"errors": [echo]}).encode()
            nobody = {"Location": f"http://127.0.0.1:1/v2/?sig={signature}"}
            proxy.faults[:] = [
                Fault("HEAD", "/manifests/", 307, nobody, times=1),
                Fault("POST", UPLOAD, 500, body=body),
                Fault("PATCH", UPLOAD, 403, body=body, times=100),
            ]
            text = json.dumps({"auths": {proxy.host: entry}})
            with pytest.raises(NotPushedError) as caught:
                deliver(adapter, proxy.host, name=f"r23/{number}", docker_configs=(text,), reporter=reporter)
            cause = caught.value.__cause__
            messages += [caught.value.message, str(caught.value.hint), str(cause), repr(cause)]
    out, err = capfd.readouterr()
    said = "\n".join([*messages, *reporter.warnings, out, err, caplog.text, (adapter.parent / PUSH_STATE).read_text()])
    assert "is no good" in said
    assert [secret for secret in (password, refresh, token, signature) if secret in said] == []


# ── R24: large blobs ─────────────────────────────────────────────────────────────────────────────────────────────────

# not ru_maxrss, which a child takes over from the process that started it
_PUSH_AND_MEASURE = (
    _PUSH + "\nimport re; print(re.search('VmHWM:.* ([0-9]+) kB', open('/proc/self/status').read())[1])\n"
)


@pytest.mark.parametrize("size_mib", [200, pytest.param(5 << 10, marks=pytest.mark.long)], ids=["200 MiB", "5 GiB"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_r24_memory_does_not_grow_with_a_blob(tmp_path: Path, size_mib: int, compression: str) -> None:
    adapter = tmp_path / "adapter"
    write(adapter, ADAPTER)
    with (adapter / "adapter_model.safetensors").open("wb") as file:
        file.truncate(size_mib << 20)
    script = _PUSH_AND_MEASURE.replace("PushOptions()", f"PushOptions(compression={compression!r})").replace(
        "p in adapter.iterdir()}", f"p in adapter.iterdir()}}, compression={compression!r}"
    )
    with fake_registry(keeps_blobs=False) as fake:
        done = subprocess.run(
            [sys.executable, "-c", script, str(adapter), f"{fake.host}/large:v1"],
            input="\n",
            capture_output=True,
            text=True,
            check=True,
        )
    *_, peak_kib = done.stdout.split()
    assert int(peak_kib) < 150 << 10
