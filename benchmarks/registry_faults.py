"""What three clients make of a registry that fails once: tuner, oras-py and skopeo before the same fault proxy.

    PYTHONPATH=. python benchmarks/registry_faults.py

Writes benchmarks/results/registry_faults.md. Needs Debian's docker-registry and skopeo; takes some minutes, because
oras-py waits long between its tries.
"""

import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from tests.registries import Fault, FaultyRegistry, RunningRegistry, faulty, running_registry
from tests.test_registry_image import ADAPTER, write
from tuner.open_files import OpenFile
from tuner.reference import ImageReference, LayoutReference
from tuner.registry import client_for
from tuner.registry.image import build_image
from tuner.registry.pull import pull_image
from tuner.registry.push import push_image, push_layout
from tuner.runspec import Network, Silent

RESULTS = Path(__file__).parent / "results" / "registry_faults.md"
LONGEST_S = 40
UPLOAD, MANIFEST = r"/blobs/uploads/", "/manifests/"
ERRORS = b'{"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}'

PUSHES: dict[str, list[Fault]] = {
    "nothing": [],
    **{f"{status} on POST": [Fault("POST", UPLOAD, status)] for status in (408, 500, 502, 503, 504)},
    "429 with Retry-After: 2 on POST": [Fault("POST", UPLOAD, 429, {"Retry-After": "2"})],
    "503 with Retry-After: 2 on POST": [Fault("POST", UPLOAD, 503, {"Retry-After": "2"})],
    "500 on PATCH": [Fault("PATCH", UPLOAD, 500)],
    "500 on PUT of a blob": [Fault("PUT", UPLOAD, 500)],
    "503 on PUT of the manifest": [Fault("PUT", MANIFEST, 503)],
    "reset before POST": [Fault("POST", UPLOAD)],
    "reset in the body of PATCH": [Fault("PATCH", UPLOAD, cut_body=100)],
    "PATCH done, answer lost": [Fault("PATCH", UPLOAD, after=True)],
    "PUT of a blob done, answer lost": [Fault("PUT", UPLOAD, after=True)],
    "PUT of the manifest done, answer lost": [Fault("PUT", MANIFEST, after=True)],
    "no answer to POST for 30 s": [Fault("POST", UPLOAD, hang_s=30)],
    "403 on POST, always": [Fault("POST", UPLOAD, 403, body=ERRORS, times=10_000)],
}
REFUSALS = {"403 on POST, always"}  # where failing at once is right
PULLS = ("nothing, on a pull", "one byte of a blob is another", "a blob breaks off after each 200,000 bytes")


@dataclass(frozen=True)
class Outcome:
    ok: bool
    seconds: float
    said: str

    def __str__(self) -> str:
        return f"{'OK' if self.ok else 'FAIL'} {self.seconds:.1f} s" if self.seconds < LONGEST_S else "still waiting"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tuner-faults-") as name, running_registry() as registry:
        work = Path(name)
        jobs: list[tuple[str, str, Callable[[], Outcome]]] = []
        for number, (row, faults) in enumerate(PUSHES.items()):
            for client in CLIENTS:
                jobs.append((row, client, _push_job(registry, faults, client, work, number)))
        for number, row in enumerate(PULLS, start=len(PUSHES)):
            for client in CLIENTS:
                jobs.append((row, client, _pull_job(registry, row, client, work, number)))
        with ThreadPoolExecutor(3) as pool:
            outcomes = list(pool.map(lambda job: job[2](), jobs))
    table = {(row, client): outcome for (row, client, _), outcome in zip(jobs, outcomes, strict=True)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(_report(table), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def _push_job(
    registry: RunningRegistry, faults: list[Fault], client: str, work: Path, number: int
) -> Callable[[], Outcome]:
    def job() -> Outcome:
        directory = work / f"{number}-{client.replace(' ', '')}"
        # other bytes for every push, because the registry keeps the blobs of all
        _adapter(directory, f"{number} {client}")
        with faulty(registry) as proxy:
            proxy.faults.extend(replace(fault) for fault in faults)
            return _run(client, "push", proxy.host, f"p{number}/{_slug(client)}", directory)

    return job


def _pull_job(registry: RunningRegistry, row: str, client: str, work: Path, number: int) -> Callable[[], Outcome]:
    def job() -> Outcome:
        directory = work / f"{number}-{client.replace(' ', '')}"
        _adapter(directory, f"{number} {client}")
        repository = f"p{number}/{_slug(client)}"
        with faulty(registry) as proxy:
            # oras-py pulls only what it has pushed, so each client pulls its own image
            _run(client, "push", proxy.host, repository, directory)
            _damage(row, proxy)
            return _run(client, "pull", proxy.host, repository, directory)

    return job


def _damage(row: str, proxy: FaultyRegistry) -> None:
    """The same for every client: the largest blob is the only one of more than 100,000 bytes."""
    if row == PULLS[0]:
        return
    if row == PULLS[2]:
        proxy.faults.append(Fault("GET", r"/blobs/", cut_answer=200_000, times=100))
        return

    def flip(_method: str, _path: str, body: bytes) -> bytes:
        return body[:50_000] + bytes([body[50_000] ^ 1]) + body[50_001:] if len(body) > 100_000 else body

    proxy.change_answer = flip


def _adapter(directory: Path, text: str) -> None:
    weights = random.Random(text).randbytes(960_000)  # skopeo compresses what it pushes
    write(directory / "adapter", {**ADAPTER, "README.md": text.encode(), "adapter_model.safetensors": weights})


def _run(client: str, act: str, host: str, repository: str, directory: Path) -> Outcome:
    command = CLIENTS[client](act, host, repository, directory)
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, cwd=directory, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(False, LONGEST_S, "")
    said = (done.stderr.strip().splitlines() or [""])[-1].replace(host, "HOST")
    return Outcome(done.returncode == 0, time.monotonic() - began, said)


# ── the clients ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _python(client: str) -> Callable[[str, str, str, Path], list[str]]:
    def command(act: str, host: str, repository: str, directory: Path) -> list[str]:
        return [sys.executable, __file__, client, act, host, repository, str(directory)]

    return command


def _skopeo(*options: str) -> Callable[[str, str, str, Path], list[str]]:
    def command(act: str, host: str, repository: str, directory: Path) -> list[str]:
        image = f"docker://{host}/{repository}:v1"
        tool = ["skopeo", "--insecure-policy", "copy", *options]
        if act == "pull":
            return [*tool, "--src-tls-verify=false", image, f"dir:{directory}/pulled"]
        files = {path.name: OpenFile.at(path) for path in (directory / "adapter").iterdir()}
        layout = LayoutReference(directory / "layout", "v1")
        push_layout(build_image(files), layout, reporter=Silent())
        return [*tool, "--dest-tls-verify=false", str(layout), image]

    return command


CLIENTS: dict[str, Callable[[str, str, str, Path], list[str]]] = {
    "tuner": _python("tuner"),
    "oras-py": _python("oras-py"),
    "skopeo": _skopeo(),
    "skopeo --retry-times 3": _skopeo("--retry-times", "3"),
}


def _tuner(act: str, host: str, repository: str, directory: Path) -> None:
    reference = ImageReference(host, repository, "v1")
    with client_for(reference, Network(plain_http=True), []) as client:
        if act == "push":
            files = {path.name: OpenFile.at(path) for path in (directory / "adapter").iterdir()}
            push_image(build_image(files), reference, client, reporter=Silent())
        else:
            pull_image(reference, directory / "pulled", client, reporter=Silent())


def _oras(act: str, host: str, repository: str, directory: Path) -> None:
    from oras.client import OrasClient

    client = OrasClient(insecure=True)
    target = f"{host}/{repository}:v1"
    if act == "push":
        files = [str(path) for path in sorted((directory / "adapter").iterdir())]
        client.push(files=files, target=target, disable_path_validation=True, do_chunked=True)
    else:
        client.pull(target=target, outdir=str(directory / "pulled"))


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _slug(text: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in text)


def _report(table: dict[tuple[str, str], Outcome]) -> str:
    skopeo = subprocess.run(["skopeo", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    registry = subprocess.run(["docker-registry", "--version"], capture_output=True, text=True, check=True).stdout
    rows = [
        "# What clients make of a registry that fails",
        "",
        "Written by `benchmarks/registry_faults.py`: a fault proxy before a real registry on loopback, each fault once",
        "unless it says otherwise. Times include the start of the program (about a second for the Python ones).",
        "",
        f"{platform.machine()}, {_processor()}, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}; "
        f"oras-py {version('oras')}, skopeo {skopeo}, distribution {registry.split()[-1]}.",
        "",
        f"| fault | {' | '.join(CLIENTS)} |",
        f"|---|{'---|' * len(CLIENTS)}",
    ]
    for row in (*PUSHES, *PULLS):
        right = " (a refusal is right)" if row in REFUSALS or row == PULLS[1] else ""
        rows.append(f"| {row}{right} | {' | '.join(str(table[row, client]) for client in CLIENTS)} |")
    rows += ["", "What tuner says to the 403:", "", f"> {table['403 on POST, always', 'tuner'].said}", ""]
    return "\n".join(rows)


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0].partition(':')[2].strip()}" if names else "unknown processor"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"tuner": _tuner, "oras-py": _oras}[sys.argv[1]](*sys.argv[2:5], Path(sys.argv[5]))
