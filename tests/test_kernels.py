"""Packed attention and the head at learnt positions give what the plain model gives, document by document."""

from typing import Any

import pytest
import torch
from tiny import tiny_base
from torch.nn.functional import cross_entropy

from tuner.pipeline.kernels import (
    DOCUMENT_ATTENTION,
    Exact,
    document_attention,
    fuse_lora,
    has_plain_head,
    is_packable,
    prove,
    summed_nll,
)
from tuner.pipeline.tiny_model import tiny_config
from tuner.presets import find_preset, load_presets

pytestmark = pytest.mark.train

IGNORED = -100


def tiny_model(preset: str, attention: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = tiny_config(find_preset(preset).config, vocabulary=320) | {"pad_token_id": 0} | changes
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**shape), dtype=torch.float32, attn_implementation=attention
    ).eval()


def documents(*lengths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each; the first third of a document is not learnt."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(5, 320, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = IGNORED
        rows.append((ids, labels))
    return rows


def packed(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    lengths = [len(ids) for ids, _ in rows]
    labels = torch.cat([torch.cat([row[1:], torch.tensor([IGNORED])]) for _, row in rows])
    learnt = (labels != IGNORED).nonzero()[:, 0]
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "learnt": learnt,
        "targets": labels[learnt],
    }


def one_by_one(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    total = torch.zeros(())
    for ids, labels in rows:
        logits = model(input_ids=ids[None]).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    # the head is frozen in training, so summed_nll gives it no gradient
    head = model.get_output_embeddings().weight
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter is not head
    }


@pytest.mark.parametrize("preset", sorted({"gemma-3-1b-it", *(n for n in load_presets() if "32b" not in n)}))
def test_packed_documents_have_the_loss_and_gradients_of_one_by_one(preset: str) -> None:
    untied = {"tie_word_embeddings": False}
    rows = documents(17, 5, 33, 2, 64)
    plain = tiny_model(preset, "sdpa", **untied)
    expected = one_by_one(plain, rows)
    ours = tiny_model(preset, DOCUMENT_ATTENTION, **untied)
    loss = summed_nll(ours, packed(rows))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    expected_gradients, our_gradients = gradients(plain, expected), gradients(ours, loss)
    assert set(our_gradients) == set(expected_gradients)
    assert our_gradients
    for name, gradient in our_gradients.items():
        scale = expected_gradients[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, rtol=0, atol=1e-6)


def test_a_sliding_window_cuts_within_documents_too() -> None:
    rows = documents(40, 12)
    plain = tiny_model("mistral-7b", "sdpa", sliding_window=8)
    ours = tiny_model("mistral-7b", DOCUMENT_ATTENTION, sliding_window=8)
    whole = tiny_model("mistral-7b", DOCUMENT_ATTENTION, sliding_window=None)
    expected = one_by_one(plain, rows)
    torch.testing.assert_close(summed_nll(ours, packed(rows)), expected, rtol=1e-6, atol=1e-5)
    assert not torch.allclose(summed_nll(whole, packed(rows)), expected, rtol=1e-6)


def test_the_logit_soft_cap_is_applied_and_differentiated() -> None:
    rows = documents(9, 20)
    plain = tiny_model("gemma-3-1b-it", "sdpa", final_logit_softcapping=0.5, tie_word_embeddings=False)
    ours = tiny_model("gemma-3-1b-it", DOCUMENT_ATTENTION, final_logit_softcapping=0.5, tie_word_embeddings=False)
    expected, loss = one_by_one(plain, rows), summed_nll(ours, packed(rows))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    expected_gradients = gradients(plain, expected)
    for name, gradient in gradients(ours, loss).items():
        scale = expected_gradients[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, rtol=0, atol=1e-6)


def test_another_documents_tokens_change_nothing() -> None:
    model = tiny_model("phi-3-mini-4k-instruct", DOCUMENT_ATTENTION)
    first, second, other = documents(11, 23, 23)

    def hidden_of_first(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        batch = {key: value for key, value in packed(rows).items() if key not in ("learnt", "targets")}
        return model.base_model(**batch, use_cache=False).last_hidden_state[0, :11]

    torch.testing.assert_close(hidden_of_first([first, second]), hidden_of_first([first, other]), rtol=0, atol=0)


def test_a_micro_batch_with_nothing_to_learn_has_no_loss_and_no_gradient() -> None:
    model = tiny_model("phi-3-mini-4k-instruct", DOCUMENT_ATTENTION)
    ids, labels = documents(6)[0]
    loss = summed_nll(model, packed([(ids, torch.full_like(labels, IGNORED))]))
    assert loss.item() == 0
    loss.backward()


def test_an_attention_mask_is_refused_and_not_ignored() -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="attention mask"):
        document_attention(torch.nn.Identity(), states, states, states, torch.ones(1, 1, 3, 3))


def test_grouped_heads_are_shared_in_order() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    grouped, _ = document_attention(torch.nn.Identity(), query, key, value, None)
    repeated, _ = document_attention(
        torch.nn.Identity(), query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), None
    )
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(8, 8, 96, None), (8, 2, 128, None), (8, 8, 64, 16)])
def test_the_gpu_kernel_agrees_with_the_loop(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [70, 3, 128, 41]
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    states = [torch.randn(1, n, edges[-1], dim, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)]
    results = []
    for device in ("cpu", "cuda"):
        inputs = [tensor.to(device).float() if device == "cpu" else tensor.to(device) for tensor in states]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        cu = torch.tensor(edges, dtype=torch.int32, device=device)
        output, _ = document_attention(
            torch.nn.Identity(), *inputs, None, sliding_window=window, cu_seq_lens_q=cu, max_length_q=max(lengths)
        )
        output.float().square().sum().backward()
        results.append([output.float().cpu(), *(tensor.grad.float().cpu() for tensor in inputs)])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() < 0.01 * expected.norm()  # bf16 rounds to 0.4 %


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A 4-bit model with LoRA on all its layers, B not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        tiny_base(),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        dtype=torch.float32,
        device_map="cpu",
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


def test_fused_lora_has_the_loss_and_gradients_of_pefts(adapted: Any) -> None:
    batch = {"input_ids": torch.arange(5, 45)[None], "labels": torch.arange(5, 45)[None]}
    losses, grads = [], []
    for fused in (False, True):
        if fused:
            assert fuse_lora(adapted) == 8
        adapted.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert grads[0]
    for name, gradient in grads[1].items():
        torch.testing.assert_close(gradient, grads[0][name], rtol=1e-4, atol=1e-6)
    with adapted.disable_adapter(), torch.no_grad():
        assert not torch.allclose(adapted(**batch).loss, losses[0])


# ── what a short cut assumes is proved on the model ──────────────────────────────────────────────────────────────────

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "pad_token_id": 0,
}


def of_kind(model_type: str, **shape: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_SMALL | shape))
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=DOCUMENT_ATTENTION
    ).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("preset", ["phi-3-mini-4k-instruct", "gemma-3-1b-it", "qwen3-4b", "mistral-7b"])
def test_presets_are_packed_and_scored_where_something_is_learnt(preset: str) -> None:
    model = tiny_model(preset, DOCUMENT_ATTENTION).requires_grad_(False)
    assert prove(model) == Exact(packs=True, learnt_head=True)
    assert is_packable(model)


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("gemma2", {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_a_model_whose_attention_is_not_ours_gets_its_own(model_type: str, shape: dict[str, Any]) -> None:
    """Attention sinks and capped scores: packed, they would train with other numbers and no error."""
    model = of_kind(model_type, **shape)
    assert not prove(model).packs
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("change", [lambda logits: 1.5 * logits, torch.tanh])
def test_a_model_that_changes_its_logits_in_its_own_way_is_scored_by_itself(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small logits have the loss of random tokens, whatever is done to them."""
    model = of_kind("llama")
    plain = type(model).forward

    def own(self: Any, *arguments: Any, labels: Any = None, **options: Any) -> Any:
        result = plain(self, *arguments, **options)
        result.logits = change(result.logits)
        if labels is not None:
            result.loss = self.loss_function(logits=result.logits, labels=labels, vocab_size=self.config.vocab_size)
        return result

    monkeypatch.setattr(type(model), "forward", own)
    assert not prove(model).learnt_head


def test_a_head_that_is_trained_is_not_short_cut() -> None:
    model = of_kind("llama")
    assert prove(model).learnt_head
    assert has_plain_head(model)
    model.get_output_embeddings().weight.requires_grad_(True)
    assert not has_plain_head(model)
