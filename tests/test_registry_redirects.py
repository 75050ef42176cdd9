"""Where a registry sends us: nobody there gets its credential, and what is refused there is asked for anew."""

import contextlib
import http.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.fake_registry import FakeRegistry, fake_registry
from tests.registries import PASSWORD, USER, FaultyRegistry, QuietHandler, running_server
from tests.test_registry_image import ADAPTER, pack, write
from tests.test_registry_push import Recorder, client, push
from tuner.errors import ServiceError
from tuner.reference import ImageReference
from tuner.registry.authorization import basic_header
from tuner.registry.credentials import Credential
from tuner.registry.image import Image
from tuner.registry.pull import pull_image
from tuner.runspec import Silent

CREDENTIAL = Credential("k", USER, PASSWORD)
BASIC = basic_header(USER, PASSWORD)
EXPIRED = (
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired &amp; more</Message></Error>"
)


@dataclass
class Asked:
    method: str
    path: str
    authorization: str | None


@dataclass
class Host:
    """A server whose answers are `answer(method, path)`: status, headers, body."""

    answer: Callable[[str, str], tuple[int, dict[str, str], bytes]]
    host: str = ""
    asked: list[Asked] = field(default_factory=list)


@contextlib.contextmanager
def serving(answer: Callable[[str, str], tuple[int, dict[str, str], bytes]]) -> Iterator[Host]:
    state = Host(answer)

    class Handler(QuietHandler):
        def _answer(self) -> None:
            self.read_body()
            state.asked.append(Asked(self.command, self.path, self.headers.get("Authorization")))
            status, headers, body = state.answer(self.command, self.path)
            self.reply(status, body, headers)

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _answer

    with running_server(Handler) as host:
        state.host = host
        yield state


@contextlib.contextmanager
def redirecting(
    fake: FakeRegistry, redirect: Callable[[str, str], str | None], *, scheme: str = "Basic"
) -> Iterator[FaultyRegistry]:
    """The registry, which wants the credential, and answers with a redirect where there is one for (method, path).

    `scheme` Bearer: its own token server, on the same host, wants it.
    """
    state = FaultyRegistry(host="")

    class Handler(QuietHandler):
        def _pass_on(self) -> None:
            body, sent = self.read_body(), self.headers.get("Authorization")
            state.log.append((self.command, self.path, dict(self.headers)))
            if self.path.startswith("/token"):
                self.reply(200 if sent == BASIC else 401, b'{"token": "t0k3n"}')
                return
            if sent != (BASIC if scheme == "Basic" else "Bearer t0k3n"):
                realm = f'realm="http://{state.host}/token",service="s"'
                self.reply(401, b"", {"WWW-Authenticate": f"{scheme} {realm}"})
                return
            if target := redirect(self.command, self.path):
                self.reply(307, b"", {"Location": target})
                return
            upstream = http.client.HTTPConnection(fake.host)
            names = ("Content-Type", "Range", "Content-Range", "Accept")
            upstream.request(self.command, self.path, body, {n: self.headers[n] for n in names if n in self.headers})
            answer = upstream.getresponse()
            kept = {n: v for n, v in answer.getheaders() if n not in ("Content-Length", "Date", "Server")}
            self.reply(answer.status, answer.read(), kept, length=answer.getheader("Content-Length"))
            upstream.close()

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _pass_on

    with running_server(Handler) as host:
        state.host = host
        yield state


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return pack(write(tmp_path / "adapter", ADAPTER))


@pytest.fixture
def fake(image: Image) -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        push(image, running.host)
        yield running


def pull(host: str, target: Path, *credentials: Credential, **options: object) -> dict[str, bytes]:
    with client(host, *(credentials or [CREDENTIAL]), **options) as connected:
        pull_image(ImageReference(host, "adapters/phi", "v1"), target, connected, reporter=Silent())
    return {path.name: path.read_bytes() for path in target.iterdir()}


def is_blob(method: str, path: str) -> bool:
    return method == "GET" and "/blobs/sha256:" in path


def blob_of(fake: FakeRegistry, path: str) -> bytes:
    return fake.repository("adapters/phi").blobs[urlsplit(path).path.rpartition("/")[2]]


# ── nobody else is told ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
@pytest.mark.parametrize("challenge", ['Bearer realm="http://{}/steal",service="s"', 'Basic realm="files"'])
def test_a_storages_challenge_is_not_answered(
    fake: FakeRegistry, tmp_path: Path, status: int, scheme: str, challenge: str
) -> None:
    with serving(lambda method, path: (200, {}, b'{"token": "t"}')) as storage:
        storage.answer = lambda method, path: (status, {"WWW-Authenticate": challenge.format(storage.host)}, b"")
        target = f"http://{storage.host}/b"
        with (
            redirecting(fake, lambda m, p: target if is_blob(m, p) else None, scheme=scheme) as registry,
            pytest.raises(ServiceError),
        ):
            pull(registry.host, tmp_path / "out")
        assert {each.path for each in storage.asked} == {"/b"}
        assert {each.authorization for each in storage.asked} == {None}


def test_a_challenge_that_names_the_registrys_own_token_server_is_none_of_a_storage(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    with serving(lambda method, path: (401, {}, b"")) as storage:
        target = f"http://{storage.host}/b"
        with redirecting(fake, lambda m, p: target if is_blob(m, p) else None, scheme="Bearer") as registry:
            realm = {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token",service="other"'}
            storage.answer = lambda method, path: (401, realm, b"")
            with pytest.raises(ServiceError):
                pull(registry.host, tmp_path / "out")
            assert not any("service=other" in path for _, path, _ in registry.log)


def test_a_storage_that_sends_us_back_gets_no_request_made_with_the_credential(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    with serving(lambda method, path: (307, {}, b"")) as storage:
        target = f"http://{storage.host}/b"
        with redirecting(fake, lambda m, p: target if is_blob(m, p) else None) as registry:
            back = f"http://{registry.host}/v2/private/other/manifests/latest"
            storage.answer = lambda method, path: (307, {"Location": back}, b"")
            with pytest.raises(ServiceError, match=f"{registry.host}: the storage"):
                pull(registry.host, tmp_path / "out")
            sent = [headers for _, path, headers in registry.log if "/private/" in path]
            assert sent
            assert not any("Authorization" in headers for headers in sent)


def test_a_redirect_within_the_registry_takes_the_credential_along(fake: FakeRegistry, tmp_path: Path) -> None:
    """A repository that has another name by now."""
    fake.repositories["moved/phi"] = fake.repositories["adapters/phi"]

    def moved(method: str, path: str) -> str | None:
        return path.replace("/adapters/", "/moved/") if "/adapters/" in path else None

    with redirecting(fake, moved) as registry:
        assert pull(registry.host, tmp_path / "out") == ADAPTER
        sent = [headers.get("Authorization") for _, path, headers in registry.log if "/moved/" in path]
    assert sent
    assert set(sent) == {BASIC}


def test_no_token_server_is_followed_elsewhere(fake: FakeRegistry, tmp_path: Path) -> None:
    with serving(lambda method, path: (200, {}, b'{"token": "t"}')) as evil:

        def challenge(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
            if path.startswith("/token"):
                return 307, {"Location": f"http://{evil.host}/token"}, b""
            return 401, {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token"'}, b""

        with serving(challenge) as registry, pytest.raises(ServiceError, match="token server answers 307"):
            pull(registry.host, tmp_path / "out")
        assert evil.asked == []


# ── asked anew ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [400, 401, 403])
def test_an_address_that_has_expired_is_replaced_by_a_fresh_one(
    fake: FakeRegistry, tmp_path: Path, status: int
) -> None:
    signed = 0

    def redirect(method: str, path: str) -> str | None:
        nonlocal signed
        if not is_blob(method, path):
            return None
        signed += 1
        return f"http://{storage.host}{path}?sig={signed}"

    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        expired = urlsplit(path).query in ("sig=1", "sig=2", "sig=4")
        return (status, {}, EXPIRED) if expired else (200, {}, blob_of(fake, path))

    recorder = Recorder()
    with serving(answer) as storage, redirecting(fake, redirect) as registry:
        assert pull(registry.host, tmp_path / "out", reporter=recorder) == ADAPTER
        assert {each.authorization for each in storage.asked} == {None}
    assert len(recorder.warnings) == 3
    assert all(f"{storage.host}: the storage that {registry.host}" in line for line in recorder.warnings)


@pytest.mark.parametrize("place", ["another host", "the registry's host"])
def test_a_storage_that_goes_on_refusing_is_named_with_what_it_says(
    fake: FakeRegistry, tmp_path: Path, place: str
) -> None:
    other = Credential("other", "somebody", "else")

    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/storage"):
            return 403, {}, EXPIRED
        host = storage.host if place == "another host" else registry.host
        if is_blob(method, path):
            return 307, {"Location": f"http://{host}/storage/b?sig=s1gn3d"}, b""
        content, media_type = fake.repository("adapters/phi").manifests[fake.repository("adapters/phi").tags["v1"]]
        return 200, {"Content-Type": media_type}, content

    with serving(answer) as storage, serving(answer) as registry, client(registry.host, CREDENTIAL, other) as connected:
        with pytest.raises(ServiceError) as caught:
            pull_image(
                ImageReference(registry.host, "adapters/phi", "v1"), tmp_path / "o", connected, reporter=Silent()
            )
        where = storage if place == "another host" else registry
        assert connected.credential == CREDENTIAL, "it is not the credential that was refused"
        assert len([each for each in where.asked if each.path.startswith("/storage")]) == 3
    error = caught.value
    assert error.message.startswith(f"{where.host}: the storage that {registry.host} sends us to refuses")
    assert "403 Forbidden: AccessDenied: Request has expired & more (3 tries" in error.message
    assert "docker login" not in f"{error.message}{error.hint}"
    assert "s1gn3d" not in f"{error.message}{error.hint}"
    assert registry.host in str(error.hint)


def test_the_registrys_own_refusal_is_still_that_of_a_credential(fake: FakeRegistry, tmp_path: Path) -> None:
    wrong = Credential("wrong", USER, "wrong")
    with redirecting(fake, lambda method, path: None) as registry:
        assert pull(registry.host, tmp_path / "out", wrong, CREDENTIAL) == ADAPTER


@pytest.mark.parametrize("refused", ["PATCH", "PUT"])
def test_an_upload_whose_address_has_expired_begins_anew_at_the_registry(
    fake: FakeRegistry, image: Image, refused: str
) -> None:
    """As where uploads go to a storage under a signed address."""
    refusals = 0

    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/v2/adapters/phi/blobs/uploads/") and method == "POST":
            return 202, {"Location": f"http://{storage.host}/up/{len(storage.asked)}?sig=s1gn3d"}, b""
        return 404, {}, b""

    def store(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        nonlocal refusals
        if method == refused and refusals < 2:
            refusals += 1
            return 403, {"WWW-Authenticate": 'Basic realm="files"'}, EXPIRED
        return (202, {"Location": path}, b"") if method == "PATCH" else (201 if method == "PUT" else 404, {}, b"")

    with serving(store) as storage, serving(answer) as registry:
        with client(registry.host, CREDENTIAL) as connected:
            connected.for_push()
            connected.upload_blob(image.config, on_progress=lambda _: None)
        assert refusals == 2
        assert [each.method for each in registry.asked if each.method == "POST"] == ["POST"] * 3
        assert {each.authorization for each in storage.asked} == {None}


def test_an_upload_that_is_always_refused_there_names_the_storage(image: Image) -> None:
    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        return (202, {"Location": f"http://{storage.host}/up"}, b"") if method == "POST" else (404, {}, b"")

    with (
        serving(lambda method, path: (403, {}, EXPIRED)) as storage,
        serving(answer) as registry,
        client(registry.host, CREDENTIAL) as connected,
    ):
        connected.for_push()
        with pytest.raises(ServiceError, match=f"{storage.host}: the storage that {registry.host}") as caught:
            connected.upload_blob(image.config, on_progress=lambda _: None)
    assert "docker login" not in str(caught.value.hint)


def test_errors_of_a_registry_in_xml_are_none(fake: FakeRegistry) -> None:
    """A proxy's page is not shown."""
    page = b"<html><head><title>403</title></head><body>who are you</body></html>"
    with (
        serving(lambda method, path: (404, {}, page)) as registry,
        client(registry.host) as connected,
        pytest.raises(Exception, match=r"404 Not Found$"),
    ):
        connected.get_manifest("v1")
