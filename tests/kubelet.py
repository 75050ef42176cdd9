"""A Job's pods as processes of this machine, as a kubelet and the Job controller would have them.

    node = Node(tmp_path, objects=[config_map, secret])
    outcome = node.run_job(job)                        # pods, one after the other, until it is Complete or Failed
    pod = node.start_pod(job); pod.terminate(); pod.wait()

Each container is process 1 of its own namespaces: its root has the system's and this checkout's files, read-only, and
nothing writable but what the pod mounts. Volumes are directories, at their real mount paths, read-only where the Job
says so; it runs as the pod's user with no capability, sees only the environment that the Job gives it, and leaves a
termination message. The network is this machine's. What the Job says of images, resources and nodes is not looked at.

Mounting needs root: without it the tests that ask for a Node are skipped, and fail where CI=true.
"""

import base64
import copy
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Manifest = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[1]
ENTRYPOINT = [sys.executable, "-m", "tuner"]
# Of the image, not of the Job. Threads that wait for each other cost a tiny model more than they give.
IMAGE_ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
CLUSTER_ENV = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}  # whatever the pod says
# What a kubelet keeps of a container, in equal shares of what it keeps of a pod.
MESSAGE_BYTES, POD_MESSAGE_BYTES, LOG_MESSAGE_BYTES, LOG_MESSAGE_LINES = 4096, 12 * 1024, 2048, 80
_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "usr", "etc", "opt", "nix")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@cache
def _why_not() -> str | None:
    """What keeps this process from mounting, or None."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return "unshare and setpriv (util-linux) are not installed"
    script = "mount -t tmpfs tmpfs /mnt && mkdir /mnt/a && mount --bind /usr /mnt/a && mount -t proc proc /proc"
    tried = subprocess.run(
        [*_UNSHARE, "bash", "-c", _FIRST_CHILD, "-", script], capture_output=True, text=True, check=False
    )
    return None if tried.returncode == 0 else f"mounting is not permitted here: {tried.stderr.strip()}"


_UNSHARE = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--propagation=private"]
# The first child after `unshare --pid` is process 1. `unshare --fork` would not tell that it was killed.
_FIRST_CHILD = 'exec 3>&2 2>/dev/null; bash -c "$1" 2>&3 3>&- & wait $!; exit $?'


def require_node() -> None:
    """Skip the test where no container can be made."""
    reason = _why_not()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


# ── what comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Terminated:
    """A container that has ended: what its status in the API says, and its log."""

    exit_code: int
    message: str
    log: str


@dataclass(frozen=True)
class PodOutcome:
    """`containers` has those that were started, in their order."""

    containers: dict[str, Terminated]
    was_disrupted: bool
    was_complete: bool  # whether every container was started
    sidecars: frozenset[str] = frozenset()  # whose ends count for nothing

    @property
    def succeeded(self) -> bool:
        ends = [each.exit_code for name, each in self.containers.items() if name not in self.sidecars]
        return self.was_complete and not any(ends)

    @property
    def exit_codes(self) -> dict[str, int]:
        return {name: each.exit_code for name, each in self.containers.items()}


@dataclass(frozen=True)
class JobOutcome:
    """`condition` is Complete or Failed; `reason` as in the condition's own."""

    condition: str
    reason: str | None
    pods: tuple[PodOutcome, ...]

    @property
    def last(self) -> PodOutcome:
        return self.pods[-1]


# ── the Job controller ───────────────────────────────────────────────────────────────────────────────────────────────


def decide(job: Manifest, exit_codes: Mapping[str, int], *, was_disrupted: bool = False) -> str:
    """What becomes of a failed pod: FailJob, Ignore or Count. The first rule that matches decides.

    https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
    """
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", ()):
        for condition in rule.get("onPodConditions") or ():
            if condition["type"] == "DisruptionTarget" and condition.get("status", "True") == "True" and was_disrupted:
                return str(rule["action"])
        on_codes = rule.get("onExitCodes")
        if on_codes and any(_matches(on_codes, name, code) for name, code in exit_codes.items()):
            return str(rule["action"])
    return "Count"


def _matches(on_codes: Mapping[str, Any], container: str, code: int) -> bool:
    if code == 0 or on_codes.get("containerName") not in (None, container):
        return False
    return (code in on_codes["values"]) == (on_codes["operator"] == "In")


# ── a node ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Node:
    """Where pods run. `objects` are the ConfigMaps and Secrets of the namespace, `claims` its volumes, which stay."""

    directory: Path
    objects: list[Manifest] = field(default_factory=list)
    _pods: int = 0

    def __post_init__(self) -> None:
        require_node()

    def claim(self, name: str) -> Path:
        """The directory of a PersistentVolumeClaim; new ones have what mkfs puts there."""
        path = self.directory / "claims" / name
        if not path.exists():
            (path / "lost+found").mkdir(parents=True)
            (path / "lost+found").chmod(0o700)
        return path

    def start_pod(self, job: Manifest, *, killed_at_birth: frozenset[str] = frozenset()) -> "Pod":
        self._pods += 1
        return Pod(self, job, self.directory / f"pod-{self._pods}", killed_at_birth)

    def run_job(self, job: Manifest, *, disturb: "Callable[[int, Pod], None]" = lambda number, pod: None) -> JobOutcome:
        """Pods until the Job ends, without the waits between them. `disturb` gets each pod once it has been started."""
        pods: list[PodOutcome] = []
        failed = 0
        while True:
            pod = self.start_pod(job)
            disturb(len(pods), pod)
            pods.append(pod.wait())
            if pods[-1].succeeded:
                return JobOutcome("Complete", None, tuple(pods))
            match decide(job, pods[-1].exit_codes, was_disrupted=pods[-1].was_disrupted):
                case "FailJob":
                    return JobOutcome("Failed", "PodFailurePolicy", tuple(pods))
                case "Count":
                    failed += 1
            if failed > job["spec"].get("backoffLimit", 6):
                return JobOutcome("Failed", "BackoffLimitExceeded", tuple(pods))
            assert len(pods) < 10, "a Job that is ignored for ever"

    def data_of(self, kind: str, name: str) -> dict[str, bytes]:
        """What a Secret or ConfigMap holds."""
        for found in self.objects:
            if found["kind"] == kind and found["metadata"]["name"] == name:
                data = {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}
                for key, value in (found.get("data") or {}).items():
                    data[key] = base64.b64decode(value) if kind == "Secret" else value.encode()
                return data | {key: value.encode() for key, value in (found.get("stringData") or {}).items()}
        raise AssertionError(f"{kind} {name!r} is not there: the pod would wait for it for ever")


class Pod:
    """A pod that runs. Its init containers come one after the other, then the others side by side.

    An init container with restartPolicy: Always is a sidecar: it is not waited for, started again when it ends, and
    ended after all others. https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/
    """

    def __init__(self, node: Node, job: Manifest, directory: Path, killed_at_birth: frozenset[str]) -> None:
        self.spec: Manifest = copy.deepcopy(job["spec"]["template"]["spec"])
        self.directory = directory
        assert self.spec["restartPolicy"] == "Never"
        self._node = node
        self._killed_at_birth = killed_at_birth
        self._annotated = job["spec"]["template"].get("metadata") or {}
        self._group = self.spec.get("securityContext", {}).get("fsGroup", 0)
        self._sidecars = [each for each in self.spec.get("initContainers", ()) if each.get("restartPolicy") == "Always"]
        self._sidecar_threads: list[threading.Thread] = []
        self._sidecars_stop = False
        self.starts: Counter[str] = Counter()
        self._running: dict[str, _Process] = {}
        self._ended: dict[str, Terminated] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._disrupted = False
        directory.mkdir(parents=True)
        self._volumes = {volume["name"]: self._make_volume(volume) for volume in self.spec.get("volumes", ())}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # what tests look at and do

    def volume(self, name: str) -> Path:
        """Where a volume is on this machine."""
        return self._volumes[name]

    def log(self, container: str) -> str:
        path = self.directory / f"{container}.log"
        return path.read_text("utf-8", errors="replace") if path.exists() else ""

    def wait_for(self, condition: Callable[[], object], *, timeout_s: float = 180, poll_s: float = 0.05) -> None:
        """Until it holds; fails with the logs when the pod ends before, or it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.terminate(grace_s=0)
                pytest.fail(f"waited in vain, and this is what the pod said:\n{self._all_logs()}")
            time.sleep(poll_s)

    def wait_for_log(self, container: str, pattern: str, *, timeout_s: float = 180) -> None:
        self.wait_for(lambda: re.search(pattern, self.log(container), re.MULTILINE), timeout_s=timeout_s)

    def kill(self, container: str) -> None:
        """SIGKILL, as the kernel sends it to who takes too much memory."""
        with self._lock:
            self._running[container].send(signal.SIGKILL)

    def signal(self, container: str, number: int = signal.SIGTERM) -> None:
        with self._lock:
            self._running[container].send(number)

    def terminate(self, *, grace_s: float | None = None, disruption: bool = False) -> None:
        """Delete (or, with `disruption`, evict) the pod: SIGTERM to all containers, sidecars last; later SIGKILL."""
        grace_s = self.spec.get("terminationGracePeriodSeconds", 30) if grace_s is None else grace_s
        sidecars = {each["name"] for each in self._sidecars}
        with self._lock:
            self._stopping, self._disrupted = True, disruption
            for name, process in self._running.items():
                if name not in sidecars:
                    process.send(signal.SIGTERM)

        def end() -> None:
            self._thread.join(grace_s)
            with self._lock:
                for process in self._running.values():
                    process.send(signal.SIGKILL)

        threading.Thread(target=end, daemon=True).start()

    def update_secret(self, volume: str) -> None:
        """Bring the mounted files up to date with the node's objects, as a kubelet does within a minute or so."""
        source = next(each for each in self.spec["volumes"] if each["name"] == volume)["secret"]
        _project(self._volumes[volume], self._files(source, "Secret", source["secretName"]), self._group)

    def wait(self, timeout_s: float = 300) -> PodOutcome:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.terminate(grace_s=0)
            self._thread.join(10)
            pytest.fail(f"the pod did not end within {timeout_s:.0f} s:\n{self._all_logs()}")
        wanted = [each["name"] for each in (*self.spec.get("initContainers", ()), *self.spec["containers"])]
        ended = {name: self._ended[name] for name in wanted if name in self._ended}
        sidecars = frozenset(each["name"] for each in self._sidecars)
        return PodOutcome(ended, self._disrupted, was_complete=len(ended) == len(wanted), sidecars=sidecars)

    def _all_logs(self) -> str:
        return "\n".join(
            f"── {path.stem}\n{path.read_text('utf-8', 'replace')}" for path in self.directory.glob("*.log")
        )

    # how it runs

    def _run(self) -> None:
        try:
            self._run_all()
        finally:
            self._end_sidecars()

    def _run_all(self) -> None:
        for container in self.spec.get("initContainers", ()):
            self._start(container)
            if container in self._sidecars:
                thread = threading.Thread(target=self._keep, args=(container,), daemon=True)
                self._sidecar_threads.append(thread)
                thread.start()
            elif self._finish(container) or self._stopping:
                return
        for container in self.spec["containers"]:
            self._start(container)
        for container in self.spec["containers"]:
            self._finish(container)

    def _keep(self, sidecar: Manifest) -> None:
        """Start it again whenever it ends, later each time, until the pod ends."""
        pause_s = 0.1
        while True:
            self._finish(sidecar)
            time.sleep(pause_s)
            with self._lock:
                if self._stopping or self._sidecars_stop:
                    return
            self._start(sidecar)
            pause_s *= 2

    def _end_sidecars(self) -> None:
        with self._lock:
            self._sidecars_stop = True
            processes = [self._running[each["name"]] for each in self._sidecars if each["name"] in self._running]
            for process in processes:
                process.send(signal.SIGTERM)
        for thread in self._sidecar_threads:
            thread.join(self.spec.get("terminationGracePeriodSeconds", 30))
            if thread.is_alive():
                for process in processes:
                    process.send(signal.SIGKILL)
                thread.join(10)

    def _start(self, container: Manifest) -> None:
        name = container["name"]
        with self._lock:
            if self._stopping:
                return
            self.starts[name] += 1
            message = self.directory / f"{name}.termination-message"
            message.write_bytes(b"")
            message.chmod(0o666)
            script = self._script(container, message)
            self._running[name] = process = _Process(script, self.directory / f"{name}.log")
            if name in self._killed_at_birth:
                process.send(signal.SIGKILL)

    def _finish(self, container: Manifest) -> int:
        """The exit code, once it has ended; 1 for one that was never started."""
        name = container["name"]
        if name not in self._running:
            return 1
        exit_code = self._running[name].wait()
        count = len(self.spec["containers"]) + len(self.spec.get("initContainers", ()))
        written = (self.directory / f"{name}.termination-message").read_bytes()
        message = written[: min(MESSAGE_BYTES, POD_MESSAGE_BYTES // count)].decode("utf-8", "ignore")
        if not message and exit_code and container.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            message = "\n".join(self.log(name)[-LOG_MESSAGE_BYTES:].splitlines()[-LOG_MESSAGE_LINES:])
        with self._lock:
            del self._running[name]
            self._ended[name] = Terminated(exit_code, message, self.log(name))
        return exit_code

    # volumes

    def _make_volume(self, volume: Manifest) -> Path:
        name = volume["name"]
        path = self.directory / "volumes" / name
        match {key: value for key, value in volume.items() if key != "name"}:
            case {"emptyDir": _}:
                path.mkdir(parents=True)
                path.chmod(0o777)
                _own(path, self._group)
            case {"persistentVolumeClaim": {"claimName": claim}}:
                path = self._node.claim(claim)
                _own(path, self._group)
            case {"configMap": source}:
                _project(path, self._files(source, "ConfigMap", source["name"]), self._group)
            case {"secret": source}:
                _project(path, self._files(source, "Secret", source["secretName"]), self._group)
            case {"projected": {"sources": sources}}:
                files: dict[str, tuple[bytes, int]] = {}
                for source in sources:
                    ((kind, what),) = source.items()
                    files |= self._files(what, {"secret": "Secret", "configMap": "ConfigMap"}[kind], what["name"])
                _project(path, files, self._group)
            case other:
                raise NotImplementedError(f"volume {name}: {', '.join(other)}")
        return path

    def _files(self, source: Mapping[str, Any], kind: str, name: str) -> dict[str, tuple[bytes, int]]:
        data = self._node.data_of(kind, name)
        mode = source.get("defaultMode", 0o644)
        if "items" not in source:
            return {key: (value, mode) for key, value in data.items()}
        return {item["path"]: (data[item["key"]], item.get("mode", mode)) for item in source["items"]}

    # a container

    def _environment(self, container: Manifest) -> dict[str, str]:
        values = IMAGE_ENV | CLUSTER_ENV
        for entry in container.get("env", ()):
            match entry:
                case {"name": name, "value": value}:
                    values[name] = re.sub(r"\$\((\w+)\)", lambda match: values.get(match[1], match[0]), value)
                case {"name": name, "valueFrom": {"secretKeyRef": ref}}:
                    values[name] = self._node.data_of("Secret", ref["name"])[ref["key"]].decode()
                case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
                    values[name] = self.directory.name
                case _:
                    raise NotImplementedError(f"env {entry}")
        return values

    def _script(self, container: Manifest, message: Path) -> str:
        """What process 1 does until it becomes the container's program."""
        root = self.directory / f"{container['name']}.root"
        root.mkdir(exist_ok=True)
        lines = ["set -e", f"R={shlex.quote(str(root))}", 'mount -t tmpfs -o mode=0755 tmpfs "$R"']

        def bind(source: Path, target: str, *, read_only: bool) -> None:
            at = f'"$R"{shlex.quote(target)}'
            make = f"mkdir -p {at}"
            if source.is_file() or stat.S_ISCHR(source.stat().st_mode):
                make = f'mkdir -p "$(dirname {at})"; : > {at}'
            lines.append(f"{make}; mount --bind {shlex.quote(str(source))} {at}")
            if read_only:
                lines.append(f"mount -o remount,bind,ro {at}")

        for name in _SYSTEM:
            path = Path("/") / name
            if path.is_symlink():
                lines.append(f'ln -s {shlex.quote(str(path.readlink()))} "$R/{name}"')
            elif path.is_dir():
                bind(path, str(path), read_only=True)
        mounts = sorted(container.get("volumeMounts", ()), key=lambda mount: mount["mountPath"])
        places = _python_places()
        # A checkout below /tmp would be hidden by the pod's own: such places come after the volumes.
        hidden = [place for place in places if any(place.is_relative_to(mount["mountPath"]) for mount in mounts)]
        for path in places:
            if path not in hidden:
                bind(path, str(path), read_only=True)
        for name in ("proc", "dev", "tmp", "run", "mnt"):
            lines.append(f'mkdir -p "$R/{name}"')
        lines.append('mount -t proc proc "$R/proc"')
        for name in _DEVICES:
            bind(Path("/dev") / name, f"/dev/{name}", read_only=False)
        lines += ['ln -s /proc/self/fd "$R/dev/fd"', 'ln -s /proc/self/fd/1 "$R/dev/stdout"', 'mkdir "$R/dev/shm"']
        bind(message, container.get("terminationMessagePath", "/dev/termination-log"), read_only=False)
        for mount in mounts:
            assert not mount.get("subPath"), "subPath is not done here"
            bind(self._volumes[mount["name"]], mount["mountPath"], read_only=mount.get("readOnly", False))
        for path in hidden:
            bind(path, str(path), read_only=True)
        security = {**self.spec.get("securityContext", {}), **container.get("securityContext", {})}
        if security.get("readOnlyRootFilesystem"):
            lines.append('mount -o remount,ro "$R"')
        command = [*container.get("command", ENTRYPOINT), *container.get("args", ())]
        environment = [f"{name}={value}" for name, value in self._environment(container).items()]
        program = ["env", "-i", "-C", container.get("workingDir", "/"), *environment, *command]
        lines.append(f'exec chroot "$R" {shlex.join([*_privileges(security), *program])}')
        return "\n".join(lines)


class _Process:
    """Process 1 of new namespaces; `send` reaches it, and nobody else."""

    def __init__(self, script: str, log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*_UNSHARE, "bash", "-c", _FIRST_CHILD, "-", script],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def send(self, number: int) -> None:
        child = self._first_child()
        if child is not None:
            with suppress(ProcessLookupError):
                os.kill(child, number)

    def wait(self) -> int:
        return self._process.wait()

    def _first_child(self) -> int | None:
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while self._process.poll() is None:
            with suppress(OSError):
                children = path.read_text().split()
                if children:
                    return int(children[0])
            time.sleep(0.002)
        return None


def _python_places() -> list[Path]:
    """Where this Python, its packages and this checkout are, but for what is in the system's directories."""
    wanted = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), *map(Path, sys.path)]
    system = [Path("/") / name for name in _SYSTEM]
    places: list[Path] = []
    for path in sorted({path.resolve() for path in wanted if path.is_dir()}):
        if not any(path.is_relative_to(place) for place in (*system, *places)):
            places.append(path)
    return places


def _privileges(security: Mapping[str, Any]) -> list[str]:
    """Become the container's user. Where that user may not read this checkout, root without capabilities has to do."""
    user, group = security.get("runAsUser", 0), security.get("runAsGroup", 0)
    drops = ["setpriv", "--pdeathsig=KILL", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    if not all(place.stat().st_mode & 0o005 == 0o005 for place in _python_places()):
        return drops
    groups = {group, security.get("fsGroup", group)}
    return [*drops, f"--reuid={user}", f"--regid={group}", f"--groups={','.join(map(str, sorted(groups)))}"]


def _own(path: Path, group: int) -> None:
    """As fsGroup has it: all of it is the group's to write."""
    for each in (path, *path.rglob("*")):
        if each.is_symlink() or each.name == "lost+found":
            continue
        os.chown(each, -1, group)
        each.chmod(each.stat().st_mode | (0o2770 if each.is_dir() else 0o660))


def _project(directory: Path, files: Mapping[str, tuple[bytes, int]], group: int) -> None:
    """The files as a kubelet puts them: links to a hidden directory that is replaced at once."""
    directory.mkdir(parents=True, exist_ok=True)
    hidden = directory / f"..{time.time_ns()}"
    hidden.mkdir()
    for name, (content, mode) in files.items():
        path = hidden / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.chown(path, -1, group)
        path.chmod(mode | 0o440 if group else mode)
    link = directory / "..data_tmp"
    link.symlink_to(hidden.name)
    before = (directory / "..data").readlink() if (directory / "..data").is_symlink() else None
    link.replace(directory / "..data")
    for name in files:
        top = Path(name).parts[0]
        if not (directory / top).is_symlink():
            (directory / top).symlink_to(f"..data/{top}")
    if before is not None:
        shutil.rmtree(directory / before)
