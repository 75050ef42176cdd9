"""Phi-3's blocks without copies of parts give what transformers' own give."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.pipeline import phi3

pytestmark = pytest.mark.train

ROOT = Path(__file__).parent.parent


def parts(rotated: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Heads (7, 20, 24) with room between tokens, angles for `rotated` of 24 numbers, gate and up (7, 2 × 300)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    angles = torch.rand(7, rotated // 2, generator=generator).repeat(1, 2).to(device)
    return {
        "heads": random(7, 25, 24)[:, :20],
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "gate_up": random(7, 600),
        "by_hidden": random(7, 300),
        "total": random(70, 300),
        "left": random(70, 24),
        "right": random(24, 300),
    }


@pytest.mark.parametrize("rotated", [24, 16])
def test_rotated_heads_are_those_of_transformers(rotated: int) -> None:
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    given = parts(rotated)
    heads = given["heads"].clone().requires_grad_()
    turned = heads.transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(turned, turned, given["cos"][None], given["sin"][None])
    expected = expected[0].transpose(0, 1)
    in_place = given["heads"].clone()
    phi3.rotate(in_place, in_place, given["cos"], given["sin"])
    torch.testing.assert_close(in_place, expected.detach())

    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    elsewhere = torch.empty_like(upstream)
    phi3.rotate(upstream, elsewhere, given["cos"], given["sin"], backward=True)
    torch.testing.assert_close(elsewhere, heads.grad)


def test_swiglu_is_silu_of_gate_times_up() -> None:
    given = parts(24)
    gate_up = given["gate_up"].clone().requires_grad_()
    gate, up = gate_up.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(phi3.swiglu(gate_up.detach()), expected.detach())
    expected.backward(given["by_hidden"])
    by_gate_up, again = phi3.swiglu_backward(gate_up.detach(), given["by_hidden"])
    torch.testing.assert_close(by_gate_up, gate_up.grad)
    torch.testing.assert_close(again, expected.detach())


# ── whole models ─────────────────────────────────────────────────────────────────────────────────────────────────────

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a sliding window": ("phi-3-mini-4k-instruct", {"sliding_window": 8}, {}),
    "grouped heads, longrope": ("phi-3-medium-128k-instruct", {}, {}),
    "heads turned in part": ("phi-4-mini-instruct", {}, {}),
    "LoRA on two layers, of other ranks and factors": (
        "phi-4",
        {},
        {
            "target_modules": ["qkv_proj", "down_proj"],
            "rank_pattern": {"qkv_proj": 3},
            "alpha_pattern": {"down_proj": 40},
        },
    ),
    "embeddings that are trained": ("phi-3-mini-4k-instruct", {}, {"modules_to_save": ["embed_tokens"]}),
}


def model_of(kind: str, directory: Path) -> Any:
    """A tiny 4-bit model of this kind with LoRA, B not zero, that trains."""
    from peft import LoraConfig, get_peft_model
    from test_kernels import tiny_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tuner.pipeline.kernels import DOCUMENT_ATTENTION

    preset, changes, lora = KINDS[kind]
    tiny_model(preset, "sdpa", **changes).save_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation=DOCUMENT_ATTENTION,
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see load_base_model
            module.support_avx512bf16_for_cpu = False
    plain = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**(plain | lora)))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("recomputes", [None, False, True], ids=["kept", "recomputed", "recomputed, reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_phi_has_the_loss_and_gradients_of_transformers_blocks(
    kind: str, recomputes: bool | None, tmp_path: Path
) -> None:
    """And again the very same when it is put back; another batch than packed documents goes transformers' way."""
    from test_kernels import documents, packed

    from tuner.pipeline.kernels import LOOPED_ATTENTION, fuse_lora, summed_nll, unfuse_lora

    model = model_of(kind, tmp_path)
    base = model.get_base_model()
    if recomputes is not None:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": recomputes})
    batch = packed(documents(17, 5, 33, 2))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = summed_nll(base, batch)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    plain = gradients()
    assert len(plain) > 5
    fuse_lora(base)
    assert phi3.why_not(base) is None
    phi3.take_parts(base)
    for attention in (None, LOOPED_ATTENTION):
        if attention:
            base.set_attn_implementation(attention)
        joined = gradients()
        assert joined.keys() == plain.keys()
        for name, gradient in plain.items():
            assert (joined[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(summed_nll(base, batch), plain["loss"])
    two_rows = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        joined_logits = base(input_ids=two_rows, use_cache=False).logits
        phi3.give_back(base)
        unfuse_lora(base)
        torch.testing.assert_close(joined_logits, base(input_ids=two_rows, use_cache=False).logits)
    model.train()
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients().items())


# ── the kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────


def kernels_of(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    turned = given["heads"].clone()
    phi3.rotate(turned, turned, given["cos"], given["sin"])
    back, apart = torch.empty_like(turned), torch.empty_like(turned)
    phi3.rotate(turned, back, given["cos"], given["sin"], backward=True)
    heads_first = turned.transpose(0, 1).contiguous().transpose(0, 1)  # as attention by torch leaves a gradient
    phi3.rotate(heads_first, apart, given["cos"], given["sin"], backward=True)
    hidden = phi3.swiglu(given["gate_up"])
    return [turned, back, apart, hidden, *phi3.swiglu_backward(given["gate_up"], given["by_hidden"])]


_INTERPRETED = """
import torch
from test_phi3 import kernels_of, parts
from tuner.pipeline import phi3, triton_kernels

cases = [(given, kernels_of(given)) for given in (parts(24), parts(16))]
for name in ("rotate", "swiglu", "swiglu_backward"):
    setattr(phi3, name, getattr(triton_kernels, name))
for given, expected in cases:
    for one, other in zip(kernels_of(given), expected, strict=True):
        torch.testing.assert_close(one, other)
total, left, right = given["total"], given["left"], given["right"]
for by in (right, right.t().contiguous().t()):
    added = total.clone()
    triton_kernels.add_low_rank(added, left, by, 0.5)
    torch.testing.assert_close(added, total + 0.5 * left @ right)
print("agree")
"""


def interpreted(program: str) -> str:
    """What a program prints with Triton's interpreter instead of its compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert not found.returncode, found.stderr[-3000:]
    return found.stdout.strip()


def test_the_kernels_agree_in_tritons_interpreter() -> None:
    assert interpreted(_INTERPRETED) == "agree"


_TRIED_ONCE = """
import torch
from tuner.pipeline import kernels, triton_kernels

right_one = triton_kernels.add_low_rank

def wrong_for_b(total, left, right, scale):  # whose strides are taken for A's
    right_one(total, left, right if right.is_contiguous() else right.t().reshape(right.shape), scale)

def fails(total, left, right, scale):
    raise RuntimeError("no room in shared memory")

def no_memory(total, left, right, scale):
    raise torch.OutOfMemoryError("no room")

def tried(kernel):
    triton_kernels.add_low_rank = kernel
    kernels._low_rank_kernel.cache_clear()
    return kernels._low_rank_kernel(torch.device("cpu"), torch.float16)

state = torch.random.get_rng_state()
assert tried(right_one) is right_one
assert tried(wrong_for_b) is None
assert tried(fails) is None
try:
    tried(no_memory)
except torch.OutOfMemoryError:
    assert torch.equal(state, torch.random.get_rng_state())
    print("tried")
"""


def test_a_kernel_that_is_wrong_or_fails_is_not_used_and_want_of_memory_decides_nothing() -> None:
    assert interpreted(_TRIED_ONCE) == "tried"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotated", [24, 16])
def test_the_gpus_kernels_give_what_torch_gives(rotated: int, dtype: torch.dtype) -> None:
    """Beside fp32 on the CPU, with the very numbers that the GPU got; twice the same bits."""

    given = parts(rotated, "cuda", dtype)
    got = kernels_of(given)
    expected = kernels_of({name: tensor.cpu().float() for name, tensor in given.items()})
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for one, other, again in zip(got, expected, kernels_of(given), strict=True):
        torch.testing.assert_close(one.cpu().float(), other, rtol=rounding, atol=rounding)
        assert torch.equal(one, again)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 16, 24, 64])
def test_a_product_of_low_rank_is_added_in_place(rank: int) -> None:
    from tuner.pipeline.kernels import _low_rank_kernel

    add_low_rank = _low_rank_kernel(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    assert add_low_rank, "it does not compile here, or is wrong"

    generator = torch.Generator().manual_seed(0)
    total, left, right = (
        torch.randn(*shape, generator=generator).to("cuda", torch.bfloat16)
        for shape in ((70, 300), (70, rank), (300, rank))
    )
    expected = total.float() + 2.0 * left.float() @ right.float().t()
    add_low_rank(total, left, right.t(), 2.0)
    torch.testing.assert_close(total.float(), expected, rtol=1e-2, atol=0.05)
