"""Base weights → quantized model with LoRA, and what LoRA covers; the same base in 16 bits, as others serve it."""

import gc
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuner.content import model_files
from tuner.errors import ConfigError, DataError, did_you_mean
from tuner.pipeline.kernels import DOCUMENT_ATTENTION
from tuner.pipeline.launch import rank
from tuner.records import Quantization, WeightCount, WeightKind
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
    directory: Path,
    training: TrainingConfig,
    device: Device,
    *,
    trust_remote_code: bool = False,
    attention: str | None = DOCUMENT_ATTENTION,
) -> PreTrainedModel:
    """The model of a local directory, quantized as the config says, frozen, on the device.

    `attention` None is transformers' own choice. peft's prepare_model_for_kbit_training is not called: it turns norms,
    embeddings and so the whole residual stream to fp32, which doubles the memory traffic of all that is not a GEMM.
    """

    def load(attention: str | None) -> PreTrainedModel:
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
        model = load(attention)
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


# ── the base in 16 bits ──────────────────────────────────────────────────────────────────────────────────────────────

_SPARE_BYTES = 2 << 30  # beside the weights, for what a few hundred tokens need


def load_sixteen_bit_base(
    directory: Path, device: Device, *, trust_remote_code: bool = False, spare_bytes: int = _SPARE_BYTES
) -> PreTrainedModel:
    """The base as KAITO and vLLM serve it, to be looked at without gradients: nothing is quantized, bf16, or fp16 on a
    GPU without that.

    Where the GPU's free memory does not hold it with `spare_bytes` beside, each block is there only while it computes,
    and its weights stay in the checkpoint's file, mapped into memory. On a CPU the kernel does as much with its pages.
    PEFT puts an adapter on it as on any model; accelerate's offload to disk would leave weights on "meta", where PEFT
    0.21 loses LoRA's without a word. Raises ConfigError when weights must be converted as they are read, and the
    machine's memory does not hold them.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    dtype = device.dtype if device.is_cuda else torch.bfloat16
    weights_bytes = sum(path.stat().st_size for path in model_files(directory) if path.suffix == ".safetensors")
    need = weights_bytes // (2 if config.dtype == torch.float32 else 1)
    fits = device.is_cuda and need + spare_bytes <= torch.cuda.mem_get_info(device.device)[0]
    if not fits:
        _check_host_memory(config, dtype, need)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": device.device if fits else torch.device("cpu")},
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    model.requires_grad_(False)
    if device.is_cuda and not fits:
        stream_blocks(model, device.device)
    return model


def _check_host_memory(config: PretrainedConfig, dtype: torch.dtype, need: int) -> None:
    """What is in the file as it is to be in memory takes none: its pages can be read again."""
    text = config.get_text_config().to_dict()
    is_mapped = config.dtype == dtype and not any("expert" in key for key in text)  # experts are joined as they load
    if not is_mapped and need + _SPARE_BYTES > free_host_bytes():
        raise ConfigError(f"{need / 2**30:.1f} GiB of weights in 16 bits do not fit this machine's memory")


def free_host_bytes() -> int:
    """How much memory can be taken before the kernel kills somebody: of the machine, or to its container's limit."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")  # https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:  # no limit, or cgroup v1
        return free
    return free if limit == "max" else min(free, int(limit) - int(used) + int(counts["inactive_file"]))


def stream_blocks(model: nn.Module, device: torch.device) -> None:
    """Put all but the model's blocks on the device, and each block there only while it computes."""
    blocks = _outermost_blocks(model)
    streamed = {id(tensor) for block in blocks for tensor in _tensors(block)}
    for tensor in _tensors(model):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        _Streamed(block, device)


def _outermost_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of module lists; of a list in such a member none, as it comes with it."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in found):
            found |= {f"{path}.{name}": block for name, block in module.named_children()}
    return list(found.values())


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _Streamed:
    """One block's hooks: an adapter that was put on it meanwhile comes along."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._device = device
        self._at_rest: list[tuple[torch.Tensor, torch.Tensor]] = []
        block.register_forward_pre_hook(self._load)
        block.register_forward_hook(self._unload, always_call=True)

    def _load(self, block: nn.Module, _arguments: Any) -> None:
        self._at_rest = [(tensor, tensor.data) for tensor in _tensors(block)]
        for tensor, data in self._at_rest:
            tensor.data = data.to(self._device)

    def _unload(self, _block: nn.Module, _arguments: Any, _result: Any) -> None:
        for tensor, data in self._at_rest:
            tensor.data = data
        self._at_rest = []


def free_gpu_memory() -> None:
    """Give back what models that nobody names any more had there: they are full of cycles. On a CPU it is not worth the
    third of a second that looking for them takes: training needed more than the next model does."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


# ── what lies in memory in which precision ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Weight:
    kind: WeightKind
    precision: str
    parameters: int
    quantized: bool
    double_quant: bool
    computed_in: torch.dtype


def count_weights(model: PreTrainedModel) -> Quantization:
    """How many of the loaded model's weights are in which precision. What was asked for is not looked at: bitsandbytes
    quantizes linear layers, and the experts of a mixture may be none."""
    weights = list(_weights(model))
    counts: dict[WeightKind, dict[str, WeightCount]] = {}
    for weight in weights:
        of_kind = counts.setdefault(weight.kind, {})
        known = of_kind.get(weight.precision, WeightCount(tensors=0, parameters=0))
        of_kind[weight.precision] = WeightCount(
            tensors=known.tensors + 1, parameters=known.parameters + weight.parameters
        )
    quantized = [weight for weight in weights if weight.quantized]
    matter = quantized or [weight for weight in weights if weight.kind in ("linear", "experts")] or weights
    largest = max(matter, key=lambda weight: weight.parameters)
    return Quantization(
        quant_type=largest.precision if quantized else None,
        double_quant=any(weight.double_quant for weight in quantized),
        compute_dtype=_dtype_name(largest.computed_in),
        weights=counts,
    )


def _weights(model: PreTrainedModel) -> Iterator[_Weight]:
    """Every parameter, once: a head that is the embeddings is none of its own."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # Where a single tensor is quantized it is a parametrization of its module.
            quantizer = module[0] if isinstance(module, ParametrizationList) else parameter
            state = getattr(quantizer, "quant_state", None)
            shape = state.shape if state is not None else parameter.shape
            is_linear = name == "weight" and isinstance(module, nn.Linear | Conv1D)
            is_many = len(shape) == 3 and not isinstance(module, nn.Conv1d)
            kind: WeightKind = "other"
            if module is embeddings:
                kind = "embeddings"
            elif module is head and is_linear:
                kind = "head"
            elif re.search(r"\.\d+\.", path) and (is_linear or is_many):
                kind = "experts" if is_many or ".experts." in path else "linear"
            computed_in = parameter.dtype
            precision = _dtype_name(parameter.dtype)
            if state is not None:
                precision, computed_in = str(state.quant_type), getattr(module, "compute_dtype", None) or state.dtype
            elif isinstance(parameter, Int8Params):
                precision, computed_in = "int8", model.dtype
            yield _Weight(
                kind=kind,
                precision=precision,
                parameters=shape.numel(),
                quantized=state is not None or precision == "int8",
                double_quant=state is not None and bool(state.nested),
                computed_in=computed_in,
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Coverage:
    """What LoRA adapts. `modules`: module name → in how many layers; `uncovered`: linear layers it leaves out;
    `quantization`: of the base below it."""

    modules: Mapping[str, int]
    uncovered: Mapping[str, int]
    trainable_parameters: int
    total_parameters: int
    quantization: Quantization

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
    experts, quantization = _fused_experts(model), count_weights(model)
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
    coverage = Coverage(covered, uncovered, trainable, _parameter_count(adapted), quantization)
    return adapted, coverage, dict(targets.renamed)


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
    return put_adapter(AutoModelForCausalLM.from_pretrained(base, local_files_only=True), adapter, str(base))


def put_adapter(model: PreTrainedModel, adapter: Path, shown: str) -> PeftModel:
    """The model with the adapter of a directory. `shown` is the model's name for the DataError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return PeftModel.from_pretrained(model, adapter)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError, KeyError, UserWarning) as error:
            sentence = " ".join(str(error).split())
            raise DataError(f"PEFT cannot load the adapter on {shown}: {sentence[:300]}") from error
