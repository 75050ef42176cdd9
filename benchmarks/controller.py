"""What the controller costs: 1,000 Workspaces of which 100 run, on the in-process API server of the tests.

    PYTHONPATH=. python benchmarks/controller.py [--workspaces 1000] [--running 100] [--write]

The controller is a process of its own (`tuner controller`), so its CPU time and memory are its alone; the API server,
the kubelets and the clock are in this one. With --write the figures go to benchmarks/results/controller.md.
"""

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.fake_kubernetes import FakeKubernetes
from tuner.cluster.crd import custom_resource_definition

RESULTS = Path(__file__).parent / "results" / "controller.md"
NAMESPACE = "default"
STEADY_S, CHANGES = 60, 200
DIGEST = f"sha256:{'1' * 64}"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """A controller that runs."""

    child: subprocess.Popen[str]
    health_port: int
    metrics_port: int

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def peak_rss_mb(self) -> float:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.child.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024 / 1e6

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            text = answer.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


@contextmanager
def controller(cluster: FakeKubernetes, work: Path) -> Iterator[Process]:
    kubeconfig = cluster.write_kubeconfig(work / "kubeconfig", namespace=NAMESPACE)
    ports = (free_port(), free_port())
    with (work / "log").open("a") as log:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "tuner", "controller", "--image", "example.com/tuner:1"),
                *("--health-port", str(ports[0]), "--metrics-port", str(ports[1])),
            ],
            env={**os.environ, "KUBECONFIG": str(kubeconfig)},
            stderr=log,
            text=True,
        )
        try:
            yield Process(child, *ports)
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(30)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(holds: Callable[[], Any], timeout_s: float = 600.0, every_s: float = 0.02) -> None:
    deadline = time.monotonic() + timeout_s
    while not _quietly(holds):
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come to pass")
        time.sleep(every_s)


def _quietly(holds: Callable[[], Any]) -> Any:
    try:
        return holds()
    except OSError:  # the pages are not there yet
        return None


# ── Workspaces and what happens to them ──────────────────────────────────────────────────────────────────────────────


def workspace(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "resource": {"instanceType": "gpu-box", "labelSelector": {"matchLabels": {"apps": "tuning"}}},
        "tuning": {
            "preset": {"name": "phi-3-mini-4k-instruct"},
            "method": "qlora",
            "input": {"urls": [f"https://data.example.com/{name}.parquet"]},
            "output": {"image": f"registry.example.com/adapters/{name}:1", "imagePushSecret": "registry"},
        },
    }


def result(stage: str, **values: Any) -> str:
    return json.dumps({"stage": stage, "exit_code": 0, "reason": "Completed", "message": "", "values": values})


STEPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("preflight", "preflight", {}),
    ("data-downloader", "fetch", {"files": 1, "bytes": 13_000_000}),
    ("", "train", {"steps": 900, "loss": 1.25}),
)
PUSHED = {"image": f"registry.example.com/adapters/a@{DIGEST}"}


def begin(cluster: FakeKubernetes, name: str) -> None:
    """Its pod trains; the next thing to end is the trainer."""
    for container, stage, values in STEPS[:2]:
        cluster.start(name, container)
        cluster.finish(name, container, 0, result(stage, **values))


def finish(cluster: FakeKubernetes, name: str) -> None:
    cluster.say(name, "pusher", result("push", **PUSHED))
    for container, stage, values in STEPS[2:]:
        cluster.finish(name, container or name, 0, result(stage, **values))


def progress(cluster: FakeKubernetes, name: str, done: int) -> None:
    line = {"stage": "train", "task": "training", "done": done, "total": 900, "unit": "steps", "loss": 2 - done / 900}
    cluster.log(name, name, json.dumps({**line, "eta_s": 900 - done}))


def state(cluster: FakeKubernetes, name: str) -> str | None:
    found = cluster.object("workspaces", name)
    return ((found or {}).get("status") or {}).get("state")


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figures:
    calls: dict[bool, dict[str, float]]
    rendering_s: float
    start_cpu_s: float
    start_wall_s: float
    rss_mb: float
    steady_percent: float
    change_s: list[float]
    final_rss_mb: float


def measure(workspaces: int, running: int) -> Figures:
    names = [f"tune-{number:04}" for number in range(workspaces)]
    with (
        tempfile.TemporaryDirectory(prefix="tuner-benchmark-") as folder,
        FakeKubernetes(namespaces=(NAMESPACE,), workspaces=False) as cluster,
    ):
        work = Path(folder)
        cluster.put(custom_resource_definition())
        labels = {"apps": "tuning", "node.kubernetes.io/instance-type": "gpu-box"}
        for number in range(running):
            cluster.add_node(f"gpu-{number:03}", labels, gpus=1)
        calls, rendering_s = _fill(cluster, work, names, running)
        with controller(cluster, work) as process:
            began = time.monotonic()
            until(lambda: process.metric("tuner_reconciles_total") >= workspaces, every_s=0.1)
            until(lambda: process.metric("tuner_queue_depth") == 0, every_s=0.1)
            start_wall_s, start_cpu_s, rss_mb = time.monotonic() - began, process.cpu_s, process.peak_rss_mb
            say(f"synced: {start_cpu_s:.1f} s CPU, {start_wall_s:.1f} s, {rss_mb:.0f} MB")
            steady_percent = _steady(cluster, process, names[:running])
            say(f"steady: {steady_percent:.1f} % of a core")
            change_s = [_change(cluster, number) for number in range(CHANGES)]
            final_rss_mb = process.peak_rss_mb
    return Figures(
        calls,
        rendering_s,
        start_cpu_s,
        start_wall_s,
        rss_mb,
        steady_percent,
        change_s,
        final_rss_mb,
    )


def _fill(
    cluster: FakeKubernetes, work: Path, names: list[str], running: int
) -> tuple[dict[bool, dict[str, float]], float]:
    """Have a controller bring all about, from `kubectl apply` on; what one Workspace cost, without and with a check."""
    with controller(cluster, work) as process:
        until(lambda: process.metric("tuner_is_leader"))
        for name in names:
            cluster.put(workspace(name))
        until(lambda: len(cluster.objects("jobs", NAMESPACE)) == len(names), every_s=0.5)
        rendering_s = process.cpu_s
        say(f"{len(names)} Jobs: {rendering_s:.1f} s CPU")
        for number, name in enumerate(names):
            begin(cluster, name)
            if number % 20 == 0:
                time.sleep(0.2)  # a cluster's pods do not all move within one second
        until(lambda: all(state(cluster, name) == "Running" for name in names), every_s=0.5)
        time.sleep(1.0)
        calls = {checked: _calls_of_one(cluster, checked=checked) for checked in (False, True)}
        for name in names[running:]:
            finish(cluster, name)
        until(lambda: all(state(cluster, name) == "Succeeded" for name in names[running:]), every_s=0.5)
    return calls, rendering_s


def _calls_of_one(cluster: FakeKubernetes, *, checked: bool) -> dict[str, float]:
    """What one Workspace costs, slowly, so that no look can do for two events: each kind of call, mean of ten.

    `checked`: no node of its type is there, so a check Job comes first.
    """
    before = dict(cluster.calls)
    for number in range(_SLOWLY):
        name = f"{'checked' if checked else 'slowly'}-{number:02}"
        wanted = workspace(name)
        if checked:
            wanted["resource"]["instanceType"] = "gpu-box-to-boot"
        cluster.put(wanted)
        if checked:
            _run_slowly(cluster, f"{name}--check", (STEPS[0], ("check", "prepare", {"rows": 9})))
            until(lambda it=name: _pods(cluster, it))
            time.sleep(_PAUSE_S)
            cluster.unschedulable(name)
            time.sleep(_PAUSE_S)
        _run_slowly(cluster, name, STEPS)
        until(lambda it=name: state(cluster, it) == "Succeeded")
    calls = {
        f"{verb} {plural}": (count - before.get((verb, plural), 0)) / _SLOWLY
        for (verb, plural), count in cluster.calls.items()
        if plural != "leases" and verb != "watch" and (verb, plural) != ("get", "pods")  # the logs' last lines
    }
    return {kind: count for kind, count in calls.items() if count >= 0.5}


_SLOWLY, _PAUSE_S = 10, 0.25


def _run_slowly(cluster: FakeKubernetes, job: str, steps: tuple[tuple[str, str, dict[str, Any]], ...]) -> None:
    until(lambda: cluster.object("jobs", job) and _pods(cluster, job))
    for container, stage, values in steps:
        cluster.start(job, container or job)
        time.sleep(_PAUSE_S)
        cluster.finish(job, container or job, 0, result(stage, **values))
        time.sleep(_PAUSE_S)


def _pods(cluster: FakeKubernetes, job: str) -> list[dict[str, Any]]:
    return [pod for pod in cluster.objects("pods", NAMESPACE) if pod["metadata"]["labels"].get("job-name") == job]


def _steady(cluster: FakeKubernetes, process: Process, running: list[str]) -> float:
    """Percent of one core while all that run report a step every ten seconds."""
    for name in running:
        progress(cluster, name, 0)
    time.sleep(35)  # each has been asked once
    began, cpu_s = time.monotonic(), process.cpu_s
    while time.monotonic() - began < STEADY_S:
        for name in running:
            progress(cluster, name, int(time.monotonic() - began) + 1)
        time.sleep(10)
    return 100 * (process.cpu_s - cpu_s) / (time.monotonic() - began)


def _change(cluster: FakeKubernetes, number: int) -> float:
    """Seconds from a Workspace that is there to its Job."""
    name = f"late-{number:03}"
    began = time.perf_counter()
    cluster.put(workspace(name))
    until(lambda: cluster.object("jobs", name), every_s=0.002)
    return time.perf_counter() - began


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(figures: Figures, workspaces: int, running: int) -> str:
    changes = sorted(figures.change_s)
    p99 = changes[min(len(changes) - 1, int(len(changes) * 0.99))]
    by_kind = ", ".join(f"{count:g} {kind}" for kind, count in sorted(figures.calls[True].items()))
    rows = (
        ("start to synced, CPU", f"{figures.start_cpu_s:.1f} s", "≤ 10 s"),
        ("start to synced, by the clock", f"{figures.start_wall_s:.1f} s", ""),
        ("peak memory when synced", f"{figures.rss_mb:.0f} MB", "≤ 200 MB"),
        ("peak memory at the end", f"{figures.final_rss_mb:.0f} MB", "≤ 200 MB"),
        (f"steady state, {running} report progress", f"{figures.steady_percent:.1f} % of one core", "≤ 5 %"),
        ("a new Workspace → its Job, median", f"{1000 * statistics.median(changes):.0f} ms", ""),
        (f"a new Workspace → its Job, p99 of {len(changes)}", f"{1000 * p99:.0f} ms", "≤ 1 s"),
        ("API calls for a Workspace, applied to succeeded", f"{sum(figures.calls[False].values()):.1f}", "≤ 25"),
        ("the same with a check Job first", f"{sum(figures.calls[True].values()):.1f}", "≤ 25"),
        (f"{workspaces:,} Workspaces → their Jobs, CPU", f"{figures.rendering_s:.1f} s", ""),
    )
    table = "\n".join(f"| {what} | {value} | {wanted} |" for what, value, wanted in rows)
    return f"""# The controller, measured

Written by `benchmarks/controller.py`: {workspaces:,} Workspaces of which {running} run, on the tests' API server (in
Python, in another process of the same machine); then {CHANGES} more Workspaces, one after the other.

{machine()}

| | measured | wanted |
|---|---|---|
{table}

The calls with a check Job: {by_kind}. Watches, the Lease and the log's last line (every 30 s) are apart.
"""


def machine() -> str:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{platform.machine()}, {os.cpu_count()} x {cpu[1] if cpu else 'CPU'}, Linux {platform.release()}, "
        f"Python {platform.python_version()}; kubernetes {version('kubernetes')}, pydantic {version('pydantic')}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspaces", type=int, default=1000)
    parser.add_argument("--running", type=int, default=100)
    parser.add_argument("--write", action="store_true", help=f"keep it as {RESULTS.name}")
    options = parser.parse_args()
    page = report(measure(options.workspaces, options.running), options.workspaces, options.running)
    print(page)
    if options.write:
        RESULTS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
