"""Downloads: Tuner's fetch stage beside curl, from a loopback server that is as slow as one far away.

    python benchmarks/fetch.py [--runs 3] [--write benchmarks/results/fetch.md]

8 files of 50 MB; every answer begins 50 ms after its request, and a connection gives 20 MB/s. The variants take turns;
figures are medians of wall time, with each variant's own process started, and the largest RSS of it. KAITO's downloader
is one curl after another. Tuner also checks each file's digest; sha256sum of the files is not in curl's time.
"""

import argparse
import hashlib
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

FILES = 8
FILE_BYTES = 50_000_000
LATENCY_S = 0.05
BYTES_PER_S = 20_000_000
SLICE_BYTES = 250_000  # what a connection sends between two looks at the clock

TUNER = """
    import sys
    from pathlib import Path
    from tuner.pipeline.fetch import fetch
    from tuner.presets import Preset
    from tuner.runspec import Network, RunSpec, Secrets, Silent, SmokeModel, UrlSource
    from tuner.training_settings import TrainingConfig
    from tuner.urls import source_name
    spec = RunSpec(
        name="benchmark", method="qlora", preset=Preset(name="tiny", model_id="org/tiny"), preset_as_written="tiny",
        base_model=SmokeModel(), training=TrainingConfig.of("qlora", {}),
        sources=tuple(UrlSource(name=source_name(i, url), url=url) for i, url in enumerate(sys.argv[2:])),
        destination={"kind": "directory", "path": "/nowhere"}, network=Network(allow_cidrs=("127.0.0.0/8",)),
    )
    fetch(spec, Secrets(), Path(sys.argv[1]), Silent())
"""


def serve(path: Path) -> None:
    """Serve one file under every path, with ranges, until killed; the port is the first line of stdout."""
    file = path.open("rb")
    size = path.stat().st_size
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer_all, args=(connection, file.fileno(), size), daemon=True).start()


def _answer_all(connection: socket.socket, descriptor: int, size: int) -> None:
    with connection, suppress(OSError):
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                more = connection.recv(65536)
                if not more:
                    return
                received += more
            head, _, received = received.partition(b"\r\n\r\n")
            time.sleep(LATENCY_S)
            start, end, status = 0, size, "200 OK"
            for line in head.decode("latin-1").split("\r\n"):
                if line.lower().startswith("range: bytes="):
                    first, _, last = line.partition("=")[2].partition("-")
                    start, end, status = int(first), int(last or size - 1) + 1, "206 Partial Content"
            connection.sendall(
                f"HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\nAccept-Ranges: bytes\r\n"
                f'ETag: "1"\r\nContent-Range: bytes {start}-{end - 1}/{size}\r\n\r\n'.encode()
            )
            began, at = time.monotonic(), start
            while at < end:
                at += os.sendfile(connection.fileno(), descriptor, at, min(SLICE_BYTES, end - at))
                time.sleep(max(0.0, began + (at - start) / BYTES_PER_S - time.monotonic()))


def peak_rss_bytes(pid: int) -> int:
    """So far; not ru_maxrss, in which a child inherits what its parent had. 0 for a process that has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


@dataclass
class Variant:
    name: str
    seconds: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)

    def commands(self, directory: Path, urls: list[str]) -> list[list[str]]:
        """Run one after the other."""
        if self.name == "tuner":
            return [[sys.executable, "-c", textwrap.dedent(TUNER), str(directory), *urls]]
        targets = [argument for i, url in enumerate(urls) for argument in ("-o", str(directory / str(i)), url)]
        if self.name.startswith("curl -Z"):
            return [["curl", "-fsZ", "--parallel-immediate", *targets]]
        return [["curl", "-fs", "-o", str(directory / str(i)), url] for i, url in enumerate(urls)]

    def run(self, urls: list[str], directory: Path, digest: str) -> None:
        most = 0
        began = time.monotonic()
        for command in self.commands(directory, urls):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while process.poll() is None:
                most = max(most, peak_rss_bytes(process.pid))
                time.sleep(0.01)
            assert process.returncode == 0, command
        self.seconds.append(time.monotonic() - began)
        self.rss_mb.append(most / 1e6)
        whole = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size == FILE_BYTES]
        assert len(whole) == FILES
        for path in whole:
            assert hashlib.file_digest(path.open("rb"), "sha256").hexdigest() == digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    variants = [
        Variant("tuner"),
        Variant("curl, one after another (as KAITO's downloader)"),
        Variant("curl -Z (parallel)"),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        content = Path(temporary) / "content"
        content.write_bytes((b'{"text": "' + os.urandom(32).hex().encode() + b'"}\n') * (FILE_BYTES // 77))
        with content.open("ab") as file:
            file.write(b"\n" * (FILE_BYTES - content.stat().st_size))
        digest = hashlib.sha256(content.read_bytes()).hexdigest()
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(content)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            urls = [f"http://127.0.0.1:{port}/{number}/train.jsonl" for number in range(FILES)]
            for _ in range(arguments.runs):
                for variant in variants:
                    directory = Path(temporary) / "out"
                    directory.mkdir()
                    variant.run(urls, directory, digest)
                    print(f"{variant.name}: {variant.seconds[-1]:.2f} s, {variant.rss_mb[-1]:.0f} MB", file=sys.stderr)
                    shutil.rmtree(directory)
        finally:
            server.kill()
            server.wait()
    report = render(variants, arguments.runs)
    print(report)
    if arguments.write:
        arguments.write.write_text(report + "\n", encoding="utf-8")


def render(variants: list[Variant], runs: int) -> str:
    sequential = statistics.median(variants[1].seconds)
    rows = "\n".join(
        f"| {variant.name} | {statistics.median(variant.seconds):.2f} s "
        f"| {min(variant.seconds):.2f} to {max(variant.seconds):.2f} s | {max(variant.rss_mb):.0f} MB "
        f"| {sequential / statistics.median(variant.seconds):.1f}x |"
        for variant in variants
    )
    curl = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"""# Fetch

{FILES} files of {FILE_BYTES / 1e6:.0f} MB from a loopback server: {LATENCY_S * 1000:.0f} ms before each answer, \
{BYTES_PER_S / 1e6:.0f} MB/s per connection.
Median of {runs} runs that took turns; a variant's time includes the start of its processes, RSS is the largest seen.

| | median | range | RSS | against curl one after another |
|---|---|---|---|---|
{rows}

Tuner's time includes imports, the digest of each file and fsync; curl does neither.

{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; Python {platform.python_version()}, \
httpcore2 {version("httpcore2")}, curl {curl}.
`python benchmarks/fetch.py --runs {runs} --write benchmarks/results/fetch.md`"""


if __name__ == "__main__":
    main()
