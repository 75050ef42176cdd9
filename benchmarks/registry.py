"""How fast and how small a push is, beside skopeo and `tar | gzip`: medians of alternating rounds in one run.

    PYTHONPATH=. python benchmarks/registry.py

Writes benchmarks/results/registry.md. Needs Debian's docker-registry and skopeo, and 6 GB of disk.
"""

import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.registries import RunningRegistry, running_registry
from tuner.open_files import OpenDirectory, OpenFile
from tuner.reference import ImageReference, LayoutReference
from tuner.registry import client_for
from tuner.registry.image import build_image, measure
from tuner.registry.push import push_image, push_layout
from tuner.registry.push_state import PushOptions, push_resumably
from tuner.runspec import Network, Silent

RESULTS = Path(__file__).parent / "results" / "registry.md"
ROUNDS = 3
LARGE_BYTES, SMALL_BYTES, PACKED_BYTES = 1 << 30, 25 << 20, 256 << 20


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tuner-benchmark-") as name:
        work = Path(name)
        large, small, packed = (
            _adapter(work / kind, size) for kind, size in
            (("large", LARGE_BYTES), ("small", SMALL_BYTES), ("packed", PACKED_BYTES))
        )  # fmt: skip
        pushes = {"tuner": _push_tuner, "skopeo": _push_skopeo}
        large_s: dict[str, list[float]] = {client: [] for client in pushes}
        rss_mib: dict[str, list[float]] = {client: [] for client in pushes}
        layout = _layout(large, work)
        for _ in range(ROUNDS):
            for client, push in pushes.items():
                with running_registry() as registry:  # an empty one: it keeps the blobs of all repositories
                    seconds, mib = push(large, layout, registry)
                large_s[client].append(seconds)
                rss_mib[client].append(mib)
        small_s = [_job_end_to_pushed(small) for _ in range(ROUNDS)]
        ours_s, gzip_s = [], []
        for _ in range(ROUNDS):
            ours_s.append(_timed(lambda: _package(packed)))
            gzip_s.append(_timed(lambda: _tar_gzip(packed)))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(_report(large_s, rss_mib, small_s, ours_s, gzip_s), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def _adapter(directory: Path, size_bytes: int) -> Path:
    """Weights like real ones: bfloat16 numbers around zero, whose exponents are nearly all the same."""
    directory.mkdir()
    chance = random.Random(size_bytes)
    with (directory / "adapter_model.safetensors").open("wb") as file:
        for _ in range(size_bytes >> 20):
            block = bytearray(chance.randbytes(1 << 20))
            block[1::2] = bytes(0x3C + (byte & 0x83) for byte in block[1::2])
            file.write(block)
    (directory / "adapter_config.json").write_text("{}")
    os.sync()
    return directory


def _files(adapter: Path) -> dict[str, OpenFile]:
    return {path.name: OpenFile.at(path) for path in adapter.iterdir()}


def _layout(adapter: Path, work: Path) -> LayoutReference:
    """What skopeo pushes: the same layers, already packaged."""
    layout = LayoutReference(work / "layout", "v1")
    push_layout(build_image(_files(adapter)), layout, reporter=Silent())
    return layout


def _push_tuner(adapter: Path, _: LayoutReference, registry: RunningRegistry) -> tuple[float, float]:
    """Seconds and MiB of a process that only sends: skopeo's layers are measured before it starts, too."""
    done = subprocess.run(
        [sys.executable, __file__, str(adapter), registry.host], capture_output=True, text=True, check=True
    )
    seconds, kib = done.stdout.split()
    return float(seconds), int(kib) / 1024


def _push_skopeo(_: Path, layout: LayoutReference, registry: RunningRegistry) -> tuple[float, float]:
    target = f"docker://{registry.host}/large:v1"
    options = ["--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false"]
    began = time.monotonic()
    process = subprocess.Popen(["skopeo", *options, str(layout), target], stdout=subprocess.DEVNULL)
    peak_kib = 0
    while process.poll() is None:
        peak_kib = max(peak_kib, _peak_kib(process.pid))
        time.sleep(0.01)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit("skopeo failed")
    return seconds, peak_kib / 1024


def _peak_kib(pid: int | str) -> int:
    """What a process had at most so far. Not ru_maxrss, which a child takes over from the one that started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found.group(1)) if found else 0


def _one_push(adapter: str, host: str) -> None:
    image = build_image(_files(Path(adapter)))
    reference = ImageReference(host, "large", "v1")
    began = time.monotonic()
    with client_for(reference, Network(plain_http=True), []) as client:
        push_image(image, reference, client, reporter=Silent())
    print(time.monotonic() - began, _peak_kib("self"))


def _job_end_to_pushed(adapter: Path) -> float:
    """From the finished files to the tag, measuring them included."""
    with running_registry() as registry:
        return _timed(
            lambda: push_resumably(
                build_image(_files(adapter)),
                ImageReference(registry.host, "small", "v1"),
                adapter=OpenDirectory.at(adapter),
                directory=OpenDirectory.at(adapter.parent),
                network=Network(plain_http=True),
                docker_configs=(),
                options=PushOptions(),
                reporter=Silent(),
            )
        )


def _package(adapter: Path) -> None:
    """Digests of all layers, and every byte of them once more as an upload reads them."""
    for layer in build_image(_files(adapter)).layers:
        with layer.open() as stream:
            measure(stream)


def _tar_gzip(adapter: Path) -> None:
    """As KAITO's pusher does it, with the digest that it needs."""
    command = f"tar -C '{adapter}' -cf - . | gzip -9 | sha256sum"
    subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)


def _timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def _report(
    large_s: dict[str, list[float]],
    rss_mib: dict[str, list[float]],
    small_s: list[float],
    ours_s: list[float],
    gzip_s: list[float],
) -> str:
    skopeo = subprocess.run(["skopeo", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    registry = subprocess.run(["docker-registry", "--version"], capture_output=True, text=True, check=True).stdout
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    mib = {client: LARGE_BYTES / 2**20 / statistics.median(times) for client, times in large_s.items()}
    lines = [
        "# A push, measured",
        "",
        f"Written by `benchmarks/registry.py`: medians of {ROUNDS} alternating rounds in one run, all on loopback.",
        "",
        f"{platform.machine()}, {len(names)} x {names[0].partition(':')[2].strip() if names else '?'}, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}; "
        f"skopeo {skopeo}, distribution {registry.split()[-1]}.",
        "",
        "| 1 GiB adapter to an empty registry | MiB/s | peak RSS, MiB | seconds of each round |",
        "|---|---|---|---|",
    ]
    for client, times in large_s.items():
        each = ", ".join(f"{seconds:.2f}" for seconds in times)
        lines.append(f"| {client} | {mib[client]:.0f} | {max(rss_mib[client]):.0f} | {each} |")
    ratio = statistics.median(gzip_s) / statistics.median(ours_s)
    lines += [
        "",
        f"tuner reaches {mib['tuner'] / mib['skopeo']:.0%} of `skopeo copy --preserve-digests` of the same layers.",
        "Both know the digests beforehand; tuner's process includes its measuring in the RSS, not in the time.",
        "",
        "| | seconds (median) | |",
        "|---|---|---|",
        f"| job end → pushed, 25 MiB, measuring included | {statistics.median(small_s):.2f} | |",
        f"| packaging 256 MiB: measured and read once more | {statistics.median(ours_s):.2f} | |",
        f"| `tar \\| gzip -9 \\| sha256sum` of the same | {statistics.median(gzip_s):.2f} | {ratio:.0f} times as long |",  # noqa: E501
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _one_push(sys.argv[1], sys.argv[2])
    else:
        main()
