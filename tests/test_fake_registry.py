"""tests/fake_registry.py does what distribution-spec 1.1 wants: the cases of its conformance suite that we rely on.

https://github.com/opencontainers/distribution-spec/tree/v1.1.1/conformance
"""

import json
from collections.abc import Iterator

import pytest
import requests

from tests.fake_registry import INDEX, FakeRegistry, fake_registry, sha256

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG, LAYER = b"{}", b"layer" * 1000


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


class Api:
    def __init__(self, fake: FakeRegistry) -> None:
        self.base = f"http://{fake.host}"

    def __call__(self, method: str, path: str, **rest: object) -> requests.Response:
        url = path if path.startswith("http") else f"{self.base}{path}"
        with requests.Session() as session:
            return session.request(method, url, timeout=5, **rest)  # type: ignore[arg-type]

    def begin(self, query: str = "", repository: str = "a/b") -> requests.Response:
        return self("POST", f"/v2/{repository}/blobs/uploads/{query}")

    def push_blob(self, content: bytes, repository: str = "a/b") -> None:
        location = self.begin(repository=repository).headers["Location"]
        assert self("PUT", f"{location}?digest={sha256(content)}", data=content).status_code == 201

    def push_manifest(self, name: str, **more: object) -> tuple[str, requests.Response]:
        content = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"digest": sha256(CONFIG), "size": len(CONFIG)},
                "layers": [{"digest": sha256(LAYER), "size": len(LAYER)}],
                **more,
            }
        ).encode()
        name = name or sha256(content)
        answer = self("PUT", f"/v2/a/b/manifests/{name}", data=content, headers={"Content-Type": MANIFEST})
        return sha256(content), answer


@pytest.fixture
def api(fake: FakeRegistry) -> Api:
    return Api(fake)


# ── pull ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [f"blobs/{sha256(b'no')}", f"manifests/{sha256(b'no')}", "manifests/no"])
def test_what_is_not_there_is_404(api: Api, method: str, path: str) -> None:
    assert api(method, f"/v2/a/b/{path}").status_code == 404


def test_a_blob_is_answered_whole_and_in_ranges(api: Api) -> None:
    api.push_blob(LAYER)
    path = f"/v2/a/b/blobs/{sha256(LAYER)}"
    assert api("GET", path).content == LAYER
    assert api("HEAD", path).headers["Content-Length"] == str(len(LAYER))
    part = api("GET", path, headers={"Range": "bytes=4000-"})
    assert (part.status_code, part.content) == (206, LAYER[4000:])


def test_a_manifest_is_answered_by_digest_and_by_tag(api: Api) -> None:
    api.push_blob(CONFIG)
    api.push_blob(LAYER)
    digest, _ = api.push_manifest("v1")
    for name in ("v1", digest):
        answer = api("GET", f"/v2/a/b/manifests/{name}")
        assert sha256(answer.content) == answer.headers["Docker-Content-Digest"] == digest
        assert answer.headers["Content-Type"] == MANIFEST
        assert api("HEAD", f"/v2/a/b/manifests/{name}").headers["Docker-Content-Digest"] == digest


# ── push ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_blob_is_pushed_in_one_put(api: Api) -> None:
    begun = api.begin()
    assert begun.status_code == 202
    answer = api("PUT", f"{begun.headers['Location']}?digest={sha256(LAYER)}", data=LAYER)
    assert answer.status_code == 201
    assert answer.headers["Location"].endswith(sha256(LAYER))


def test_a_blob_is_pushed_in_chunks_with_a_range_after_each(api: Api) -> None:
    location = api.begin().headers["Location"]
    for start, end in ((0, 3000), (3000, 5000)):
        answer = api("PATCH", location, data=LAYER[start:end], headers={"Content-Range": f"{start}-{end - 1}"})
        assert (answer.status_code, answer.headers["Range"]) == (202, f"0-{end - 1}")
        location = answer.headers["Location"]
    assert api("PUT", f"{location}&digest={sha256(LAYER)}").status_code == 201


def test_the_last_chunk_may_come_with_the_put(api: Api) -> None:
    location = api.begin().headers["Location"]
    location = api("PATCH", location, data=LAYER[:3000]).headers["Location"]
    answer = api("PUT", f"{location}&digest={sha256(LAYER)}", data=LAYER[3000:])
    assert answer.status_code == 201


def test_a_chunk_out_of_order_is_416_and_a_get_says_where_to_go_on(api: Api) -> None:
    location = api.begin().headers["Location"]
    api("PATCH", location, data=LAYER[:3000], headers={"Content-Range": "0-2999"})
    wrong = api("PATCH", location, data=LAYER[4000:], headers={"Content-Range": "4000-4999"})
    assert wrong.status_code == 416
    status = api("GET", location)  # the first Location still does
    assert (status.status_code, status.headers["Range"]) == (204, "0-2999")
    assert "Location" in status.headers


def test_a_blob_of_another_digest_is_refused(api: Api) -> None:
    location = api.begin().headers["Location"]
    answer = api("PUT", f"{location}?digest={sha256(b'other')}", data=LAYER)
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (400, "DIGEST_INVALID")


def test_an_upload_can_be_cancelled(api: Api) -> None:
    location = api.begin().headers["Location"]
    assert api("DELETE", location).status_code == 204
    assert api("GET", location).status_code == 404


def test_a_manifest_without_its_blobs_is_refused(api: Api) -> None:
    _, answer = api.push_manifest("v1")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (404, "MANIFEST_BLOB_UNKNOWN")


def test_a_manifest_under_another_digest_is_refused(api: Api) -> None:
    api.push_blob(CONFIG)
    api.push_blob(LAYER)
    _, answer = api.push_manifest(sha256(b"other"))
    assert answer.status_code == 400


# ── mount ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mount_takes_a_blob_over(api: Api) -> None:
    api.push_blob(LAYER, repository="base")
    answer = api.begin(f"?mount={sha256(LAYER)}&from=base")
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/v2/a/b/blobs/{sha256(LAYER)}")


def test_a_mount_of_what_is_not_there_begins_an_upload(api: Api) -> None:
    answer = api.begin(f"?mount={sha256(LAYER)}&from=base")
    assert answer.status_code == 202
    assert "uploads" in answer.headers["Location"]


# ── referrers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_subject_is_acknowledged_and_listed_also_before_it_is_there(api: Api) -> None:
    api.push_blob(CONFIG)
    api.push_blob(LAYER)
    subject = sha256(b"not there yet")
    digest, answer = api.push_manifest("", subject={"digest": subject, "size": 1}, artifactType="x/y")
    assert answer.headers["OCI-Subject"] == subject
    listed = api("GET", f"/v2/a/b/referrers/{subject}")
    assert (listed.status_code, listed.headers["Content-Type"]) == (200, INDEX)
    assert [(entry["digest"], entry["artifactType"]) for entry in listed.json()["manifests"]] == [(digest, "x/y")]


def test_a_digest_without_referrers_has_an_empty_list(api: Api) -> None:
    listed = api("GET", f"/v2/a/b/referrers/{sha256(b'no')}")
    assert (listed.status_code, listed.json()["manifests"]) == (200, [])
