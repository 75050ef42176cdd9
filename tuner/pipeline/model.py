"""Base weights → quantized model with LoRA, and what LoRA covers."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tuner.errors import ConfigError, DataError, did_you_mean
from tuner.pipeline.kernels import DOCUMENT_ATTENTION
from tuner.pipeline.launch import rank
from tuner.training_config import HEAD_AND_EMBEDDINGS, OUTSIDE_BLOCKS, resolve_target_modules
from tuner.training_settings import TrainingConfig


@dataclass(frozen=True)
class Device:
    """Where the model computes and in which type: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU."""

    device: torch.device
    dtype: torch.dtype
    name: str

    @property
    def is_cuda(self) -> bool:
        return bool(self.device.type == "cuda")


def gpu_count() -> int:
    """How many GPUs this process may use; 0 where there is none."""
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def pick_device() -> Device:
    """This process's GPU, or the CPU. Raises ConfigError for a GPU that the installed torch has no kernels for."""
    if not torch.cuda.is_available():
        return Device(torch.device("cpu"), torch.float32, "CPU")
    number = rank()
    torch.cuda.set_device(number)
    capability = torch.cuda.get_device_capability(number)
    name = torch.cuda.get_device_name(number)
    problem = kernel_problem(name, capability, torch.cuda.get_arch_list())
    if problem:
        raise ConfigError(
            problem, hint="install a torch built for it (torch 2.7 with CUDA 12.6 has sm_70), or another GPU"
        )
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    return Device(torch.device("cuda", number), dtype, name)


def kernel_problem(name: str, capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Why torch cannot run on a GPU, or None. `architectures` as torch.cuda.get_arch_list(): sm_80, compute_90.

    An sm_XY binary runs on the same major version with an equal or higher minor; compute_XY is PTX, compiled for any
    newer GPU. https://docs.nvidia.com/cuda/cuda-compiler-driver-nvcc/#gpu-compilation
    """
    major, minor = capability
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if not found:
            continue
        built = (int(found[2]), int(found[3]))
        if (built[0] == major and built[1] <= minor) or (found[1] == "compute" and built <= capability):
            return None
    return (
        f"{name} has compute capability {major}.{minor}, and torch {torch.__version__} has no kernels for it "
        f"(it has {', '.join(architectures) or 'none'})"
    )


def _dtype(name: Any) -> torch.dtype:
    """torch.bfloat16 for "bfloat16" or "torch.bfloat16"."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{name!r} is no torch dtype", hint="bfloat16, float16 or float32")
    return dtype


def quantization_config(training: TrainingConfig, device: Device) -> BitsAndBytesConfig | None:
    """What bitsandbytes is asked for, or None for method lora. An unwritten compute type follows the device."""
    if training.quantization.bits == 16:
        return None
    keywords = training.quantization.keywords()
    for key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if key in keywords:
            keywords[key] = _dtype(keywords[key])
    compute_dtype = keywords.get("bnb_4bit_compute_dtype")
    if compute_dtype is None or _lacks(device, compute_dtype):
        keywords["bnb_4bit_compute_dtype"] = device.dtype
    try:
        return BitsAndBytesConfig(**keywords)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"QuantizationConfig: {error}") from error


def _lacks(device: Device, dtype: torch.dtype) -> bool:
    """Whether it is a GPU without bf16, asked for bf16."""
    return device.is_cuda and dtype is torch.bfloat16 and device.dtype is not torch.bfloat16


def base_dtype(training: TrainingConfig, device: Device) -> torch.dtype:
    """ModelConfig.dtype where the user wrote one that the device has, else the device's own."""
    written = training.model.dtype
    if written is None or not device.is_cuda:  # half precision on a CPU is slow and, for some kernels, missing
        return device.dtype
    return device.dtype if _lacks(device, _dtype(written)) else _dtype(written)


def load_base_model(
    directory: Path, training: TrainingConfig, device: Device, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a local directory, quantized as the config says, frozen, on the device.

    peft's prepare_model_for_kbit_training is not called: it turns norms, embeddings and so the whole residual stream
    to fp32, which doubles the memory traffic of everything that is not a GEMM.
    """

    def load(attention: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            directory,
            quantization_config=quantization_config(training, device),
            dtype=base_dtype(training, device),
            device_map={"": device.device},
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )

    try:
        model = load(DOCUMENT_ATTENTION)
    except ValueError:  # an architecture that takes no attention but its own
        model = load("sdpa")
    model.requires_grad_(False)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16 the first evaluation would repack the weights for an inference kernel that has
            # no backward: every gradient after it would miss what flows through the base, without an error.
            module.support_avx512bf16_for_cpu = False
    return model


@dataclass(frozen=True)
class Coverage:
    """What LoRA adapts. `modules`: module name → in how many layers; `uncovered`: linear layers it leaves out."""

    modules: Mapping[str, int]
    uncovered: Mapping[str, int]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.total_parameters
        names = ", ".join(f"{name} ×{count}" for name, count in self.modules.items())
        left = f"; not covered: {', '.join(self.uncovered)}" if self.uncovered else ""
        count = f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2f} %)"
        return f"LoRA on {names}: {count}{left}"


def linear_layers(model: nn.Module) -> dict[str, int]:
    """Name → count of the linear layers in the model's blocks: all but the output head and what stands alone."""
    names = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    )
    if not names:
        raise ConfigError(f"{type(model).__name__} has no linear layers in its blocks: LoRA has nothing to adapt")
    return dict(names)


def _fused_experts(model: nn.Module) -> dict[str, int]:
    """Name → count of the weights of many experts in one tensor, which are linear layers in all but their class."""
    return dict(
        Counter(
            name.rpartition(".")[2]
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 and re.search(r"\.\d+\.", name)
        )
    )


def attach_lora(model: PreTrainedModel, training: TrainingConfig) -> tuple[PeftModel, Coverage, dict[str, str]]:
    """The model with adapters in fp32, what they cover, and which requested names were mapped to fused ones.

    Raises ConfigError, listing what is there, when a requested module is nowhere in the model.
    """
    layers = linear_layers(model)
    targets = resolve_target_modules(training.lora.target_modules, tuple(layers))
    if targets.unmatched:
        hints = [hint for name in targets.unmatched if (hint := did_you_mean(name, layers))]
        hints += [OUTSIDE_BLOCKS for name in targets.unmatched if name in HEAD_AND_EMBEDDINGS]
        raise ConfigError(
            f"LoraConfig.target_modules: no {', '.join(targets.unmatched)} in {type(model).__name__}; "
            f"its linear layers are {', '.join(layers)}",
            hint=hints[0] if hints else 'leave target_modules out, or write "all-linear"',
        )
    _check_modules_to_save(model, training.lora.modules_to_save or ())
    experts = _fused_experts(model)
    try:
        keywords = training.lora.keywords() | {"target_modules": sorted(targets.modules), "task_type": "CAUSAL_LM"}
        config = LoraConfig(**keywords)
        adapted: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"LoraConfig: {' '.join(str(error).split())}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # Counted on the model itself: layers_to_transform and exclude_modules leave some out.
    found = Counter(
        name.rpartition(".")[2] for name, module in adapted.named_modules() if isinstance(module, LoraLayer)
    )
    covered = {name: found[name] for name in layers if found[name]}
    uncovered = {name: count - found[name] for name, count in layers.items() if count > found[name]} | experts
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return adapted, Coverage(covered, uncovered, trainable, _parameter_count(adapted)), dict(targets.renamed)


def _check_modules_to_save(model: PreTrainedModel, names: Sequence[str]) -> None:
    """PEFT passes over a name that is nowhere, trains one of two modules that share a matrix, and has no words for
    weights without gradients."""
    there = dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules() if name)
    for name in names:
        if name not in there:
            raise ConfigError(
                f"LoraConfig.modules_to_save: no {name!r} in {type(model).__name__}", hint=did_you_mean(name, there)
            )
        if any(
            not parameter.is_floating_point()
            for path, module in model.named_modules()
            if path.rpartition(".")[2] == name
            for parameter in module.parameters()
        ):
            raise ConfigError(
                f"LoraConfig.modules_to_save: the weights of {name} are quantized, so they cannot be trained whole",
                hint="leave it out: LoRA trains it; method lora keeps the base in 16 bits",
            )
        if name in HEAD_AND_EMBEDDINGS and model.config.get_text_config().tie_word_embeddings:
            raise ConfigError(
                f"LoraConfig.modules_to_save: {name} shares its matrix in this model "
                f"({' and '.join(HEAD_AND_EMBEDDINGS)} are one), so it cannot be trained alone",
                hint="leave it out, or raise LoraConfig.r",
            )


def _parameter_count(model: nn.Module) -> int:
    """All parameters; a 4-bit weight holds two in a byte, so its own shape is counted."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return total


def load_adapter(base: Path, adapter: Path) -> PeftModel:
    """The adapter on its base, as somebody would serve it. Raises DataError when PEFT cannot put it there."""
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return PeftModel.from_pretrained(model, adapter)
        except (ValueError, TypeError, RuntimeError, KeyError, UserWarning) as error:
            sentence = " ".join(str(error).split())
            raise DataError(f"PEFT cannot load the adapter on {base}: {sentence[:300]}") from error
