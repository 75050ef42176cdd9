"""GPU names, memory sizes and clouds' instance types → Machine: how many GPUs, and what each can do.

The instance types are KAITO's (pkg/sku, v0.12) and the older ones its examples still name. Memory is what the driver
reports, where that is known (https://thundergolfer.com/blog/nvidia-gpu-memory-capacity), else what the vendor sells;
operations are the data sheets' dense half-precision figures. No prices: they change by region and by day.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from tuner.errors import ConfigError, did_you_mean

GIB = 2**30
NEEDED_CAPABILITY = (7, 5)  # where today's wheels of torch begin


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; of a plain size `tflops` and the capability are not known."""

    name: str
    memory_bytes: int
    capability: tuple[int, int] | None = None
    tflops: float | None = None  # dense, bf16, or fp16 where there is no bf16
    vendor: str = "NVIDIA"

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GIB

    @property
    def problem(self) -> str | None:
        """Why nothing can be trained on it here, however small."""
        if self.vendor != "NVIDIA":
            return f"{self.name} is made by {self.vendor}: the 4-bit path and the image need CUDA"
        if self.capability and self.capability < NEEDED_CAPABILITY:
            major, minor = self.capability
            return (
                f"{self.name} has compute capability {major}.{minor}, and today's torch begins at 7.5 "
                "(torch 2.7 with CUDA 12.6 still has kernels for 7.0)"
            )
        return None


@dataclass(frozen=True)
class Machine:
    """What a run would get: `gpus` of one kind. `name` as it was asked for."""

    name: str
    gpu: Gpu
    gpus: int = 1


def _nvidia(name: str, mib: int, capability: tuple[int, int], tflops: float) -> Gpu:
    return Gpu(name, mib * 2**20, capability, tflops)


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            _nvidia("A2", 15_356, (8, 6), 18),
            _nvidia("A16", 15_356, (8, 6), 18),
            _nvidia("T4", 15_360, (7, 5), 65),
            _nvidia("V100-16", 16_160, (7, 0), 112),
            _nvidia("A10G", 22_731, (8, 6), 70),
            _nvidia("A10", 23_028, (8, 6), 125),
            _nvidia("L4", 23_034, (8, 9), 121),
            _nvidia("RTX-3090", 24_576, (8, 6), 71),
            _nvidia("RTX-4090", 24_564, (8, 9), 165),
            _nvidia("V100-32", 32_510, (7, 0), 112),
            _nvidia("A100-40", 40_960, (8, 0), 312),
            _nvidia("L40S", 46_068, (8, 9), 362),
            _nvidia("H100-80", 81_559, (9, 0), 989),
            _nvidia("A100-80", 81_920, (8, 0), 312),
            _nvidia("H100-94", 95_830, (9, 0), 835),
            _nvidia("H200", 143_771, (9, 0), 989),
            Gpu("Radeon Pro V520", 8 * GIB, vendor="AMD"),
            Gpu("Radeon Pro V620", 32 * GIB, vendor="AMD"),
            Gpu("Trainium", 32 * GIB, vendor="AWS"),
            Gpu("Inferentia2", 32 * GIB, vendor="AWS"),
        )
    }
)
# What people write → the smaller of what it may mean.
_GPU_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "a100": "A100-40",
        "h100": "H100-80",
        "h100-nvl": "H100-94",
        "v100": "V100-16",
        "h200-141": "H200",
        "3090": "RTX-3090",
        "4090": "RTX-4090",
        "v520": "Radeon Pro V520",
        "v620": "Radeon Pro V620",
    }
)

# GPU, how many, and the instance types that have them.
_INSTANCE_TYPES: tuple[tuple[str, int, str], ...] = (
    # Azure
    ("A10", 1, "Standard_NV36ads_A10_v5"),
    ("A10", 2, "Standard_NV72ads_A10_v5"),
    ("A100-80", 1, "Standard_NC24ads_A100_v4"),
    ("A100-80", 2, "Standard_NC48ads_A100_v4"),
    ("A100-80", 4, "Standard_NC96ads_A100_v4"),
    ("A100-40", 8, "Standard_ND96asr_A100_v4"),
    ("A100-80", 8, "Standard_ND96amsr_A100_v4"),
    ("H100-94", 1, "Standard_NC40ads_H100_v5 Standard_NCC40ads_H100_v5"),
    ("H100-94", 2, "Standard_NC80adis_H100_v5"),
    ("H100-80", 8, "Standard_ND96isr_H100_v5"),
    ("H200", 8, "Standard_ND96isr_H200_v5"),
    ("Radeon Pro V620", 1, "Standard_NG32ads_V620_v1 Standard_NG32adms_V620_v1"),
    # Azure, no longer in KAITO's list
    ("T4", 1, "Standard_NC4as_T4_v3 Standard_NC8as_T4_v3 Standard_NC16as_T4_v3"),
    ("T4", 4, "Standard_NC64as_T4_v3"),
    ("V100-16", 1, "Standard_NC6s_v3"),
    ("V100-16", 2, "Standard_NC12s_v3"),
    ("V100-16", 4, "Standard_NC24s_v3 Standard_NC24rs_v3"),
    # AWS
    ("A100-40", 8, "p4d.24xlarge"),
    ("A100-80", 8, "p4de.24xlarge"),
    ("H100-80", 8, "p5.48xlarge"),
    ("H200", 8, "p5e.48xlarge p5en.48xlarge"),
    ("L4", 1, "g6.xlarge g6.2xlarge g6.4xlarge g6.8xlarge g6.16xlarge gr6.4xlarge gr6.8xlarge"),
    ("L4", 4, "g6.12xlarge g6.24xlarge"),
    ("L4", 8, "g6.48xlarge"),
    ("A10G", 1, "g5.xlarge g5.2xlarge g5.4xlarge g5.8xlarge g5.16xlarge"),
    ("A10G", 4, "g5.12xlarge g5.24xlarge"),
    ("A10G", 8, "g5.48xlarge"),
    ("Radeon Pro V520", 1, "g4ad.xlarge g4ad.2xlarge g4ad.4xlarge"),
    ("Radeon Pro V520", 2, "g4ad.8xlarge"),
    ("Radeon Pro V520", 4, "g4ad.16xlarge"),
    ("Trainium", 1, "trn1.2xlarge"),
    ("Trainium", 16, "trn1.32xlarge trn1n.32xlarge"),
    ("Inferentia2", 1, "inf2.xlarge inf2.8xlarge"),
    ("Inferentia2", 6, "inf2.24xlarge"),
    ("Inferentia2", 12, "inf2.48xlarge"),
    # Azure Arc
    ("A2", 1, "Standard_NC4_A2 Standard_NC8_A2"),
    ("A2", 2, "Standard_NC16_A2 Standard_NC32_A2"),
    ("A16", 1, "Standard_NC4_A16 Standard_NC8_A16"),
    ("A16", 2, "Standard_NC16_A16 Standard_NC32_A16"),
)


@cache
def instance_types() -> Mapping[str, Machine]:
    """Every instance type by name, in the table's order."""
    return MappingProxyType(
        {name: Machine(name, GPUS[gpu], count) for gpu, count, names in _INSTANCE_TYPES for name in names.split()}
    )


def find_instance_type(name: str) -> Machine:
    """The machine of an instance type, in any case. Raises ConfigError for one that is not in the table."""
    machines = {known.lower(): machine for known, machine in instance_types().items()}
    if name.strip().lower() in machines:
        return machines[name.strip().lower()]
    raise ConfigError(
        f"no instance type {name!r} is known",
        hint=did_you_mean(name, instance_types()) or "say what its GPU is: --gpu H100-80, or --gpu 24GB",
    )


def find_gpu(text: str) -> Machine:
    """One GPU by name ("H100-80", "A100 80GB", "RTX 4090") or by memory ("24GB", "24GiB").

    A plain GB is 10⁹ bytes: a card sold as 24 GB reports no less. Raises ConfigError for anything else.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G|Gi)", text.strip(), re.IGNORECASE)
    if size:
        unit = GIB if "i" in size[2].lower() else 10**9
        memory_bytes = int(float(size[1]) * unit)
        if memory_bytes:
            return Machine(text.strip(), Gpu(f"a GPU with {text.strip()}", memory_bytes))
    word = re.sub(r"^(nvidia|tesla|geforce)[-_ ]+", "", text.strip().lower())
    word = re.sub(r"gi?b$", "", re.sub(r"[-_ ]+", "-", word))
    known = {name.lower().replace(" ", "-"): gpu for name, gpu in GPUS.items()}
    known |= {alias: GPUS[name] for alias, name in _GPU_ALIASES.items()}
    # a name may carry its size where there is only one: L4-24, H200-141GB
    for found in (word, re.sub(r"-\d+$", "", word)):
        if found in known and (found == word or _is_size(word, known[found])):
            return Machine(text.strip(), known[found])
    bare = re.fullmatch(r"\d+(?:\.\d+)?", text.strip())
    raise ConfigError(
        f"no GPU {text!r} is known" + (", and a size has its unit" if bare else ""),
        hint=f"--gpu {text.strip()}GB"
        if bare
        else did_you_mean(text, GPUS) or f"give its memory (24GB), or one of {', '.join(_trainable())}",
    )


def _is_size(word: str, gpu: Gpu) -> bool:
    """Whether the number at the end of `word` is about the memory of `gpu` in GB."""
    return abs(int(word.rpartition("-")[2]) - gpu.memory_bytes / 1e9) <= 0.1 * gpu.memory_gib


def _trainable() -> Iterator[str]:
    return (name for name, gpu in GPUS.items() if gpu.problem is None)
