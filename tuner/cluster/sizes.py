"""RunSpec + GPUs → what the pod asks its node for. Requests are what a run needs, limits what it must not pass.

Weights are the preset's own figure, checkpoints follow from the adapter's size (tuner/memory.py). What cannot be known
before a download (the data, a model that is no preset) is an allowance, named as such.
"""

import math
from dataclasses import dataclass

from tuner.errors import ConfigError
from tuner.memory import ADAMW_STATE_BYTES, GIB, OPTIMIZER_STATE_BYTES, adapter_parameters, read_shape
from tuner.plan import read_setup
from tuner.runspec import ImageModel, RunSpec

CHECKPOINTS = 2  # kept at a time: the last and, until it is whole, the one before
DATA_GIB, DATA_LIMIT_GIB = 8, 64  # allowances: nobody knows before the fetch
UNKNOWN_WEIGHTS_GIB = 30  # of a model that is no preset: 14 billion parameters in 16 bit
TMP_GIB, TMP_LIMIT_GIB = 2, 8  # kernels as they are compiled, caches of libraries; a compressed file that is unpacked
# Of one process on one GPU: Python, torch and CUDA's own memory on the host.
_PROCESS_GIB, _PROCESS_LIMIT_GIB = 6, 14
_CPUS_FOR_A_GPU = 2  # what is left of the smallest instance types with one GPU
_SHM_GIB_FOR_A_GPU = 4  # NCCL between GPUs, workers that load data


@dataclass(frozen=True)
class Sizes:
    """Whole GiB, but for CPUs. `weights_limit_gib` is None where the weights' size is not known."""

    gpus: int
    cpus: int
    memory_gib: int
    memory_limit_gib: int
    shm_gib: int
    weights_gib: int
    weights_limit_gib: int | None
    data_gib: int
    data_limit_gib: int
    results_gib: int
    results_limit_gib: int
    tmp_gib: int = TMP_GIB
    tmp_limit_gib: int = TMP_LIMIT_GIB


def read_sizes(spec: RunSpec, gpus: int) -> Sizes:
    """What this run asks for on `gpus` GPUs; none is a smoke run's."""
    if spec.smoke:
        return Sizes(0, 1, 2, 8, 1, 0, 1, 1, DATA_LIMIT_GIB, 1, 4 + DATA_LIMIT_GIB, tmp_gib=1)
    known = spec.preset.weights_gib
    weights = known or UNKNOWN_WEIGHTS_GIB
    copies = 2 if isinstance(spec.base_model, ImageModel) else 1  # the image's layers, and what is in them
    results = math.ceil(CHECKPOINTS * checkpoint_bytes(spec, gpus) / GIB) + 2
    # The weights are read through the page cache, which is reclaimed where it must be; half of it keeps that quick.
    memory = _PROCESS_GIB * gpus + math.ceil(weights / 2)
    return Sizes(
        gpus=gpus,
        cpus=_CPUS_FOR_A_GPU * gpus,
        memory_gib=memory,
        memory_limit_gib=max(2 * memory, _PROCESS_LIMIT_GIB * gpus + math.ceil(2 * weights)),
        shm_gib=_SHM_GIB_FOR_A_GPU * gpus,
        weights_gib=math.ceil(copies * weights) + 1,
        weights_limit_gib=math.ceil((copies + 0.5) * weights) + 2 if known else None,
        data_gib=DATA_GIB,
        data_limit_gib=DATA_LIMIT_GIB,
        results_gib=results,
        results_limit_gib=4 * results + DATA_LIMIT_GIB,  # token ids take about as much as the data
    )


def checkpoint_bytes(spec: RunSpec, gpus: int) -> int:
    """One recovery checkpoint: adapters in fp32 and the optimizer's state. 1 GiB for a model of unknown dimensions."""
    try:
        shape = read_shape(spec.preset.name, spec.preset.config)
        setup = read_setup(spec.preset, spec.training, shape, gpus)
    except ConfigError:
        return GIB
    state = OPTIMIZER_STATE_BYTES.get(setup.optimizer, ADAMW_STATE_BYTES)
    return math.ceil(adapter_parameters(shape, setup) * (4 + state))
