"""Base weights → quantized model with LoRA: what is quantized, what LoRA covers, which GPUs are served."""

import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_base

from tuner.errors import ConfigError
from tuner.presets import find_preset
from tuner.training_config import ConfigSource, resolve_training_config
from tuner.training_settings import TrainingConfig

pytestmark = pytest.mark.train

PHI_3 = "phi-3-mini-4k-instruct"
# One for each class in transformers that a preset has.
ARCHITECTURES = (PHI_3, "phi-4-mini-instruct", "mistral-7b", "qwen2.5-coder-7b-instruct", "qwen3-0.6b", "gemma-3-1b-it")
KAITOS_TARGETS = "[k_proj, q_proj, v_proj, o_proj, gate_proj, down_proj, up_proj]"


def configured(yaml: str = "", *, method: Any = "qlora", preset: str = PHI_3) -> TrainingConfig:
    source = ConfigSource(f"training_config:\n{yaml}", "training_config.yaml") if yaml else None
    return resolve_training_config(method=method, preset=find_preset(preset), config_map=source)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from tuner.pipeline.libraries import quiet

    quiet()


def load(training: TrainingConfig, preset: str = PHI_3, device: Any = None) -> Any:
    from tuner.pipeline.model import load_base_model, pick_device

    return load_base_model(tiny_base(preset), training, device or pick_device())


def gpu(capability: tuple[int, int]) -> Any:
    """A GPU as pick_device describes it; nothing is put on it."""
    import torch

    from tuner.pipeline.model import Device

    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    return Device(torch.device("cuda", 0), dtype, "a GPU")


# ── quantization ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_qlora_quantizes_every_linear_layer_of_the_blocks_to_nf4_with_double_quantization() -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    from tuner.pipeline.model import linear_layers

    model = load(configured())
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == sum(linear_layers(model).values()) == 8
    for module in quantized:
        assert module.weight.quant_state.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.compute_dtype is torch.float32  # what a CPU has
        assert not module.weight.requires_grad
    assert not isinstance(model.lm_head, Linear4bit)


def test_what_the_config_says_of_quantization_is_done() -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    model = load(
        configured(
            "  QuantizationConfig: {load_in_4bit: true, bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: false,"
            " bnb_4bit_compute_dtype: bfloat16}"
        )
    )
    module = next(module for module in model.modules() if isinstance(module, Linear4bit))
    assert module.weight.quant_state.quant_type == "fp4"
    assert not module.weight.quant_state.nested
    assert module.compute_dtype is torch.bfloat16


def test_method_lora_quantizes_nothing() -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from tuner.pipeline.model import pick_device, quantization_config

    training = configured(method="lora")
    assert quantization_config(training, pick_device()) is None
    assert not any(isinstance(module, (Linear4bit, Linear8bitLt)) for module in load(training).modules())


def test_norms_and_embeddings_keep_the_type_of_the_model() -> None:
    """KAITO trains with an fp32 residual stream: prepare_model_for_kbit_training casts all that is not quantized."""
    import torch

    from tuner.pipeline.model import Device, attach_lora

    half = Device(torch.device("cpu"), torch.bfloat16, "as on a GPU")
    model, _, _ = attach_lora(load(configured(), device=half), configured())
    others = {name: p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    assert others
    assert set(others.values()) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")])
def test_a_gpu_without_bf16_gets_fp16_even_where_kaitos_template_says_bf16(
    capability: tuple[int, int], name: str
) -> None:
    import torch

    from tuner.pipeline.model import base_dtype, quantization_config

    kaitos = configured(
        "  ModelConfig: {torch_dtype: bfloat16}\n"
        "  QuantizationConfig: {load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}"
    )
    for training in (configured(), kaitos):
        assert base_dtype(training, gpu(capability)) is getattr(torch, name)
        quantization = quantization_config(training, gpu(capability))
        assert quantization is not None
        assert quantization.bnb_4bit_compute_dtype is getattr(torch, name)


def test_what_the_user_wrote_of_types_is_kept_where_the_gpu_has_it() -> None:
    import torch

    from tuner.pipeline.model import base_dtype

    assert base_dtype(configured("  ModelConfig: {dtype: float32}"), gpu((9, 0))) is torch.float32
    assert base_dtype(configured("  ModelConfig: {dtype: auto}"), gpu((9, 0))) is torch.bfloat16


def test_gradients_are_the_same_before_and_after_an_evaluation() -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs, for an operation without backward."""
    import torch

    from tuner.pipeline.model import attach_lora

    torch.manual_seed(0)
    model, _, _ = attach_lora(load(configured()), configured())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(3, 43).reshape(2, 20)

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(before) == 16
    assert all(bool(gradient.any()) for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


# ── what LoRA covers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("preset", ARCHITECTURES)
@pytest.mark.parametrize(
    "targets", ["", f"  LoraConfig: {{target_modules: {KAITOS_TARGETS}}}"], ids=["ours", "KAITO's"]
)
def test_lora_covers_every_linear_layer_of_the_block_on_every_architecture(preset: str, targets: str) -> None:
    """KAITO faults 1 and 2: phi-3 got adapters on two of four layers, phi-4-mini and qwen an error."""
    from tuner.pipeline.model import attach_lora

    training = configured(targets, preset=preset)
    _, coverage, renamed = attach_lora(load(training, preset), training)
    assert coverage.modules == dict.fromkeys(find_preset(preset).linear_modules, 2)
    assert not coverage.uncovered
    assert bool(renamed) == (bool(targets) and "phi" in preset)


def test_kaitos_module_names_are_the_fused_ones_of_phi_3() -> None:
    """KAITO's "optimized" example (q, k, v, o) adapted o_proj only."""
    from tuner.pipeline.model import attach_lora

    training = configured("  LoraConfig: {target_modules: [q_proj, k_proj, v_proj, o_proj]}")
    _, coverage, renamed = attach_lora(load(training), training)
    assert coverage.modules == {"qkv_proj": 2, "o_proj": 2}
    assert coverage.uncovered == {"gate_up_proj": 2, "down_proj": 2}
    assert renamed == dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")


@pytest.mark.parametrize("written", ['"all-linear"', "[all-linear]"])
def test_all_linear_means_all_linear(written: str) -> None:
    """KAITO fault 3: it became a module name that is not there."""
    from tuner.pipeline.model import attach_lora

    training = configured(f"  LoraConfig: {{target_modules: {written}}}")
    _, coverage, _ = attach_lora(load(training), training)
    assert not coverage.uncovered


def test_a_module_that_is_not_there_is_an_error_that_lists_what_is() -> None:
    from tuner.pipeline.model import attach_lora

    training = configured("  LoraConfig: {target_modules: [o_proj, down_porj]}", preset="somebody/some-model")
    with pytest.raises(ConfigError, match=r"no down_porj in Phi3ForCausalLM.*qkv_proj.*gate_up_proj") as caught:
        attach_lora(load(training), training)
    assert caught.value.hint == 'did you mean "down_proj"?'


def test_layers_left_out_are_counted_as_not_covered() -> None:
    from tuner.pipeline.model import attach_lora

    training = configured("  LoraConfig: {layers_to_transform: [0]}")
    _, coverage, _ = attach_lora(load(training), training)
    assert set(coverage.modules.values()) == set(coverage.uncovered.values()) == {1}


def test_coverage_counts_parameters_and_says_them() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tuner.pipeline.model import attach_lora

    training = configured("  LoraConfig: {r: 4}")
    model, coverage, _ = attach_lora(load(training), training)
    full = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32)
    linear = [m for n, m in full.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert coverage.trainable_parameters == sum(4 * (m.in_features + m.out_features) for m in linear)
    base = sum(parameter.numel() for parameter in full.parameters())
    assert coverage.total_parameters == base + coverage.trainable_parameters
    share = 100 * coverage.trainable_parameters / coverage.total_parameters
    assert re.fullmatch(
        rf"LoRA on .*qkv_proj ×2.*: {coverage.trainable_parameters:,} of .* parameters \({share:.2f} %\)", str(coverage)
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    "section",
    ["{init_lora_weights: nonsense}", "{layers_pattern: layers, layers_to_transform: null}", "{bias: lora_onl}"],
)
def test_what_peft_refuses_is_one_sentence(section: str) -> None:
    from tuner.pipeline.model import attach_lora

    def attach() -> None:
        training = configured(f"  LoraConfig: {section}")
        attach_lora(load(training), training)

    with pytest.raises(ConfigError, match=r"LoraConfig") as caught:
        attach()
    assert "\n" not in caught.value.message


def test_the_experts_of_a_mixture_are_named_when_lora_leaves_them_out(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tuner.pipeline.model import attach_lora

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=2, **sizes))
    _, coverage, _ = attach_lora(model, configured(method="lora", preset="somebody/some-model"))
    assert {"gate_up_proj", "down_proj"} <= set(coverage.uncovered)


# ── which GPUs ───────────────────────────────────────────────────────────────────────────────────────────────────────

TODAYS_WHEELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "is_served"),
    [
        ((7, 0), TODAYS_WHEELS, False),  # the quick start's V100
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_75"], True),
        ((7, 5), TODAYS_WHEELS, True),
        ((8, 9), TODAYS_WHEELS, True),  # a binary for 8.0 runs on 8.9
        ((8, 0), ["sm_86"], False),  # but none for 8.6 on 8.0
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["sm_80"], False),  # nor one of another major version
        ((9, 0), ["compute_80"], True),  # PTX is compiled for whatever is newer
        ((7, 0), ["compute_80"], False),
        ((10, 0), ["sm_100f"], True),
        ((12, 1), TODAYS_WHEELS, True),
        ((9, 0), ["gfx942"], False),
        ((9, 0), [], False),
    ],
)
def test_a_gpu_is_served_when_torch_has_kernels_for_it(
    capability: tuple[int, int], architectures: list[str], is_served: bool
) -> None:
    from tuner.pipeline.model import kernel_problem

    problem = kernel_problem("Tesla V100", capability, architectures)
    assert (problem is None) == is_served
    if problem:
        assert f"{capability[0]}.{capability[1]}" in problem
        assert "Tesla V100" in problem


# ── what lies in memory in which precision ───────────────────────────────────────────────────────────────────────────


def moe_in(directory: Path, *, tied: bool = False) -> Path:
    """A tiny mixture of experts: transformers keeps those of a layer in two tensors, which bitsandbytes passes over."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_weights_are_counted_as_they_lie_in_memory_and_not_as_asked_for(tmp_path: Path) -> None:
    from tuner.pipeline.model import count_weights, load_base_model, pick_device

    directory = moe_in(tmp_path / "moe")
    counted = count_weights(load_base_model(directory, configured(), pick_device()))
    weights = counted.weights
    assert (counted.quant_type, counted.double_quant, counted.compute_dtype) == ("nf4", True, "float32")
    assert {precision: count.tensors for precision, count in weights["linear"].items()} == {"nf4": 8}
    assert weights["linear"]["nf4"].parameters == 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64)
    assert weights["experts"]["float32"].parameters == 2 * 4 * (2 * 64 * 64 + 64 * 64)
    assert set(weights["experts"]) == {"float32"}
    assert weights["head"]["float32"].parameters == weights["embeddings"]["float32"].parameters == 512 * 64
    assert str(counted).startswith("24,576 of ")


def test_a_head_that_is_the_embeddings_is_counted_once(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tuner.pipeline.model import count_weights

    model = AutoModelForCausalLM.from_pretrained(moe_in(tmp_path / "moe", tied=True), dtype=torch.bfloat16)
    counted = count_weights(model)
    assert "head" not in counted.weights
    assert counted.quant_type is None
    assert counted.precision == counted.compute_dtype == "bfloat16"
    total = sum(count.parameters for kinds in counted.weights.values() for count in kinds.values())
    assert total == sum(parameter.numel() for parameter in model.parameters())


def test_a_tensor_of_experts_that_is_quantized_by_itself_is_counted_as_such(tmp_path: Path) -> None:
    """How bitsandbytes 0.49 quantizes what is no layer of its own; transformers does not ask for it yet."""
    import torch
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers import AutoModelForCausalLM

    from tuner.pipeline.model import count_weights

    model = AutoModelForCausalLM.from_pretrained(moe_in(tmp_path / "moe"), dtype=torch.bfloat16)
    before = count_weights(model).weights["experts"]["bfloat16"].parameters
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
    experts = count_weights(model).weights["experts"]
    assert {precision: count.parameters for precision, count in experts.items()} == {"nf4": before}


# ── the base in 16 bits ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_base_in_16_bits_is_the_checkpoint_s_own(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tuner.pipeline.model import load_sixteen_bit_base, pick_device

    directory = moe_in(tmp_path / "moe")
    model = load_sixteen_bit_base(directory, pick_device())
    own = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)


@pytest.fixture
def copies_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device for where there is no GPU: what is put on the CPU is a copy that comes and goes all the same."""
    import torch

    device, to = torch.device("cpu"), torch.Tensor.to

    def copied(tensor: Any, *arguments: Any, **options: Any) -> Any:
        return tensor.clone() if arguments == (device,) else to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    return device


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_blocks_that_come_to_the_device_one_at_a_time_compute_the_same_with_any_adapter(
    kind: dict[str, Any], tmp_path: Path, copies_to_the_cpu: Any
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tuner.pipeline.model import put_adapter, stream_blocks

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_base("qwen2.5-coder-7b-instruct"), dtype=torch.bfloat16)

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(3, 40)[None]).logits

    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["o_proj", "down_proj"], init_lora_weights=False, **kind)
    get_peft_model(base(), lora).save_pretrained(tmp_path / "adapter")
    expected = logits(put_adapter(base(), tmp_path / "adapter", "it"))

    streamed = base()
    stream_blocks(streamed, copies_to_the_cpu)
    tuned = put_adapter(streamed, tmp_path / "adapter", "it")
    at_rest = [(tensor, tensor.data_ptr()) for tensor in tuned.parameters()]
    layers = tuned.get_base_model().model.layers
    away: list[int] = []
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(
            lambda *_: away.append(sum(tensor.data_ptr() != lying for tensor, lying in at_rest))
        )
    assert torch.equal(logits(tuned), expected)
    assert away == [len(list(layer.parameters())) for layer in layers]  # one block's, its adapter with it
    assert all(tensor.data_ptr() == lying for tensor, lying in at_rest)


def test_a_block_that_fails_is_taken_back_too(copies_to_the_cpu: Any) -> None:
    import torch
    from torch import nn

    from tuner.pipeline.model import stream_blocks

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Any) -> Any:
            raise RuntimeError("no")

    model = nn.Module()
    model.blocks = nn.ModuleList([Failing()])
    lying = model.blocks[0].weight.data_ptr()
    stream_blocks(model, copies_to_the_cpu)
    with pytest.raises(RuntimeError, match="no"):
        model.blocks[0](1)
    assert model.blocks[0].weight.data_ptr() == lying


def test_weights_that_are_converted_must_fit_the_memory_and_mapped_ones_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that kills the process would do so again each time that the run goes on."""
    import torch
    from transformers import AutoModelForCausalLM

    from tuner.pipeline import model as module

    monkeypatch.setattr(module, "free_host_bytes", lambda: 1000)
    device = module.pick_device()
    with pytest.raises(ConfigError, match="weights in 16 bits do not fit this machine's memory"):
        module.load_sixteen_bit_base(tiny_base(), device)  # fp32
    AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert module.load_sixteen_bit_base(tmp_path / "bf16", device).dtype == torch.bfloat16


def test_there_is_memory_left_here() -> None:
    from tuner.pipeline.model import free_host_bytes

    assert 0 < free_host_bytes() < 1 << 50
