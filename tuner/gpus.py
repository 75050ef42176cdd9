"""The NVIDIA GPUs of this machine, found without torch, whose import takes seconds."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

_WSL_DRIVER = "usr/lib/wsl/lib"  # Windows' driver, for Linux: https://docs.nvidia.com/cuda/wsl-user-guide/
_LIBRARIES = (f"{_WSL_DRIVER}/libcuda.so*", "usr/lib/*-linux-gnu/libcuda.so*", "usr/lib64/libcuda.so*")
_PATIENCE_S = 20


def visible_gpus(env: Mapping[str, str], root: Path = Path("/")) -> int:
    """How many NVIDIA GPUs a process with this environment may use; 0 where there is none.

    The driver lists them in /proc, which a sandbox such as gVisor hides, but not the devices. WSL2 has neither: there
    /dev/dxg is the way to Windows' driver.
    """
    count = len(list(root.glob("proc/driver/nvidia/gpus/*"))) or len(list(root.glob("dev/nvidia[0-9]*")))
    if not count and (root / "dev/dxg").exists():
        count = _of_windows(env, root)
    if "CUDA_VISIBLE_DEVICES" not in env:
        return count
    return min(count, len(list(_named(env["CUDA_VISIBLE_DEVICES"], count))))


def _of_windows(env: Mapping[str, str], root: Path) -> int:
    """By nvidia-smi, else one where there is a library to use it with: another maker's GPU has the device, too."""
    places = [str(root / _WSL_DRIVER), *filter(None, [env.get("PATH")])]
    program = shutil.which("nvidia-smi", path=os.pathsep.join(places))
    if program:
        try:
            said = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
        except (OSError, subprocess.SubprocessError):
            pass
        else:
            return sum(line.startswith("GPU ") for line in said.stdout.splitlines())
    return int(any(True for pattern in _LIBRARIES for _ in root.glob(pattern)))


def _named(visible: str, count: int) -> Iterator[str]:
    """The GPUs up to the first that there is not, as CUDA reads the variable: numbers, and names such as GPU-8932f937.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables
    """
    for name in visible.split(","):
        number = name.strip()
        if re.fullmatch(r"-?\d+", number) and not 0 <= int(number) < count:
            return
        if not number or number.lower() == "nodevfiles":
            return
        yield number
