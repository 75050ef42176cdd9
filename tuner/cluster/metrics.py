"""What the controller counts, as Prometheus reads it, and the three pages that a kubelet and Prometheus ask for."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_BUCKETS_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)

_HELP = {
    "tuner_reconciles_total": ("counter", "Looks at a Workspace, by how they ended."),
    "tuner_reconcile_seconds": ("histogram", "How long a look took."),
    "tuner_queue_seconds": ("histogram", "How long a Workspace waited for its turn."),
    "tuner_queue_depth": ("gauge", "Workspaces that wait for their turn."),
    "tuner_workspaces": ("gauge", "Workspaces by state."),
    "tuner_watch_age_seconds": ("gauge", "Since when nothing was heard of a watch, by kind."),
    "tuner_api_requests_total": ("counter", "Writes to the API server, by what they were."),
    "tuner_api_errors_total": ("counter", "Calls to the API server that failed, by kind of error."),
    "tuner_is_leader": ("gauge", "1 where this process acts."),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and times; gauges are asked for when somebody reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = defaultdict(float)
        self._times: dict[str, list[float]] = {}  # a count for each bucket, then for all, then the sum

    def count(self, name: str, **labels: str) -> None:
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += 1

    def time(self, name: str, seconds: float) -> None:
        with self._lock:
            times = self._times.setdefault(name, [0.0] * (len(_BUCKETS_S) + 2))
            for index, bucket in enumerate(_BUCKETS_S):
                times[index] += seconds <= bucket
            times[-2] += 1
            times[-1] += seconds

    def total(self, name: str, **labels: str) -> float:
        """The sum of a counter over all that have these labels."""
        with self._lock:
            wanted = set(labels.items())
            return sum(value for (each, has), value in self._counts.items() if each == name and wanted <= set(has))

    def text(self, gauges: Mapping[tuple[str, Labels], float]) -> str:
        """The Prometheus text format, version 0.0.4."""
        with self._lock:
            values = {**self._counts, **gauges}
            times = {name: list(each) for name, each in self._times.items()}
        lines: list[str] = []
        for name, (kind, about) in _HELP.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            if kind == "histogram" and name in times:
                *buckets, count, total = times[name]
                lines += [f'{name}_bucket{{le="{le}"}} {n:g}' for le, n in zip(_BUCKETS_S, buckets, strict=True)]
                lines += [f'{name}_bucket{{le="+Inf"}} {count:g}', f"{name}_sum {total:g}", f"{name}_count {count:g}"]
            lines += [
                f"{name}{_shown(labels)} {value:g}" for (each, labels), value in sorted(values.items()) if each == name
            ]
        return "\n".join(lines) + "\n"


def _shown(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{key}="{escaped(value)}"' for key, value in labels) + "}" if labels else ""


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
