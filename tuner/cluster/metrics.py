"""What the controller counts, as Prometheus reads it, and the three pages that a kubelet and Prometheus ask for."""

import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

_BUCKETS_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)


class Metrics:
    """Counters and times since the process began, and what the process itself takes."""

    def __init__(self) -> None:
        # A second series for each, which nobody asks for. The function has no annotations.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = known = CollectorRegistry()
        self.reconciles = Counter(
            "tuner_reconciles_total", "Looks at a Workspace, by how they ended.", ["result"], registry=known
        )
        self.reconcile_seconds = Histogram(
            "tuner_reconcile_seconds", "How long a look took.", buckets=_BUCKETS_S, registry=known
        )
        self.queue_seconds = Histogram(
            "tuner_queue_seconds", "How long a Workspace waited for its turn.", buckets=_BUCKETS_S, registry=known
        )
        self.api_requests = Counter(
            "tuner_api_requests_total", "Writes to the API server, by what they were.", ["action"], registry=known
        )
        self.api_errors = Counter(
            "tuner_api_errors_total", "Calls to the API server that failed, by kind of error.", ["kind"], registry=known
        )
        ProcessCollector(registry=known)


class Gauges:
    """What there is at one moment. Made anew for each page, so that a state which no Workspace is in has no series."""

    def __init__(self) -> None:
        self.registry = known = CollectorRegistry()
        self.queue_depth = Gauge("tuner_queue_depth", "Workspaces that wait for their turn.", registry=known)
        self.workspaces = Gauge("tuner_workspaces", "Workspaces by state.", ["state"], registry=known)
        self.watch_age_seconds = Gauge(
            "tuner_watch_age_seconds", "Since when nothing was heard of a watch, by kind.", ["kind"], registry=known
        )
        self.is_leader = Gauge("tuner_is_leader", "1 where this process acts.", registry=known)


def metrics_text(metrics: Metrics, gauges: Gauges) -> str:
    """Both in Prometheus' text format, version 0.0.4."""
    return (generate_latest(metrics.registry) + generate_latest(gauges.registry)).decode()


# A page: what it says, and whether all is well.
Page = Callable[[], tuple[bool, str]]


def serve_pages(port: int, pages: Mapping[str, Page], address: str = "") -> ThreadingHTTPServer:
    """Answer these paths from a thread of its own, until `shutdown`; port 0 takes any that is free."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            well, text = page() if page else (False, "")
            body = text.encode()
            self.send_response(404 if page is None else 200 if well else 503)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name for it
            """A kubelet asks every few seconds."""

    server = ThreadingHTTPServer((address, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="pages", daemon=True).start()
    return server
