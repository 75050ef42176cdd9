"""The way from the start of the process to the first optimizer step: what need not wait does not, each part is timed.

box       download ‖ torch is imported          then  weights are loaded ‖ rows are tokenized
trainer   files are read ‖ torch is imported    then  the same
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuner.runspec import Fetched, RunSpec

TOTAL = "total"


class StartUp:
    """Times parts, and runs two of them beside others. Parts overlap, so they add up to more than the whole.

    `began` is when the process started, on time.monotonic()'s clock.
    """

    def __init__(self, began: float | None = None) -> None:
        self._began = process_start() if began is None else began
        self._parts: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="start-up")
        self._imports: Future[None] | None = None
        self._model: Future[Any] | None = None
        self._done = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside as a part of the start-up."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)

    def add(self, name: str, seconds: float) -> None:
        if not self._done:
            self._parts[name] = self._parts.get(name, 0.0) + seconds

    def import_ahead(self) -> None:
        """Import torch and what stands on it alone, beside a download.

        Not transformers: the download imports parts of huggingface_hub, and two threads in one package's circular
        imports see each other's half-made modules.
        """
        self._imports = self._pool.submit(self._import_torch)

    def _import_torch(self) -> None:
        from tuner.pipeline.libraries import quiet_logs

        with self.part("imports"):
            quiet_logs()
            import bitsandbytes  # noqa: F401
            import torch  # noqa: F401

    def load_ahead(
        self, spec: RunSpec, fetched: Fetched, work_dir: Path, import_training: Callable[[], object]
    ) -> None:
        """Load and quantize the base model beside the tokenizing of rows, once all that training needs is imported.

        Nothing for a smoke run, whose base is made from the rows, nor where several GPUs each load their own.
        """
        if fetched.base_model is None:
            return
        directory = work_dir / fetched.base_model.path
        if not (directory / "config.json").is_file():
            return
        reads = self._pool.submit(read_ahead, directory)
        if self._imports:
            self._imports.result()  # has its own time: waiting for it is not another import
        with self.part("imports"):
            import_training()
            load = _loader(spec, directory)
        reads.result()
        if load:
            self._model = self._pool.submit(self._load, load)

    def _load(self, load: Callable[[], Any]) -> Any:
        with self.part("weights"):
            return load()

    def base_model(self) -> Any:
        """The model that load_ahead began to load, None where there is none. Raises what loading raised."""
        model, self._model = self._model, None
        return model.result() if model else None

    def first_step(self) -> dict[str, float]:
        """Seconds of each part, and of the whole way. What comes later counts no more."""
        if not self._done:
            self._done = True
            self._parts[TOTAL] = time.monotonic() - self._began
        return {name: round(seconds, 2) for name, seconds in self._parts.items()}


def describe(seconds: dict[str, float]) -> str:
    """`first step after 14.2 s: imports 5.1, weights 2.9, …`."""
    parts = ", ".join(f"{name} {took:.1f}" for name, took in seconds.items() if name != TOTAL)
    return f"first step after {seconds[TOTAL]:.1f} s: {parts} (parts overlap)"


def process_start() -> float:
    """When this process was started, as time.monotonic() counts."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    ticks = int(fields[19])  # after the name: starttime is field 22 of proc(5)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def read_ahead(directory: Path) -> None:
    """Have the kernel read the weights into its cache, while something else is done."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _loader(spec: RunSpec, directory: Path) -> Callable[[], Any] | None:
    """What loads the model, with all that it and the tokenizer import imported: only one thread should import."""
    import transformers

    from tuner.pipeline.model import gpu_count, load_base_model, pick_device

    if gpu_count() > 1:
        return None
    trusts = spec.trust_remote_code
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusts)
    transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusts)
    device = pick_device()
    return lambda: load_base_model(directory, spec.training, device, trust_remote_code=trusts)
