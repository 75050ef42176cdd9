"""One leader among several controllers, by a Lease. https://kubernetes.io/docs/concepts/architecture/leases/

No clock of another machine is believed: a lease is old when it has not changed for its duration by our own clock.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tuner.cluster.api import LEASE, Api
from tuner.cluster.api_errors import AlreadyExistsError, ApiError, ConflictError, NotFoundError

DURATION_S, RENEW_WITHIN_S, RETRY_S = 15.0, 10.0, 2.0
_CONFLICTS = 2  # in a row, before it is left to the next try


def _end_process() -> None:
    """Not sys.exit: other threads may be in the middle of a call that they must not finish."""
    os._exit(1)


@dataclass
class Leadership:
    """The lease and whether it is ours. `wait` until it is, `release` it at the end; losing it ends the process."""

    api: Api
    namespace: str
    name: str
    identity: str
    log: Callable[..., None]
    on_lost: Callable[[], None] = _end_process
    duration_s: float = DURATION_S
    renew_within_s: float = RENEW_WITHIN_S
    retry_s: float = RETRY_S
    _stop: threading.Event = field(default_factory=threading.Event)
    _seen: tuple[Any, float] = (None, 0.0)  # what the lease said, and since when it has said so by our clock
    _renewed_at: float | None = None
    _thread: threading.Thread | None = None

    @property
    def is_ours(self) -> bool:
        """Whether nobody else can have taken it yet: asked before each write."""
        return self._renewed_at is not None and time.monotonic() - self._renewed_at < self.renew_within_s

    def wait(self, stopping: threading.Event) -> bool:
        """Return once it is ours; False when the process is to end before."""
        while not stopping.is_set():
            try:
                if self._try():
                    self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
                    self._thread.start()
                    self.log("info", "leading", identity=self.identity)
                    return True
            except ApiError as error:
                self.log("warning", "the lease cannot be had", error=error.message)
            stopping.wait(self.retry_s)
        return False

    def release(self) -> None:
        """Let another take it at once."""
        self._stop.set()
        if self._thread:
            self._thread.join(self.renew_within_s)
        if self._renewed_at is None:
            return
        self._renewed_at = None
        try:
            lease = self.api.get(LEASE, self.name, self.namespace)
            if lease["spec"].get("holderIdentity") == self.identity:
                spec = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                self.api.replace({**lease, "spec": spec}, self.namespace)
        except ApiError as error:
            self.log("warning", "the lease is not released", error=error.message)

    def _keep(self) -> None:
        while not self._stop.wait(self.retry_s):
            try:
                ours = self._try()
            except ApiError as error:
                self.log("warning", "the lease is not renewed", error=error.message)
                ours = True  # perhaps; the clock decides
            if not ours or not self.is_ours:
                if self._stop.is_set():
                    return
                self.log("error", "the lease is lost: this process ends", identity=self.identity)
                self.on_lost()
                return

    def _try(self) -> bool:
        """Take or renew it; False when another has it. Raises ApiError when that cannot be known."""
        for _ in range(_CONFLICTS):
            with suppress(ConflictError, AlreadyExistsError):  # somebody wrote to it, who need not have taken it
                return self._try_once()
        return self._try_once()

    def _try_once(self) -> bool:
        began = time.monotonic()
        try:
            lease = self.api.get(LEASE, self.name, self.namespace)
        except NotFoundError:
            lease = None
        if lease is None:
            metadata = {"name": self.name, "namespace": self.namespace}
            spec = self._spec(0) | {"acquireTime": _now()}
            manifest = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
            self.api.create(manifest, self.namespace)
        elif not self._take(lease, began):
            return False
        self._renewed_at = began
        return True

    def _take(self, lease: dict[str, Any], now: float) -> bool:
        spec = lease["spec"]
        holder = spec.get("holderIdentity") or ""
        said = (holder, spec.get("renewTime"), spec.get("leaseTransitions"))
        if said != self._seen[0]:
            self._seen = (said, now)
        lasts_s = float(spec.get("leaseDurationSeconds") or self.duration_s)
        if holder not in ("", self.identity) and now - self._seen[1] < lasts_s:
            return False
        renewed = self._spec(int(spec.get("leaseTransitions") or 0) + (holder != self.identity))
        renewed["acquireTime"] = spec.get("acquireTime") if holder == self.identity else _now()
        self.api.replace({**lease, "spec": renewed}, self.namespace)
        return True

    def _spec(self, transitions: int) -> dict[str, Any]:
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(1, round(self.duration_s)),
            "renewTime": _now(),
            "leaseTransitions": transitions,
        }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
