"""GPUs are found without torch, wherever a driver shows them."""

from pathlib import Path

import pytest

from tuner.gpus import visible_gpus


def box(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def nvidia_smi(root: Path, *lines: str, code: int = 0) -> None:
    program = box(root, "usr/lib/wsl/lib/nvidia-smi") / "usr/lib/wsl/lib/nvidia-smi"
    said = "".join(f"echo '{line}'\n" for line in lines)
    program.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 2\n{said}exit {code}\n')
    program.chmod(0o755)


def test_a_machine_without_a_gpu_has_none(tmp_path: Path) -> None:
    assert visible_gpus({}, tmp_path) == 0


def test_the_drivers_list_is_believed(tmp_path: Path) -> None:
    box(tmp_path, *(f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information" for number in range(2)))
    assert visible_gpus({}, tmp_path) == 2


def test_where_proc_is_hidden_the_devices_are_counted(tmp_path: Path) -> None:
    box(tmp_path, "dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm")
    assert visible_gpus({}, tmp_path) == 2


def test_under_wsl_nvidia_smi_says_how_many(tmp_path: Path) -> None:
    """Where /proc/driver/nvidia is not: a GPU there used to be taken for none."""
    box(tmp_path, "dev/dxg")
    nvidia_smi(tmp_path, "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)", "GPU 1: NVIDIA GeForce RTX 4090 (UUID: GPU-2)")
    assert visible_gpus({}, tmp_path) == 2


def test_under_wsl_another_makers_gpu_is_none_of_nvidias(tmp_path: Path) -> None:
    assert visible_gpus({}, box(tmp_path, "dev/dxg")) == 0
    nvidia_smi(tmp_path)
    assert visible_gpus({}, tmp_path) == 0


@pytest.mark.parametrize("broken", [False, True])
def test_under_wsl_a_library_without_an_nvidia_smi_that_works_is_one(broken: bool, tmp_path: Path) -> None:
    """As in a container, which may get the library alone."""
    box(tmp_path, "dev/dxg", "usr/lib/x86_64-linux-gnu/libcuda.so.1")
    if broken:
        nvidia_smi(tmp_path, code=9)
    assert visible_gpus({}, tmp_path) == 1


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0", 1),
        ("1, 0", 2),
        ("0,1,2,3,4,5,6,7", 2),
        ("GPU-8932f937,GPU-46abcca1", 2),
        ("MIG-GPU-8932f937/1/2", 1),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("NoDevFiles", 0),
        ("2", 0),
    ],
)
def test_cuda_visible_devices_hides_the_others_as_it_does_from_cuda(visible: str, count: int, tmp_path: Path) -> None:
    box(tmp_path, "proc/driver/nvidia/gpus/a/information", "proc/driver/nvidia/gpus/b/information")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count
