"""A registry's HTTP API, spoken so that a hiccup of the network or of a token server never costs an adapter.

`RegistryClient` takes its session from oras' Registry: it keeps no cookie, as Harbor takes whoever sends one for a
browser. Nothing else: oras' methods have no timeouts, re-send a token that may only read, answer a Basic challenge by
sending the password to its realm, and read whole blobs into memory; its Container takes my.team/model for a repository
of the host my.team.
API: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

import html
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode, urljoin, urlsplit

import oras.provider
import requests

from tuner import __version__
from tuner.errors import ConfigError, DataError, DeniedError, InputMissingError, ServiceError, TunerError
from tuner.redaction import redact
from tuner.reference import DIGEST, ImageReference
from tuner.registry.authorization import (
    TOKEN_REPLY_BYTES,
    Challenge,
    Token,
    basic_header,
    check_address,
    parse_challenges,
    parse_token,
    same_origin,
    token_requests,
    token_scopes,
)
from tuner.registry.azure import WorkloadIdentity, is_azure_registry, parse_reply, refusal, workload_identity
from tuner.registry.credentials import ANONYMOUS, Credential, parse_credentials
from tuner.registry.image import MANIFEST_TYPE, Blob, measure, sha256_digest
from tuner.retry import Backoff, Retries, retry_after_s
from tuner.runspec import Network, Reporter, Silent
from tuner.urls import AddressRefusedError, Allowed, ConnectionPolicy

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (MANIFEST_TYPE, INDEX_TYPE, DOCKER_MANIFEST_TYPE, DOCKER_INDEX_TYPE)
MANIFEST_BYTES = 4 << 20  # what registries accept

_CHUNK_BYTES = 1 << 20
_DOWNLOAD_CHUNK_BYTES = 64 << 10  # a connection that breaks costs what of one has arrived
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_CANCEL_S = 5.0
_BACKOFF = Backoff(0.5, 30.0, jitter=0.2)
_UPLOAD_ATTEMPTS = 6  # without getting further
_STORAGE_ATTEMPTS = 3
_STORAGE_REFUSALS = frozenset({400, 401, 403})  # how S3, Azure and Google say that a signed address has expired
_SLOWEST_COMMIT_BYTES_PER_S = 20 << 20  # some registries read a blob again before they answer the last PUT
_ERROR_CHARACTERS = 300
_HTTPS_ONLY = re.compile(rb"HTTP request (?:was sent )?to (?:an )?HTTPS", re.IGNORECASE)


@dataclass(frozen=True)
class Patience:
    """How long to wait for what. `deadline_s` counts from the last progress, `first_contact_s` until the registry
    has answered anything at all: a name that is wrong must show in seconds."""

    connect_timeout_s: float = 10
    read_timeout_s: float = 60
    backoff: Backoff = _BACKOFF
    first_contact_s: float = 10
    deadline_s: float = 300


@dataclass
class _Upload:
    """One upload under way: where it goes on, and how much of the blob the registry has.

    `doubtful`: it may have more than that, because bytes were sent to it twice; `spoilt`: it does.
    """

    location: str
    chunk_bytes: int | None
    offset: int = 0
    doubtful: bool = False
    spoilt: bool = False


class RegistryClient:
    """One repository of one registry. Reads until `for_push()` says otherwise.

    Every method raises DeniedError (401, 403), InputMissingError (404), ServiceError (unreachable or failing after
    every retry) or ConfigError (TLS). Of several credentials each is tried until one works, which is then kept.
    """

    def __init__(
        self,
        reference: ImageReference,
        credentials: Sequence[Credential] = (),
        *,
        plain_http: bool = False,
        ca_file: str | None = None,
        allowed: Allowed | None = None,
        known_credentials: str = "no credentials",
        patience: Patience | None = None,
        chunk_bytes: int | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        registry = oras.provider.Registry(hostname=reference.api_host, insecure=plain_http)
        self._session: requests.Session = registry.session
        self.repository = reference.repository
        self.host = reference.api_host
        self._root = f"{registry.prefix}://{self.host}"
        self._ca_file = ca_file
        self._credentials = tuple(credentials)
        self._candidates = [*credentials, ANONYMOUS]
        self._known_credentials = known_credentials
        self._patience = patience or Patience()
        self._reporter = reporter or Silent()
        self._allowed = allowed or Allowed()
        self._actions = "pull"
        self._settled = False  # whether the current credential has proved itself
        self._reached = False
        self._bearer: Challenge | None = None
        self._header: str | None = None
        self._header_ends = 0.0
        self._chunk_bytes = chunk_bytes
        self._ends = float("inf")
        self._allotted_s = float("inf")
        guard = _GuardedAdapter(ConnectionPolicy(self._allowed, urlsplit(self._root).hostname))
        self._session.mount("http://", guard)
        self._session.mount("https://", guard)
        # requests would otherwise replace our Authorization by what ~/.netrc says about the host
        self._session.auth = _keep_as_is
        self._session.headers["User-Agent"] = f"tuner/{__version__}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @property
    def credential(self) -> Credential:
        """The one in use."""
        return self._candidates[0]

    def for_push(self) -> None:
        """From now on every token asked for may also write: one that may only read would be refused at the end."""
        if self._actions == "pull":
            self._actions = "pull,push"
            self._candidates = [*self._credentials] or [ANONYMOUS]
            self._forget()
            self._settled = False

    def insist(self) -> None:
        """From now on the registry is taken to exist, so that it gets the full deadline when it does not answer."""
        self._reached = True

    def finish_within(self, seconds: float) -> None:
        """From now on whatever would end later raises ServiceError instead, also in the middle of a blob."""
        self._allotted_s = seconds
        self._ends = time.monotonic() + seconds

    # ── manifests ────────────────────────────────────────────────────────────────────────────────────────────────

    def manifest_digest(self, name: str) -> str | None:
        """The digest that a tag or digest has in the registry, or None."""
        response = self._call("HEAD", self._url("manifests", name), ok=(200, 404), headers=_ACCEPT_MANIFESTS)
        if response.status_code == 404:
            return None
        digest = str(response.headers.get("Docker-Content-Digest", ""))
        return digest if DIGEST.fullmatch(digest) else sha256_digest(self.get_manifest(name)[0])

    def get_manifest(self, name: str) -> tuple[bytes, str]:
        """The bytes of a manifest or index as the registry keeps them, and their media type. Not verified."""
        response = self._call("GET", self._url("manifests", name), headers=_ACCEPT_MANIFESTS, stream=True)
        content = _read_at_most(response, MANIFEST_BYTES)
        return content, response.headers.get("Content-Type", "").partition(";")[0].strip()

    def upload_manifest(self, content: bytes, media_type: str, name: str) -> bool:
        """Stores exactly these bytes under a tag or their digest; every blob in them must be there.

        Returns whether the registry will list the manifest with its subject (`OCI-Subject`).
        """
        response = self._call(
            "PUT", self._url("manifests", name), ok=(201,), headers={"Content-Type": media_type}, data=content
        )
        stored = response.headers.get("Docker-Content-Digest")
        digest = sha256_digest(content)
        if stored and stored != digest:
            raise ServiceError(f"{self.host}: stored the manifest {digest} as {stored}; the registry changed it")
        return "OCI-Subject" in response.headers

    def delete_manifest(self, digest: str) -> bool:
        """Whether the registry has forgotten it, with every tag that it had. Most let few do that, and some nobody."""
        if not self._actions.endswith("delete"):
            self._actions += ",delete"
            self._forget()
        try:
            response = self._call("DELETE", self._url("manifests", digest), ok=(200, 202, 404, 405))
        except DeniedError:
            return False
        return bool(response.status_code != 405)

    def get_referrers(self, digest: str) -> bytes | None:
        """The index of the manifests that have `digest` as their subject; None when the registry keeps none."""
        response = self._call("GET", self._url("referrers", digest), ok=(200, 404), stream=True)
        content = _read_at_most(response, MANIFEST_BYTES)
        return content if response.status_code == 200 else None

    # ── blobs ────────────────────────────────────────────────────────────────────────────────────────────────────

    def has_blob(self, digest: str) -> bool:
        response = self._call("HEAD", self._url("blobs", digest), ok=(200, 404))
        return bool(response.status_code == 200)

    def start_upload(self) -> str:
        """Where to send a blob. That it works proves the permission to push."""
        return self._begin_upload().location

    def mount_blob(self, digest: str, from_repository: str) -> bool:
        """Whether the registry has taken the blob over from another of its repositories.

        A refusal is no error: the blob can still be sent.
        """
        if not self._settled:  # a refusal could not be told from that of the credential
            return False
        url = self._url("blobs", f"uploads/?{urlencode({'mount': digest, 'from': from_repository})}")
        before = self._bearer, self._header, self._header_ends
        try:
            response = self._call("POST", url, ok=(201, 202), headers={"Content-Length": "0"})
        except (DeniedError, InputMissingError, ServiceError):
            # a token for both repositories would be asked for again, and refused again
            self._bearer, self._header, self._header_ends = before
            return False
        if response.status_code == 202:
            self.cancel_upload(self._location(response, url))
        return bool(response.status_code == 201)

    def cancel_upload(self, location: str) -> None:
        """Asks the registry to forget an upload. Whatever it answers: some refuse, and all clean up by themselves."""
        self._ends = max(self._ends, time.monotonic() + _CANCEL_S)  # also when the deadline has passed
        try:
            self._exchange("DELETE", location, {}, timeout=(_CANCEL_S, _CANCEL_S)).close()
        except requests.RequestException:
            return

    def upload_blob(self, blob: Blob, *, on_progress: Callable[[int], None]) -> int:
        """Sends one blob and returns how many bytes that took.

        A broken upload goes on where the registry has it when it can say so, and begins again when it can not.
        `on_progress` gets the bytes of the blob that are out.
        """
        waiting = Retries(self._patience.backoff, attempts=_UPLOAD_ATTEMPTS)
        upload, furthest, sent = self._begin_upload(), 0, 0

        def count(position: int, chunk_bytes: int) -> None:
            nonlocal furthest, sent
            sent += chunk_bytes
            if position > furthest:
                furthest = position
                waiting.progressed()
            self._remaining_s()
            on_progress(position)

        try:
            while (fault := self._try_upload(upload, blob, count)) is not None:
                self._wait(waiting, fault)
                if upload.spoilt:
                    self.cancel_upload(upload.location)
                elif self._resume(upload, blob):
                    continue
                if self.has_blob(blob.digest):
                    break  # the last answer was lost, not the blob
                upload = self._begin_upload()
        except BaseException:
            self.cancel_upload(upload.location)
            raise
        on_progress(blob.size_bytes)
        return sent

    def download_blob(self, digest: str, size_bytes: int) -> Iterator[bytes]:
        """The blob in pieces; a broken connection is taken up at the byte where it broke. Not verified."""
        waiting = Retries(self._patience.backoff)
        offset = 0
        while offset < size_bytes:
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
            response = self._call("GET", self._url("blobs", digest), ok=(200, 206), headers=headers, stream=True)
            # a registry without ranges sends all of it again
            skip = 0 if response.status_code == 206 else offset
            try:
                with response:
                    for chunk in response.iter_content(_DOWNLOAD_CHUNK_BYTES):
                        fresh = chunk[skip:]
                        skip -= len(chunk) - len(fresh)
                        if fresh:
                            offset += len(fresh)
                            waiting.progressed()
                            yield fresh
                    fault = _Fault(f"{self.host}: the blob ended after {offset:,} of {size_bytes:,} bytes")
            except requests.RequestException as error:
                fault = self._explain(error)
            if offset < size_bytes:
                self._wait(waiting, fault)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _patiently(self, method: str, url: str, headers: dict[str, str], **rest: Any) -> requests.Response:
        """The answer to one request, authorised and, where it failed by chance, repeated.

        All but the sending of blobs goes through here. A refusal by another place that the registry has sent us to is
        no word of the registry's: it is asked where to go anew, as signed addresses expire.
        """
        waiting = Retries(self._patience.backoff)
        refused = Retries(self._patience.backoff, attempts=_STORAGE_ATTEMPTS)
        while True:
            try:
                response = self._authorised(method, url, headers, **rest)
            except requests.RequestException as error:
                self._wait(waiting, self._explain(error))
                continue
            if response.status_code in _STORAGE_REFUSALS and not self._is_ours(response):
                self._wait(refused, self._storage_fault(response))
            elif response.status_code in _RETRIED:
                self._wait(waiting, self._fault_of(response))
            else:
                return response

    def _call(
        self,
        method: str,
        url: str,
        *,
        ok: tuple[int, ...] = (200,),
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """The answer, which has one of the statuses in `ok`; anything else is an error with the registry's words."""
        response = self._patiently(method, url, dict(headers or {}), data=data, stream=stream)
        if response.status_code not in ok:
            raise self._unexpected(response)
        return response

    def _authorised(self, method: str, url: str, headers: dict[str, str], **rest: Any) -> requests.Response:
        """One answer that is no refusal by the registry. Raises DeniedError when no credential is let in."""
        while True:
            refusal = None
            try:
                response = self._answer_challenge(method, url, headers, **rest)
                if response.status_code not in (401, 403) or not self._is_ours(response):
                    # reading proves nothing when the job is to write
                    if response.ok and (self._actions == "pull" or method == "POST"):
                        self._settled = True
                    return response
                refusal = self._registry_text(response)
            except _RefusedError as error:
                refusal = str(error)
            if self._settled or len(self._candidates) == 1:
                raise self._denied(refusal)
            del self._candidates[0]
            self._forget()

    def _answer_challenge(self, method: str, url: str, headers: dict[str, str], **rest: Any) -> requests.Response:
        """The answer, after at most one new token."""
        if self._bearer and self._header and time.monotonic() > self._header_ends:
            self._renew(self._bearer)
        header = self._header
        response = self._exchange(method, url, headers, **rest)
        challenges = parse_challenges(response.headers.get("WWW-Authenticate", ""))
        if response.status_code not in (401, 403) or not challenges or not self._is_ours(response):
            return response
        by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
        credential = self.credential
        if "bearer" in by_scheme:
            self._renew(by_scheme["bearer"])
        elif "basic" in by_scheme and (credential.username or credential.password):
            self._header = basic_header(credential.username, credential.password)
        if self._header == header:  # the same again would be refused again
            return response
        response.close()
        return self._exchange(method, url, headers, **rest)

    def _renew(self, challenge: Challenge) -> None:
        """Gets a token for all that the job needs. Raises _RefusedError when the token server says no."""
        self._bearer = challenge
        if self.credential.registry_token:
            self._header, self._header_ends = f"Bearer {self.credential.registry_token}", float("inf")
            return
        asked_at = time.monotonic()
        token = self._fetch_token(challenge)
        self._header = f"Bearer {token.value}"
        # early enough for the request that it goes with
        self._header_ends = asked_at + token.lifetime_s - min(30.0, token.lifetime_s / 4)

    def _fetch_token(self, challenge: Challenge) -> Token:
        wanted = f"repository:{self.repository}:{self._actions}"
        scopes = token_scopes(wanted, challenge.parameters.get("scope", ""))
        realm = challenge.parameters.get("realm", "")
        check_address(realm, self._root, "token server", self._allowed)
        realm_host = urlsplit(realm).netloc
        credential = self.credential
        if credential.workload_identity:
            service = challenge.parameters.get("service", realm_host)
            credential = replace(
                credential, identity_token=self._azure_refresh_token(credential.workload_identity, realm, service)
            )
        waiting = Retries(self._patience.backoff)
        requests_to_try = token_requests(challenge, credential, scopes)
        while True:
            request = requests_to_try[0]
            try:
                response = self._send(
                    "POST" if request.form else "GET",
                    request.url,
                    request.headers,
                    data=request.form,
                    stream=True,
                )
                body = _read_at_most(response, TOKEN_REPLY_BYTES)
            except requests.RequestException as error:
                self._wait(waiting, self._explain(error, host=realm_host))
                continue
            if response.status_code == 200:
                return parse_token(body, realm_host)
            if len(requests_to_try) > 1 and response.status_code in (400, 404, 405):
                del requests_to_try[0]
            elif response.status_code in _RETRIED:
                self._wait(waiting, _Fault(f"{realm_host}: {_status(response)}", retry_after_s(response.headers)))
            elif response.status_code in (400, 401, 403):
                text = _shown(_error_text(body))
                raise _RefusedError(f"its token server {realm_host} says {text or _status(response)}")
            else:
                raise ServiceError(f"{realm_host}: the token server answers {_status(response)}")

    def _azure_refresh_token(self, identity: WorkloadIdentity, realm: str, service: str) -> str:
        """The registry's refresh token for a workload identity. It is shown to nobody but Entra ID and the registry.

        Raises _RefusedError when either says no.
        """
        if not same_origin(realm, self._root):
            raise _RefusedError(f"a workload identity is not for its token server {urlsplit(realm).netloc}")
        authority = urlsplit(identity.authority).netloc
        body = self._post_form(identity.token_url(), identity.token_form(), authority)
        access_token = parse_reply(body, "access_token", authority)
        form = identity.exchange_form(service, access_token)
        body = self._post_form(urljoin(realm, "/oauth2/exchange"), form, self.host)
        return parse_reply(body, "refresh_token", self.host)

    def _post_form(self, url: str, form: Mapping[str, str], host: str) -> bytes:
        waiting = Retries(self._patience.backoff)
        while True:
            try:
                response = self._send("POST", url, {}, data=form, stream=True)
                body = _read_at_most(response, TOKEN_REPLY_BYTES)
            except requests.RequestException as error:
                self._wait(waiting, self._explain(error, host=host))
                continue
            if response.status_code == 200:
                return body
            if response.status_code not in _RETRIED:
                raise _RefusedError(f"{host} says {_shown(refusal(body)) or _status(response)}")
            self._wait(waiting, _Fault(f"{host}: {_status(response)}", retry_after_s(response.headers)))

    def _forget(self) -> None:
        self._header, self._header_ends, self._bearer = None, 0.0, None

    def _exchange(
        self, method: str, url: str, headers: Mapping[str, str], *, body_bytes: int = 0, **rest: Any
    ) -> requests.Response:
        """One answer from wherever reads are redirected to; our credential stays with the registry.

        Once a redirect has left the registry nothing on that way gets it, also where it leads back. `history` of the
        answer has the redirects.
        """
        read_timeout_s = self._patience.read_timeout_s + body_bytes / _SLOWEST_COMMIT_BYTES_PER_S
        rest.setdefault("timeout", (self._patience.connect_timeout_s, read_timeout_s))
        hops: list[requests.Response] = []
        while len(hops) < _MOST_REDIRECTS:
            is_ours = all(same_origin(each, self._root) for each in (url, *(hop.url for hop in hops)))
            mine = {"Authorization": self._header} if self._header and is_ours else {}
            response = self._send(method, url, {**headers, **mine}, **rest)
            self._reached = True
            response.history = [*hops]
            if method not in ("GET", "HEAD") or response.status_code not in _REDIRECTS:
                return response
            url = self._location(response, url)
            response.close()
            hops.append(response)
        raise ServiceError(f"{self.host}: more than {_MOST_REDIRECTS} redirects, one after another")

    def _is_ours(self, response: requests.Response) -> bool:
        """Whether the registry itself has answered: not the storage that it redirects to, be it on the same host, nor
        anybody whom that one names. Only then is a challenge answered, and a refusal one of our credential."""
        if not all(same_origin(each.url, self._root) for each in (response, *response.history)):
            return False
        return not response.history or urlsplit(response.url).path.startswith("/v2/")

    def _send(self, method: str, url: str, headers: Mapping[str, str], **rest: Any) -> requests.Response:
        connect_timeout_s, read_timeout_s = rest.pop(
            "timeout", (self._patience.connect_timeout_s, self._patience.read_timeout_s)
        )
        left_s = self._remaining_s()
        try:
            return self._session.request(
                method,
                url,
                headers=headers,
                allow_redirects=False,
                verify=self._ca_file or True,
                timeout=(min(connect_timeout_s, left_s), min(read_timeout_s, left_s)),
                **rest,
            )
        except AddressRefusedError as error:
            raise DeniedError(
                f"{self.host}: not going where the registry sends us: {error}",
                hint="ask who runs the registry; nothing was sent to that address",
            ) from None

    def _remaining_s(self) -> float:
        """How long there is. Raises ServiceError when that is over."""
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise self._too_late("")
        return left_s

    def _too_late(self, reason: str) -> ServiceError:
        because = f"; the last thing that happened: {reason}" if reason else ""
        return ServiceError(
            f"{self.host}: not pushed within {self._allotted_s:,.0f} s, the push deadline{because}",
            hint="what has arrived stays there: push again, with a longer --push-deadline if need be",
        )

    # ── one upload ───────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_upload(self) -> _Upload:
        url = self._url("blobs", "uploads/")
        response = self._call("POST", url, ok=(202,), headers={"Content-Length": "0"})
        chunk_bytes = self._chunk_bytes
        least_bytes = response.headers.get("OCI-Chunk-Min-Length", "")
        if chunk_bytes is not None and least_bytes.isdecimal():
            chunk_bytes = max(chunk_bytes, int(least_bytes))
        return _Upload(self._location(response, url), chunk_bytes)

    def _try_upload(self, upload: _Upload, blob: Blob, count: Callable[[int, int], None]) -> "_Fault | None":
        """None when the blob is there; else what went wrong, when another try may go well."""
        try:
            while upload.offset < blob.size_bytes:
                response = self._send_piece(upload, blob, count)
                if response.status_code not in (201, 202, 204):
                    return self._upload_fault(response)
                upload.location = self._location(response, upload.location)
            separator = "&" if urlsplit(upload.location).query else "?"
            response = self._authorised(
                "PUT",
                f"{upload.location}{separator}digest={blob.digest}",
                {"Content-Length": "0"},
                body_bytes=blob.size_bytes,
            )
        except requests.RequestException as error:
            return self._explain(error)
        if response.status_code in (201, 204):
            return None
        if b"DIGEST_INVALID" in response.content:
            if upload.doubtful:  # two ends of a resumed upload need not meet: once more from the start
                upload.spoilt = True
                return self._fault_of(response)
            raise self._wrong_digest(blob)
        return self._upload_fault(response)

    def _send_piece(self, upload: _Upload, blob: Blob, count: Callable[[int, int], None]) -> requests.Response:
        """The answer to one PATCH: with all that is missing, or `chunk_bytes` of it."""
        end = min(blob.size_bytes, upload.offset + (upload.chunk_bytes or blob.size_bytes))
        headers = {"Content-Type": "application/octet-stream"}
        if upload.offset or end < blob.size_bytes:
            headers["Content-Range"] = f"{upload.offset}-{end - 1}"
        body = _Body(blob, upload.offset, end, count)
        try:
            response = self._authorised(
                "PATCH",
                upload.location,
                headers,
                data=body,
                # urllib3 sends under the connect timeout: a registry may pause for longer than a connect may
                timeout=(self._patience.read_timeout_s, self._patience.read_timeout_s),
            )
        finally:
            if body.times_begun > 1:  # for a new token, in the middle
                upload.doubtful = True
        if response.status_code in (201, 202, 204):
            upload.offset = end
        return response

    def _upload_fault(self, response: requests.Response) -> "_Fault":
        """404, 409 and 416 say that this upload is lost, not that the blob is unwelcome. So does a storage's refusal:
        the registry has another address."""
        if response.status_code in _STORAGE_REFUSALS and not self._is_ours(response):
            return self._storage_fault(response)
        if response.status_code in _RETRIED or response.status_code in (404, 409, 416):
            return self._fault_of(response)
        raise self._unexpected(response)

    def _resume(self, upload: _Upload, blob: Blob) -> bool:
        """Whether the registry still has what was sent; then the upload goes on where that ends."""
        try:
            response = self._authorised("GET", upload.location, {})
        except requests.RequestException:
            return False
        received = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
        if response.status_code != 204 or not received:
            return False
        last = int(received.group(1))
        offset = last + 1 if last else 0  # `0-0` is said of nothing and of one byte
        if offset > blob.size_bytes:
            return False
        if "Location" in response.headers:
            upload.location = self._location(response, upload.location)
        upload.offset, upload.doubtful = offset, offset > 0
        return True

    def _wrong_digest(self, blob: Blob) -> TunerError:
        """Whose fault it is, found by reading the blob once more."""
        with blob.open() as stream:
            digest, _ = measure(stream)
        if digest != blob.digest:
            return DataError(f"the files of {blob.digest} have changed since it was built", hint="push again")
        return ServiceError(
            f"{self.host}: received other bytes than were sent for {blob.digest}; the files here are unchanged",
            hint="something between here and the registry changes data; push again",
        )

    # ── answers and faults ───────────────────────────────────────────────────────────────────────────────────────

    def _url(self, kind: str, name: str) -> str:
        return f"{self._root}/v2/{self.repository}/{kind}/{name}"

    def _location(self, response: requests.Response, base: str) -> str:
        location = response.headers.get("Location")
        if not location:
            raise ServiceError(f"{self.host}: an answer {_status(response)} without a Location; is it a registry?")
        return check_address(urljoin(base, location), self._root, "storage", self._allowed)

    def _wait(self, waiting: Retries, fault: "_Fault") -> None:
        """Sleeps until the next try. Raises ServiceError when it is time to give up."""
        deadline_s = self._patience.deadline_s if self._reached else self._patience.first_contact_s
        wait_s = waiting.next_wait_s(fault.retry_after_s, within_s=deadline_s)
        if wait_s is None:
            asked = f", and asks to come back in {fault.retry_after_s:.0f} s" if fault.retry_after_s else ""
            raise ServiceError(
                f"{fault.text}{asked} ({waiting.failures} tries in {waiting.elapsed_s:.0f} s)", hint=fault.hint
            )
        if time.monotonic() + wait_s > self._ends:
            raise self._too_late(fault.text)
        self._reporter.warn(f"{fault.text}; trying again in {wait_s:.1f} s")
        time.sleep(wait_s)

    def _fault_of(self, response: requests.Response) -> "_Fault":
        text = self._registry_text(response)
        return _Fault(
            f"{self.host}: {text}", retry_after_s(response.headers), "the registry is not well; try again later"
        )

    def _storage_fault(self, response: requests.Response) -> "_Fault":
        where = urlsplit(response.url).netloc
        return _Fault(
            f"{where}: the storage that {self.host} sends us to refuses the address that it gave: "
            f"{self._registry_text(response)}",
            retry_after_s(response.headers),
            f"your credential is not what is refused; ask who runs {self.host} why its addresses do not work there",
        )

    def _explain(self, error: requests.RequestException, host: str | None = None) -> "_Fault":
        """Why there was no answer, in words without the URL, which may be signed. Raises ConfigError for TLS that
        will not get better by trying again."""
        host = host or self.host
        text = str(error)
        if isinstance(error, requests.exceptions.SSLError):
            if "CERTIFICATE_VERIFY_FAILED" in text:
                reason = re.search(r"certificate verify failed: ([^('\"]+)", text)
                hint = "name the CA that signed it with --ca FILE"
                if self._ca_file:
                    hint = f"{self._ca_file} has not the CA that signed it"
                raise ConfigError(
                    f"{host}: its TLS certificate is not one that this machine trusts"
                    + (f": {reason[1].strip()}" if reason else ""),
                    hint=hint if reason is None or "self" in reason[1] or "issuer" in reason[1] else None,
                ) from None
            if re.search("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST", text):
                raise ConfigError(
                    f"{host}: speaks http, not https", hint="if that is meant, add --plain-http"
                ) from None
        if isinstance(error, _BROKEN):
            return _Fault(f"{host}: {_network_reason(error)}", hint="is the name right, and the network up?")
        raise ServiceError(f"{host}: the request can not be sent: {type(error).__name__}") from None

    def _unexpected(self, response: requests.Response) -> TunerError:
        body = _read_at_most(response, TOKEN_REPLY_BYTES)
        text = self._words(response, body)
        # the answer to a HEAD has no body that would say so
        is_plain_http = self._root.startswith("http:")
        if is_plain_http and response.status_code == 400 and (not body or _HTTPS_ONLY.search(body)):
            return ConfigError(
                f"{self.host}: answers plain http with {text}", hint="if it speaks https, leave out --plain-http"
            )
        if response.status_code == 404:
            return InputMissingError(
                f"{self.host}/{self.repository}: {text}", hint="check the registry, the repository and the tag"
            )
        return ServiceError(f"{self.host}/{self.repository}: the registry refuses: {text}")

    def _denied(self, refusal: str) -> DeniedError:
        act = "push to" if "push" in self._actions else "pull from"
        tried = [*self._credentials] or [ANONYMOUS]
        if self._settled:
            tried = [self.credential]
        who = ", ".join(credential.describe() for credential in tried)
        if self._credentials:
            hint = "check the user's rights on the repository and whether the password or token has expired"
        else:
            hint = (
                f"{self._known_credentials} for {self.host}: docker login {self.host}, an imagePushSecret, or a "
                "--docker-config with an entry for it"
            )
            if self._known_credentials != "no credentials":
                hint = f"no key matches {self.host}/{self.repository}; there are {self._known_credentials}"
        return DeniedError(f"{self.host}: may not {act} {self.repository} with {who}: {refusal}", hint=hint)

    def _registry_text(self, response: requests.Response) -> str:
        try:
            return self._words(response, _read_at_most(response, TOKEN_REPLY_BYTES))
        except requests.RequestException:
            return _status(response)

    def _words(self, response: requests.Response, body: bytes) -> str:
        """`403 Forbidden: DENIED: requested access to the resource is denied`"""
        text = _shown(_error_text(body))
        return f"{_status(response)}: {text}" if text else _status(response)


def connect(
    reference: ImageReference,
    network: Network,
    docker_configs: Sequence[str],
    *,
    chunk_bytes: int | None = None,
    patience: Patience | None = None,
    reporter: Reporter | None = None,
) -> RegistryClient:
    """What `tuner.registry.client_for` returns."""
    if network.ca_file is not None and not Path(network.ca_file).is_file():
        raise ConfigError(f"{network.ca_file}: not there", hint="--ca names a file of PEM certificates")
    store = parse_credentials(docker_configs)
    credentials = store.find(reference)
    identity = workload_identity(os.environ)
    if identity is not None and is_azure_registry(reference.registry):
        credentials.append(Credential("AZURE_CLIENT_ID", workload_identity=identity))
    return RegistryClient(
        reference,
        credentials,
        plain_http=network.plain_http,
        ca_file=network.ca_file,
        allowed=Allowed.of(network.allow_cidrs, network.allow_private_urls),
        known_credentials=store.describe(),
        patience=patience,
        chunk_bytes=chunk_bytes,
        reporter=reporter,
    )


_BROKEN = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
)
_ACCEPT_MANIFESTS = {"Accept": ", ".join(MANIFEST_TYPES)}


class _RefusedError(Exception):
    """A token server's no, to be tried with the next credential."""


@dataclass(frozen=True)
class _Fault:
    """What went wrong this time."""

    text: str
    retry_after_s: float | None = None
    hint: str | None = None


class _GuardedConnection:
    """Of urllib3's, with a check once it stands: whatever the name resolved to, and however often, it is the peer's
    address that counts. No byte has gone out by then."""

    policy: ConnectionPolicy
    host: str

    def _new_conn(self) -> socket.socket:
        connection: socket.socket = super()._new_conn()  # type: ignore[misc]
        if refusal := self.policy.refusal(self.host, str(connection.getpeername()[0])):
            connection.close()
            raise AddressRefusedError(refusal)
        return connection


class _GuardedAdapter(requests.adapters.HTTPAdapter):
    """Connections by a policy. Those to a proxy are not checked: it resolves the names, and the user named it."""

    def __init__(self, policy: ConnectionPolicy) -> None:
        self._policy = policy
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        guarded = {}
        for scheme, pool in self.poolmanager.pool_classes_by_scheme.items():
            connection = type("Connection", (_GuardedConnection, pool.ConnectionCls), {"policy": self._policy})
            guarded[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})
        self.poolmanager.pool_classes_by_scheme = guarded


class _Body:
    """A blob from `offset` to `end` as a request's body: read piece by piece, and from the start when sent again."""

    def __init__(self, blob: Blob, offset: int, end: int, count: Callable[[int, int], None]) -> None:
        self._blob = blob
        self._offset = offset
        self._end = end
        self._count = count
        self.times_begun = 0

    def __len__(self) -> int:
        return self._end - self._offset

    def __iter__(self) -> Iterator[memoryview]:
        self.times_begun += 1
        buffer = bytearray(_CHUNK_BYTES)
        with self._blob.open() as stream:
            position = stream.seek(self._offset)
            while size := stream.readinto(memoryview(buffer)[: self._end - position]):
                yield memoryview(buffer)[:size]
                position += size
                self._count(position, size)


def _keep_as_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _read_at_most(response: requests.Response, limit_bytes: int) -> bytes:
    content = b""
    with response:
        for chunk in response.iter_content(64 << 10):
            content += chunk
            if len(content) > limit_bytes:
                raise ServiceError(f"{urlsplit(response.url).netloc}: an answer of more than {limit_bytes:,} bytes")
    return content


def _status(response: requests.Response) -> str:
    return f"{response.status_code} {_shown(response.reason or '')}".strip()


def _shown(text: str) -> str:
    """What a server says: no secret that it echoes, whole or cut off by us, and nothing that moves a cursor."""
    return redact("".join(character for character in text if character.isprintable()))[:_ERROR_CHARACTERS]


_XML_ERROR = re.compile(rb"<(Code|Message)>([^<]{1,300})")


def _error_text(body: bytes) -> str:
    """The codes and messages of `{"errors": […]}`, or of a storage's `<Error>`, else nothing."""
    if body.lstrip(b"\xef\xbb\xbf \r\n")[:1] == b"<":
        return ": ".join(html.unescape(text.decode(errors="replace")) for _, text in _XML_ERROR.findall(body)[:2])
    try:
        errors = json.loads(body)["errors"]
        return "; ".join(
            ": ".join(str(error[part]) for part in ("code", "message", "detail") if error.get(part)) for error in errors
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def _network_reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, requests.exceptions.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy can not be reached"
    text = str(error)
    for sign, reason in (
        ("NameResolutionError", "there is no such host"),
        ("Name or service not known", "there is no such host"),
        ("Connection refused", "nothing listens there"),
        ("timed out", "no answer in time"),
    ):
        if sign in text:
            return reason
    return "the connection broke"
