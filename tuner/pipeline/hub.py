"""The Hugging Face Hub: base weights into its cache, and which files a dataset has at which commit.

HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they always mean.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import httpx2

from tuner.content import DUPLICATE_WEIGHTS, MODEL_CODE, MODEL_FILES, check_has_safetensors
from tuner.errors import DeniedError, InputMissingError, ServiceError, TunerError
from tuner.pipeline.download import disk_errors, interrupted, no_space
from tuner.pipeline.libraries import report_nothing
from tuner.pipeline.web import Transfer, TransientError
from tuner.retry import Retries
from tuner.runspec import HubModel, Progress, Reporter
from tuner.source_headers import SourceHeaders
from tuner.urls import HUB_DATASET

T = TypeVar("T")


# ── datasets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset at one commit. `url` is where its bytes are, `sha256` what they are where the Hub says so."""

    path: str
    name: str  # hf://datasets/OWNER/NAME@COMMIT/PATH
    url: str
    sha256: str | None


def hub_headers(token: str | None) -> tuple[SourceHeaders, ...]:
    """What the Hub is sent with a URL of its own."""
    from huggingface_hub import constants

    if not token:
        return ()
    parts = urlsplit(constants.ENDPOINT)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return (SourceHeaders(parts.scheme, parts.hostname or "", port, "", {"Authorization": f"Bearer {token}"}),)


_UNREACHED = "is the network up? run again: it goes on from here"


def dataset_files(url: str, token: str | None, transfer: Transfer, stop: threading.Event) -> tuple[str, list[HubFile]]:
    """The path in a hf://datasets/… URL, and every file of that dataset at the commit its revision is now."""
    from huggingface_hub.errors import HfHubHTTPError

    report_nothing()
    parsed = HUB_DATASET.fullmatch(url)
    assert parsed is not None, "url_problem let it pass"
    name, revision = parsed["id"], unquote(parsed["revision"] or "main")
    if revision.startswith("~"):  # ~parquet: what the Hub converts every dataset to
        revision = f"refs/convert/{revision[1:]}"
    try:
        files = patiently(lambda: _dataset_files(name, revision, token), transfer, stop)
    except HfHubHTTPError as error:
        if _may_pass(error):
            raise ServiceError(f"{url}: the Hub answered {error.response.status_code}") from None
        # None: the Hub's own text may name signed addresses
        raise _hub_error(f"datasets/{name}", revision, error, token) from None
    except httpx2.TransportError:
        raise ServiceError(f"{url}: the Hub cannot be reached", hint=_UNREACHED) from None
    return unquote(parsed["path"] or ""), files


def _dataset_files(name: str, revision: str, token: str | None) -> list[HubFile]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=token or False)
    commit = str(api.dataset_info(name, revision=revision).sha)
    return [
        HubFile(
            path=file.path,
            name=f"hf://datasets/{name}@{commit}/{file.path}",
            url=f"{constants.ENDPOINT}/datasets/{name}/resolve/{commit}/{quote(file.path)}",
            sha256=file.lfs.sha256 if file.lfs else None,
        )
        for file in api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")
        if isinstance(file, RepoFile)
    ]


# ── base weights ─────────────────────────────────────────────────────────────────────────────────────────────────────


class HubRepository:
    """A model on the Hub, or what an earlier run left of it in the cache. A partly fetched file is gone on with."""

    def __init__(
        self,
        model: HubModel,
        token: str | None,
        *,
        trust_remote_code: bool = False,
        tokenizer_only: bool = False,
        reporter: Reporter,
    ) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import logging as hub_logging

        report_nothing()
        hub_logging.set_verbosity_error()  # its warnings name signed addresses
        self._model = model
        self._token = token or False  # False: never the token of whoever once logged in here
        self._patterns = tuple(
            pattern
            for pattern in (*MODEL_FILES, *((MODEL_CODE,) if trust_remote_code else ()))
            if not (tokenizer_only and pattern == "*.safetensors")
        )
        self._reporter = reporter
        self._cache = Path(constants.HF_HUB_CACHE)

    def check_access(self) -> None:
        """Raises what the Hub has against giving it to us. One that cannot be asked now is none of its refusals."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            HfApi(token=self._token).auth_check(self._model.id)
        except OfflineModeIsEnabled:
            return
        except HfHubHTTPError as error:
            if not _may_pass(error):
                raise _hub_error(self._model.id, self._model.revision, error, self._token) from None
            self._reporter.warn(
                f"{self._model.id}: the Hub answered {error.response.status_code}; fetch will ask again"
            )
        except httpx2.TransportError:
            self._reporter.warn(f"{self._model.id}: the Hub cannot be reached now; fetch will try again")

    def fetch(self, transfer: Transfer, stop: threading.Event) -> tuple[Path, str]:
        """The model's directory in the cache, complete, and its commit. InterruptedRunError once `stop` is set."""
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            with disk_errors(self._cache):
                directory = patiently(
                    lambda: self._fetch_online(transfer.hub_connections), transfer, stop, self._tell_of_retry
                )
        except OfflineModeIsEnabled:
            directory = self._from_cache("HF_HUB_OFFLINE is set")
        except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError) as error:
            if not _may_pass(error):
                # None: the Hub's own text may name signed addresses
                raise _hub_error(self._model.id, self._model.revision, error, self._token) from None
            reason = "the Hub cannot be reached"
            if isinstance(error, HfHubHTTPError):
                reason = f"the Hub answered {error.response.status_code}"
            try:
                directory = self._from_cache(reason)
            except InputMissingError as missing:
                raise ServiceError(missing.message, hint=_UNREACHED) from None
            self._reporter.warn(f"{self._model.id}: {reason}; what the cache holds is used")
        return directory, directory.name  # the cache names it by its commit

    def _tell_of_retry(self) -> None:
        self._reporter.warn(f"{self._model.id}: the Hub cannot be reached or is busy; trying again")

    def _fetch_online(self, connections: int) -> Path:
        from huggingface_hub import HfApi, try_to_load_from_cache

        name = self._model.id
        info = HfApi(token=self._token).model_info(name, revision=self._model.revision, files_metadata=True)
        siblings = info.siblings or ()
        check_has_safetensors([file.rfilename for file in siblings], name)
        sizes = {file.rfilename: file.size or 0 for file in siblings if self._is_wanted(file.rfilename)}
        missing = sum(
            size
            for file, size in sizes.items()
            if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)
        )
        self._cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._cache).free
        if missing > free:
            raise no_space(self._cache, missing, free)
        return self._snapshot(total=sum(sizes.values()), connections=connections)

    def _from_cache(self, reason: str) -> Path:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            raise InputMissingError(
                f"{self._model.id}@{self._model.revision}: {reason}, and the cache at {self._cache} has not all of it",
                hint="fetch it where the Hub can be reached and set HF_HOME to that cache, or give --base-model DIR",
            ) from None

    def _snapshot(self, *, total: int | None = None, connections: int = 1, local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self._model.id,
                revision=self._model.revision,  # not the commit: by this name an offline run looks for it
                token=self._token,
                allow_patterns=list(self._patterns),
                ignore_patterns=["*/*", DUPLICATE_WEIGHTS],
                local_files_only=local_files_only,
                max_workers=connections,
                tqdm_class=_reporting_bar(self._reporter, self._model.id, total),
            )
        )

    def _is_wanted(self, name: str) -> bool:
        return (
            "/" not in name
            and not fnmatch(name, DUPLICATE_WEIGHTS)
            and any(fnmatch(name, pattern) for pattern in self._patterns)
        )


def patiently(
    action: Callable[[], T], transfer: Transfer, stop: threading.Event, tell: Callable[[], None] = lambda: None
) -> T:
    """Again after failures of the wire, of a busy or of a broken service; `tell` is called after the first.

    Raises InterruptedRunError once `stop` is set.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    retries = Retries(transfer.backoff, attempts=transfer.attempts)
    while True:
        try:
            return action()
        except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError, TransientError) as error:
            wait_s = retries.next_wait_s()
            if wait_s is None or not _may_pass(error):
                raise
        if retries.failures == 1:
            tell()
        if stop.wait(wait_s):
            raise interrupted()


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return True
    return bool(error.response.status_code == 429 or error.response.status_code >= 500)


def _hub_error(name: str, revision: str, error: Any, token: str | bool | None) -> TunerError:
    """`name` as in the Hub's addresses: datasets begin with `datasets/`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return DeniedError(
            f"{name}: it is gated, and {'the token has no access' if token else 'there is no token'}",
            hint=f"accept the licence at https://huggingface.co/{name} and set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputMissingError(f"{name}: it has no revision {revision}")
    if isinstance(error, RepositoryNotFoundError):
        hint = "is the id right?" if token else "is the id right? What is private needs HF_TOKEN"
        return InputMissingError(f"{name}: not found on the Hub", hint=hint)
    status = error.response.status_code
    if status in (401, 403):
        return DeniedError(f"{name}: the Hub answered {status}", hint="is HF_TOKEN valid, and may it read this?")
    return InputMissingError(f"{name}: the Hub answered {status}")


def _reporting_bar(reporter: Reporter, task: str, total: int | None) -> type:
    """A tqdm class that draws nothing and tells the reporter how many bytes have come."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    done = 0

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            self.n += n or 0
            if self._counts_bytes and self.n > done:  # several bars count the same bytes at different points
                done = int(self.n)
                reporter.progress(Progress(stage="fetch", task=task, done=done, total=total, unit="B"))

    return ReportingBar
