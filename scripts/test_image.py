"""Both images, built with buildah on a Debian made on the spot, and run as Kubernetes would run them.

./scripts/test-image runs it, as root in a mount namespace of its own. Inside the images: uid 65532, the root mounted
read-only, /tmp and one volume writable, no shell, no new privileges, tuner as process 1. Nothing is left behind but the
Debian root in ~/.cache, which saves its download the next time.
"""

import argparse
import contextlib
import functools
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIZES = ROOT / "benchmarks/results/image_sizes.md"
TARGETS = ("control", "run")
SUITE, PACKAGES = "bookworm", "ca-certificates,python3-pip,python3-venv"
CA_BUNDLE = "etc/ssl/certs/ca-certificates.crt"
# Settings of pip that say where packages come from. Those of a person (user, target, …) are not for an image.
PIP_SETTINGS = {
    *("cert", "constraint", "default-timeout", "timeout", "extra-index-url", "find-links", "index-url"),
    *("no-index", "proxy", "retries", "trusted-host"),
}
CODE_LAYER_LIMIT_MB, CUDA_LIMIT_MB, GROWTH_LIMIT = 5, 4000, 1.10

WORKSPACE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: image-test}}
resource: {{labelSelector: {{matchLabels: {{app: image-test}}}}}}
tuning:
  preset: {{name: phi-3-mini-4k-instruct}}
  method: qlora
  input: {{urls: ["{data}"]}}
  output: {{image: "{registry}/image-test:1", imagePushSecret: registry-secret}}
---
apiVersion: v1
kind: Secret
metadata: {{name: registry-secret}}
type: kubernetes.io/dockerconfigjson
stringData: {{.dockerconfigjson: '{{"auths": {{"{registry}": {{"username": "u", "password": "p"}}}}}}'}}
"""

# What a container runtime does before it starts process 1: the root read-only, its own /proc, /dev and /tmp, a volume.
# The shells are hidden: nothing at run time may need one.
ENTER = """\
set -e
root=$1 volume=$2 workdir=$3 uid=$4; shift 4
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero random urandom; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -m 1777 "$root/dev/shm"
mount --bind "$volume" "$root/mnt"
for shell in "$root"/bin/sh "$root"/bin/dash "$root"/bin/bash; do
    if [ -f "$shell" ]; then mount --bind /dev/null "$(readlink -f "$shell")"; fi
done
exec setpriv --clear-groups --no-new-privs \\
    unshare --root "$root" --wd "$workdir" --setgid "$uid" --setuid "$uid" -- "$@"
"""

WHO_AM_I = """\
import errno, getpass, os, pathlib, pwd, shutil, subprocess, sys
assert os.getpid() == 1, os.getpid()
assert (os.getuid(), os.getgid(), os.getgroups()) == (65532, 65532, []), os.getgroups()
assert pwd.getpwuid(65532).pw_name == getpass.getuser() == "tuner"
assert str(pathlib.Path.home()) == os.getcwd() == "/tmp"
assert shutil.which("git") is None
try:
    subprocess.run("true", shell=True)
    sys.exit("there is a shell")
except PermissionError:
    pass
for place in ("/tmp/x", "/mnt/x", "/dev/shm/x"):
    pathlib.Path(place).write_text("x")
"""
# A uid that the image has not heard of, as OpenShift gives one.
ANY_UID = """\
import getpass, os, pathlib
assert os.getuid() == 1000650000
assert (getpass.getuser(), str(pathlib.Path.home())) == ("tuner", "/tmp")
pathlib.Path("/tmp/x").write_text("x")
"""
# As root, who may write anywhere: only the mount can say no.
READ_ONLY = """\
import errno, os, sys
assert os.getuid() == 0
for place in ("/x", "/etc/x", "/opt/venv/x", "/home/x", "/var/x"):
    try:
        open(place, "w")
        sys.exit(f"{place} could be written")
    except OSError as error:
        assert error.errno == errno.EROFS, error
"""
# Byte code for all that a start imports: else each start compiles it, on a root that keeps nothing.
COMPILED = """\
import os, sys
import tuner.cli, tuner.request, tuner.registry.push, http.client, asyncio, unittest
missing = [n for n, m in sys.modules.items() if getattr(m, "__cached__", None) and not os.path.exists(m.__cached__)]
assert not missing, missing[:9]
assert len(sys.modules) > 300
"""
NO_TORCH = """\
from importlib.util import find_spec
found = [name for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "triton") if find_spec(name)]
assert not found, found
"""
# As Triton does it (triton/runtime/build.py), with its flags.
COMPILER = """\
import importlib.util, pathlib, subprocess, sysconfig, tempfile
source = pathlib.Path(tempfile.mkdtemp()) / "made.c"
source.write_text('''
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "made", 0, -1, 0};
PyMODINIT_FUNC PyInit_made(void) { return PyModule_Create(&module); }
''')
made = source.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
include = sysconfig.get_paths(scheme="posix_prefix")["include"]
subprocess.check_call(["gcc", source, "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", made, f"-I{include}"])
spec = importlib.util.spec_from_file_location("made", made)
assert importlib.util.module_from_spec(spec).__name__ == "made"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="control|run", help="which [both]")
    parser.add_argument("--write", action="store_true", help=f"write the sizes to {SIZES.relative_to(ROOT)}")
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    if set(targets) - set(TARGETS):
        parser.error(f"targets are {' and '.join(TARGETS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    with workshop() as shop, registry() as host:
        shop.make_base()
        sizes = {}
        for target in targets:
            with step(f"{target}: built"):
                shop.build(target)
            with step(f"{target}: built with other code, all but the last layers as before"):
                shop.build_with_other_code(target)
            try_image(shop, target, host)
            with step(f"{target}: layers compressed and measured"):
                sizes[target] = shop.layer_sizes(target)
        estimate = estimate_cuda(sizes["run"]) if "run" in sizes else None
    judge(sizes, estimate, write=options.write)
    say(f"done in {time.monotonic() - started:.0f} s")


def say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    say(f"{time.monotonic() - started:6.1f} s  {what}")


def run(*command: str | Path, **settings: Any) -> str:
    """Its stdout. A command that fails shows all that it said."""
    done = subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if settings.pop("merged", False) else subprocess.PIPE,
        check=False,
        **settings,
    )
    if done.returncode:
        sys.stderr.write(f"{done.stdout}{done.stderr or ''}")
        sys.exit(f"error: exit code {done.returncode}: {shlex.join(map(str, command))[-300:]}")
    return str(done.stdout)


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Workshop:
    """A storage of buildah's own in `directory`, and what is mounted into each build."""

    directory: Path
    driver: str
    mounts: list[Path] = field(default_factory=list)

    def buildah(self, command: str, *arguments: str | Path, **settings: Any) -> str:
        storage = ["--root", self.directory / "storage", "--runroot", self.directory / "run"]
        return run(
            "buildah", *storage, "--storage-driver", self.driver, command, *arguments, cwd=ROOT, **settings
        ).strip()

    def make_base(self) -> None:
        """A Debian with Python under the name that the Dockerfile starts from."""
        (name,) = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
        root = self.directory / "debian"
        with step(f"base: Debian {SUITE} with Python ({self.driver} storage)"):
            archive = cached_debian(self.directory)
            root.mkdir()
            run("tar", "-xf", archive, "-C", root)
            # As in the slim Pythons: no byte code.
            for compiled in [path for path in (root / "usr/lib").rglob("*.pyc") if path.is_file()]:
                compiled.unlink()
            pass_on_pip_settings(root, self.mounts)
            container = self.buildah("from", "scratch")
            self.buildah("add", "--quiet", container, root, "/")
            self.buildah("commit", "--quiet", "--rm", container, name)
            shutil.rmtree(root)

    def build(self, target: str, context: Path = ROOT, tag: str | None = None) -> None:
        (pin,) = re.findall(r"^torch==\S+$", (ROOT / "scripts/constraints.txt").read_text("utf-8"), re.MULTILINE)
        arguments = {
            "TORCH": f"{pin}+cpu",
            "EXTRAS": "train,track",  # fast needs Triton, which the build for CPUs does without
            # The headers of Debian's Python are a package; the slim Pythons have theirs.
            "COMPILER": "gcc libc6-dev python3-dev",
            "REVISION": "0" * 40,
            "SOURCE": "somewhere",
        }
        self.buildah(
            "build",
            *("--layers", "--isolation", "chroot", "--pull-never", "--format", "oci", "--target", target),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *(f"--volume={path}:{path}:ro" for path in self.mounts),
            *("--tag", f"tuner:{tag or target}", context),
            merged=True,
        )

    def build_with_other_code(self, target: str) -> None:
        """What is copied into the image, with a changed module and a changed setting of a tool, built once more."""
        context = self.directory / f"changed-{target}"
        text = (ROOT / "Dockerfile").read_text("utf-8")
        copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
        for path in {"Dockerfile", ".dockerignore", *(path for paths in copied for path in paths)}:
            (context / path).parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-r", ROOT / path, context / path)
        for path, line in (("tuner/errors.py", "CHANGED = 1"), ("pyproject.toml", "[tool.changed]")):
            with (context / path).open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
        self.build(target, context, f"{target}-changed")
        before, after = (self.inspect(name)["rootfs"]["diff_ids"] for name in (target, f"{target}-changed"))
        if before[:-2] != after[:-2] or set(before[-2:]) & set(after[-2:]):
            sys.exit(f"error: {target}: a change of code made other layers than the wheel's two\n{before}\n{after}")

    def inspect(self, target: str) -> Any:
        return json.loads(self.buildah("inspect", "--type", "image", f"tuner:{target}"))["OCIv1"]

    @contextlib.contextmanager
    def mounted(self, target: str) -> Iterator[Path]:
        container = self.buildah("from", "--pull-never", f"tuner:{target}")
        yield Path(self.buildah("mount", container))
        self.buildah("rm", container)

    def layer_sizes(self, target: str) -> dict[str, float]:
        """What a layer is → its compressed MB, in their order."""
        layout = f"oci:{self.directory}/layout-{target}"
        self.buildah("push", "--quiet", f"tuner:{target}", f"{layout}:{target}")
        manifest = json.loads(run("skopeo", "inspect", "--raw", f"{layout}:{target}"))
        config = json.loads(run("skopeo", "inspect", "--config", f"{layout}:{target}"))
        made_by = [entry["created_by"] for entry in config["history"] if not entry.get("empty_layer")]
        sizes: dict[str, float] = {}
        waiting = 0.0
        for layer, instruction in zip(manifest["layers"], made_by, strict=True):
            waiting += layer["size"] / 1e6
            if "(nop) COPY" not in instruction:  # a copied file goes with what is made from it
                sizes[layer_name(instruction)] = waiting
                waiting = 0.0
        return sizes


def layer_name(instruction: str) -> str:
    for part, name in (
        ("*.whl", "tuner"),
        ("run.txt", "libraries"),
        ("control.txt", "libraries"),
        ("--no-deps -r /opt/tuner/torch.txt", "torch"),
        ("-r /opt/tuner/torch.txt", "what torch needs"),
        ("apt-get install", "C compiler"),
        ("compileall", "byte code, environment"),
    ):
        if part in instruction:
            return name
    return "base"


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="tuner-image-", dir="/var/tmp"))
        stack.callback(remove, directory)
        yield Workshop(directory, os.environ.get("STORAGE_DRIVER") or ("overlay" if has_overlay(directory) else "vfs"))


def remove(directory: Path) -> None:
    """The directory with all in it, and nothing that is only mounted there."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text("utf-8").splitlines()]
    for point in sorted((p for p in points if p.startswith(f"{directory}/")), reverse=True):
        run("umount", "--lazy", point)
    shutil.rmtree(directory)


def has_overlay(directory: Path) -> bool:
    """Whether layers can be stacked here. Otherwise buildah copies them (vfs), which takes long."""
    paths = {name: directory / "try" / name for name in ("lower", "upper", "work", "merged")}
    for path in paths.values():
        path.mkdir(parents=True)
    layers = f"lowerdir={paths['lower']},upperdir={paths['upper']},workdir={paths['work']}"
    command = ["mount", "-t", "overlay", "overlay", "-o", layers, str(paths["merged"])]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    run("umount", paths["merged"])
    return True


def cached_debian(directory: Path) -> Path:
    """A tar of Debian's smallest root with Python, made once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner-test-image"
    archive = cache / f"{SUITE}-{PACKAGES.replace(',', '-')}.tar"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        root = directory / "debootstrap"
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root, merged=True)
        partial = archive.with_suffix(".partial")
        run("tar", "-cf", partial, "-C", root, "--exclude=./var/cache/apt/archives/*.deb", "--exclude=./dev/*", ".")
        partial.rename(archive)
        shutil.rmtree(root)
    return archive


def pass_on_pip_settings(root: Path, mounts: list[Path]) -> None:
    """pip finds in the build what it finds here: by its settings, what they name on disk, and the CA bundle."""
    bundle = Path(os.environ.get("SSL_CERT_FILE") or f"/{CA_BUNDLE}")
    if bundle.is_file():
        shutil.copyfile(bundle, root / CA_BUNDLE)
    settings: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        if (key := name.rpartition(".")[2]) in PIP_SETTINGS:
            settings.setdefault(key, "".join(shlex.split(value)))  # pip lists the environment's first
    for value in settings.values():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.is_file():
                (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, root / path.relative_to("/"))
            elif path.is_absolute() and path.is_dir():
                # The pages of an index on disk lead to files beside them.
                directory = path.parent if word.startswith("file://") else path
                (root / directory.relative_to("/")).mkdir(parents=True, exist_ok=True)
                mounts.append(directory)
    lines = [f"{key} = {value}" for key, value in settings.items()]
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Container:
    root: Path
    volume: Path
    entrypoint: Sequence[str]
    environment: Mapping[str, str]
    workdir: str

    def command(self, *arguments: str, uid: int = 65532) -> list[str]:
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "--"]
        return [
            *enter,
            "/bin/sh",
            "-c",
            ENTER,
            "enter",
            *map(str, (self.root, self.volume, self.workdir, uid)),
            *arguments,
        ]

    def run(self, *arguments: str, uid: int = 65532, **settings: Any) -> str:
        return run(*self.command(*arguments, uid=uid), env=self.environment, **settings)

    def tuner(self, *arguments: str) -> str:
        return self.run(*self.entrypoint, *arguments)

    def python(self, program: str, uid: int = 65532) -> None:
        self.run("python3", "-c", program, uid=uid)


@contextlib.contextmanager
def container(shop: Workshop, target: str) -> Iterator[Container]:
    config = shop.inspect(target)["config"]
    if config["User"] != "65532:65532":
        sys.exit(f"error: {target} runs as {config['User']}")
    volume = shop.directory / f"volume-{target}"
    volume.mkdir()
    os.chown(volume, 65532, 65532)
    with shop.mounted(target) as root:
        environment = dict(entry.split("=", 1) for entry in config["Env"])
        environment["WANDB_MODE"] = "offline"  # as a Job sets it
        yield Container(root, volume, config["Entrypoint"], environment, config["WorkingDir"])


def try_image(shop: Workshop, target: str, host: str) -> None:
    with container(shop, target) as image, serving(shop.directory / "served") as url:
        workspace = image.volume / "workspace.yaml"
        workspace.write_text(WORKSPACE.format(data=f"{url}/train.jsonl", registry=host), encoding="utf-8")
        network = ["--plain-http", "--allow-private-urls"]
        with step(f"{target}: uid 65532 as process 1, no shell, root read-only, byte code there"):
            image.python(WHO_AM_I)
            image.python(READ_ONLY, uid=0)
            image.python(COMPILED)
            image.python(ANY_UID, uid=1000650000)
        with step(f"{target}: tuner --help"):
            if "Usage: tuner" not in image.tuner("--help"):
                sys.exit("error: tuner --help says something else")
        with step(f"{target}: tuner check"):
            checked = json.loads(image.tuner("check", "/mnt/workspace.yaml", "--json", *network))
            if (checked["name"], checked["preset"]) != ("image-test", "phi-3-mini-4k-instruct"):
                sys.exit(f"error: tuner check says {checked}")
        if target == "control":
            image.python(NO_TORCH)
            return
        with step(f"{target}: a C module compiled as Triton does it"):
            image.python(COMPILER)
        with step(f"{target}: smoke run with every tracker, pushed"):
            smoke = ["run", "--smoke", "/mnt/workspace.yaml", *network, "--output", f"{host}/image-test:smoke"]
            trackers = "TrainingArguments.report_to=[tensorboard, mlflow, wandb]"
            pushed = image.tuner(*smoke, "--work-dir", "/mnt/smoke", "--set", trackers).splitlines()[-1]
            inspect = ["skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}"]
            digest = run(*inspect, f"docker://{host}/image-test:smoke").strip()
            if pushed != f"{host}/image-test@{digest}":
                sys.exit(f"error: tuner said {pushed}, the registry has {digest}")
        with step(f"{target}: SIGTERM to process 1 saves a checkpoint, exit 75"):
            stop_in_training(image, [*smoke, "--work-dir", "/mnt/stop", "--set", "TrainingArguments.max_steps=1000000"])


def stop_in_training(image: Container, arguments: Sequence[str]) -> None:
    process = subprocess.Popen(
        image.command(*image.entrypoint, *arguments), env=image.environment, text=True, stderr=subprocess.PIPE
    )
    said = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if '"task": "training"' in line:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
                os.kill(int(children[0]), signal.SIGTERM)  # process 1 of its namespace
                said += process.stderr.readlines()
                break
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
    if code != 75 or "checkpoint saved" not in "".join(said):
        sys.stderr.write("".join(said))
        sys.exit(f"error: SIGTERM in training: exit code {code}")


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[str]:
    """The URL of a directory on loopback with 60 conversations in it."""
    directory.mkdir(exist_ok=True)
    rows = (
        [{"role": "user", "content": f"What is {n} and 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]
        for n in range(60)
    )
    lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (directory / "train.jsonl").write_text(lines, encoding="utf-8")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def registry() -> Iterator[str]:
    """The host and port of Debian's docker-registry on loopback."""
    with tempfile.TemporaryDirectory(prefix="tuner-registry-") as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        config = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": f"{directory}/storage"}},
            "http": {"addr": host},
        }
        file = Path(directory) / "config.yml"
        file.write_text(json.dumps(config), encoding="utf-8")
        process = subprocess.Popen(["docker-registry", "serve", file], stderr=subprocess.DEVNULL)
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{host}/v2/"):
                    break
                time.sleep(0.1)
            else:
                sys.exit("error: docker-registry does not answer")
            yield host
        finally:
            process.terminate()
            process.wait()


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def estimate_cuda(sizes: Mapping[str, float]) -> float:
    """MB of `run` with CUDA: what was measured here, with the wheels of torch for CUDA in place of those for CPUs.

    Wheels are compressed as layers are; what pip adds to them (byte code) is taken from the build for CPUs.
    """
    (version,) = re.findall(r"^torch==(\S+)$", (ROOT / "scripts/constraints.txt").read_text("utf-8"), re.MULTILINE)
    with step("run with CUDA: the sizes of torch's wheels asked for"):
        # === takes no local version, as that of the build for CPUs
        return sum(sizes.values()) - wheels_mb(f"torch=={version}+cpu") + wheels_mb(f"torch==={version}")


def wheels_mb(requirement: str) -> float:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    return sum(
        url_size_mb(wheel["download_info"]["url"]) for wheel in json.loads(run(*command, requirement))["install"]
    )


def url_size_mb(url: str) -> float:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        return int(answer.headers["Content-Length"]) / 1e6


def judge(sizes: Mapping[str, Mapping[str, float]], estimate: float | None, *, write: bool) -> None:
    """Prints the sizes beside the last ones. What has grown too much ends this with an error."""
    last = read_sizes(SIZES.read_text("utf-8")) if SIZES.exists() else {}
    now = {(target, name): size for target, layers in sizes.items() for name, size in layers.items()}
    now |= {(target, "all"): sum(layers.values()) for target, layers in sizes.items()}
    if estimate is not None:
        now["run with CUDA", "estimate"] = estimate
    say("\ncompressed, MB                               now      last")
    for (target, name), size in now.items():
        before = f"{last[target, name]:9.1f}" if (target, name) in last else "        –"
        say(f"{target + ', ' + name:40}{size:9.1f} {before}")
    wrong = [
        f"{target}: our code is {size:.1f} MB, more than {CODE_LAYER_LIMIT_MB}"
        for (target, name), size in now.items()
        if name == "tuner" and size > CODE_LAYER_LIMIT_MB
    ]
    if estimate is not None and estimate > CUDA_LIMIT_MB:
        wrong.append(f"run with CUDA: about {estimate:,.0f} MB, more than {CUDA_LIMIT_MB:,}")
    if not write:
        wrong += [
            f"{target}, {name}: {size:.1f} MB, was {last[target, name]:.1f}; if that is right: --write"
            for (target, name), size in now.items()
            if name != "tuner" and size > GROWTH_LIMIT * last.get((target, name), size) + 0.5
        ]
    if wrong:
        sys.exit("\n".join(f"error: {line}" for line in wrong))
    if write:
        SIZES.write_text(render_sizes(last | now), encoding="utf-8")


def read_sizes(text: str) -> dict[tuple[str, str], float]:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([\d,.]+) \|$", text, re.MULTILINE)
    return {(target, name): float(size.replace(",", "")) for target, name, size in rows}


def render_sizes(sizes: Mapping[tuple[str, str], float]) -> str:
    rows = "\n".join(f"| {target} | {name} | {size:,.1f} |" for (target, name), size in sizes.items())
    return f"""\
# Sizes of the images

Compressed with gzip, in MB, written by `./scripts/test-image --write`. The base is a Debian {SUITE} from debootstrap;
the slim Python that the Dockerfile names is smaller. `run` was built here with torch for CPUs. With CUDA it is an
estimate: the same with the wheels of torch and all that it requires on Linux x86-64 in place of those for CPUs.

| image | layer | MB |
|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
