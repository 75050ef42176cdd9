"""presets.py and every file of presets/."""

import importlib.util
import json
import re
from copy import deepcopy
from pathlib import Path

import pytest

from tuner.errors import ConfigError, InputMissingError
from tuner.presets import Preset, find_preset, load_presets, preset_from_directory

PRESETS = load_presets()
each_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)

KAITO = {  # (c1) of the compatibility list: hub id, commit, context, hidden size / layers / heads / key-value heads
    "phi-3-mini-4k-instruct": ("microsoft/Phi-3-mini-4k-instruct", "0a67737c", 4096, (3072, 32, 32, 32)),
    "phi-3-mini-128k-instruct": ("microsoft/Phi-3-mini-128k-instruct", "072cb756", 131072, (3072, 32, 32, 32)),
    "phi-3-medium-4k-instruct": ("microsoft/Phi-3-medium-4k-instruct", "b64223aa", 4096, (5120, 40, 40, 10)),
    "phi-3-medium-128k-instruct": ("microsoft/Phi-3-medium-128k-instruct", "fa7d2aa4", 131072, (5120, 40, 40, 10)),
    "phi-3.5-mini-instruct": ("microsoft/Phi-3.5-mini-instruct", "3145e03a", 131072, (3072, 32, 32, 32)),
    "phi-4-mini-instruct": ("microsoft/Phi-4-mini-instruct", "c0fb9e74", 131072, (3072, 32, 24, 8)),
    "phi-4": ("microsoft/phi-4", "187ef034", 16384, (5120, 40, 40, 10)),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", "d8cadc02", 32768, (4096, 32, 32, 8)),
    "qwen2.5-coder-7b-instruct": ("Qwen/Qwen2.5-Coder-7B-Instruct", "c03e6d35", 32768, (3584, 28, 28, 4)),
    "qwen2.5-coder-32b-instruct": ("Qwen/Qwen2.5-Coder-32B-Instruct", "381fc969", 32768, (5120, 64, 40, 8)),
}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Grüße auf Deutsch?"},
    {"role": "assistant", "content": "Grüß Gott"},
]


def test_all_ten_of_kaito_are_there() -> None:
    assert set(KAITO) <= set(PRESETS)


@pytest.mark.parametrize("name", KAITO)
def test_kaito_preset_has_its_pinned_facts(name: str) -> None:
    preset = PRESETS[name]
    config = preset.config
    shape = tuple(
        config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    assert (preset.model_id, preset.hub_revision[:8], preset.context_length, shape) == KAITO[name]


@each_preset
def test_preset_leaves_no_fact_open(preset: Preset) -> None:
    facts = preset.model_dump(exclude={"aliases", "gated", "bos_token", "pad_token"})
    assert [name for name, value in facts.items() if value in (None, (), {}, "")] == []


@each_preset
def test_preset_pins_a_commit(preset: Preset) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", preset.revision or "")


def test_no_two_presets_share_a_commit_or_a_word() -> None:
    assert len({preset.revision for preset in PRESETS.values()}) == len(PRESETS)
    words = [word.lower() for preset in PRESETS.values() for word in (preset.model_id, *preset.aliases)]
    assert len(set(words)) == len(words)


@each_preset
def test_preset_survives_json(preset: Preset) -> None:
    assert Preset.model_validate_json(preset.model_dump_json()) == preset


@each_preset
def test_alias_and_hub_id_are_the_same_preset(preset: Preset) -> None:  # A2; KAITO fault 2
    for word in (preset.name, preset.model_id, *preset.aliases):
        assert find_preset(word) is preset
        assert find_preset(word.upper()) is preset


def test_kaito_fault_2_a_hub_id_knows_its_linear_modules_as_the_short_name_does() -> None:
    assert find_preset("microsoft/Phi-3-mini-4k-instruct").linear_modules == (
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    )


def test_kaito_fault_20_the_name_that_makes_its_controller_panic_works() -> None:
    assert find_preset("mistral-7b-v0.3").model_id == "mistralai/Mistral-7B-v0.3"


def test_any_hub_id_is_a_preset_of_unknown_facts() -> None:
    preset = find_preset("org/some-model")
    assert (preset.name, preset.model_id, preset.hub_revision) == ("org/some-model", "org/some-model", "main")
    assert (preset.config, preset.linear_modules, preset.chat_template) == ({}, (), None)
    assert preset.context_length is None


def test_a_name_kaito_only_serves_is_its_hub_id() -> None:
    assert find_preset("Llama-3.3-70B-Instruct") == find_preset("meta-llama/Llama-3.3-70B-Instruct")


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b", "phi-2"])
def test_removed_preset_says_so_and_which_id_to_write(name: str) -> None:
    with pytest.raises(ConfigError, match="removed from KAITO") as caught:
        find_preset(name)
    assert f"/{name}" in (caught.value.hint or "")


def test_misspelt_preset_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match='did you mean "phi-3-mini-4k-instruct"') as caught:
        find_preset("phi-3-mini-4k-instuct")
    assert caught.value.hint == (
        "near it: phi-3-mini-128k-instruct, phi-3-medium-4k-instruct, phi-3.5-mini-instruct; tuner presets lists all; "
        "any Hugging Face id org/name works too"
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Phi3 mini 4k instruct", "phi-3-mini-4k-instruct"),
        ("llama3", "llama-3.1-8b-instruct"),
        ("qwen", "qwen3-4b"),
        ("phi-3", "phi-3-mini-4k-instruct"),
        ("deepseek-r1", "deepseek-r1-distill-qwen-14b"),
        ("falcon-7b", None),
        ("phi-2", "phi-4"),
    ],
)
def test_a_hint_names_the_nearest_few_presets_and_where_the_list_is(name: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        find_preset(name)
    said = f"{caught.value}; {caught.value.hint}"
    assert "tuner presets lists all" in said
    assert near in said if near else "near it" not in said
    assert len(re.findall(r"[\w.]+-[\w.-]+", said.partition("near it: ")[2].partition(";")[0])) <= 3


def test_what_resembles_nothing_names_no_preset() -> None:
    with pytest.raises(ConfigError, match=r"^no preset 'bert'$") as caught:
        find_preset("bert")
    assert caught.value.hint == "tuner presets lists all; any Hugging Face id org/name works too"


@pytest.mark.parametrize("name", ["", "/", "a/b/c", "../secrets", "org/na--me", "https://host/x", "org/", "/name"])
def test_what_is_no_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        find_preset(name)


def test_model_directory_is_known_by_its_config_and_not_by_its_path(tmp_path: Path) -> None:
    directory = tmp_path / "my-model"
    directory.mkdir()
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 4096}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    preset = preset_from_directory(directory)
    assert (preset.name, preset.architecture, preset.context_length) == ("my-model", "Phi3ForCausalLM", 4096)
    assert preset.config == config
    assert str(tmp_path) not in preset.model_dump_json()


def test_language_part_of_a_model_that_sees_gives_the_numbers(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"max_position_embeddings": 131072}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert preset_from_directory(tmp_path).context_length == 131072


def test_directory_without_a_model_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"config\.json is missing"):
        preset_from_directory(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_config_json_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        preset_from_directory(tmp_path)


# ── against transformers and trl ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.train
@each_preset
def test_config_builds_the_named_architecture_with_the_named_linear_modules_and_weight(preset: Preset) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**deepcopy(preset.config))  # it writes into nested dicts
    wrong = {key: value for key, value in preset.config.items() if _plain(getattr(config, key)) != value}
    assert wrong.keys() <= {"rope_parameters"}  # transformers adds what follows from the others
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == preset.architecture
    linear = {
        name.rpartition(".")[2]
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linear == set(preset.linear_modules)
    head = 0 if "twice" not in _file_text(preset) else model.lm_head.weight.numel()
    stored_gib = 2 * (model.num_parameters() + head) / 2**30
    assert stored_gib == pytest.approx(preset.weights_gib, abs=0.02)


def _plain(value: object) -> object:
    return value if not isinstance(value, tuple) else list(value)


def _file_text(preset: Preset) -> str:
    from tuner.data import data_dir

    return (data_dir("presets") / f"{preset.name}.yaml").read_text(encoding="utf-8")


def _render(template: str, preset: Preset, messages: list[dict[str, object]], **kwargs: object) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": preset.bos_token or "", "eos_token": preset.eos_token or ""}
    rendered, _ = render_jinja_template([messages], chat_template=template, **tokens, **kwargs)
    return str(rendered[0])


@pytest.mark.train
@each_preset
def test_chat_template_keeps_every_word_in_order(preset: Preset) -> None:
    assert preset.chat_template
    turns = TURNS[preset.name == SYSTEM_BEFORE_AN_OPEN_QUESTION :]
    whole = _render(preset.chat_template, preset, turns)
    position = 0
    for turn in turns:
        position = whole.index(turn["content"], position)


@pytest.mark.train
@each_preset
def test_generation_prompt_is_where_the_answer_begins(preset: Preset) -> None:
    assert preset.chat_template
    turns = TURNS[preset.name == SYSTEM_BEFORE_AN_OPEN_QUESTION :]
    prompt = _render(preset.chat_template, preset, turns[:-1], add_generation_prompt=True)
    assert _render(preset.chat_template, preset, turns).startswith(prompt)


@pytest.mark.train
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistral-7b", "<s>[INST] Be brief.\n\nWhat is 2 + 2?[/INST] 4</s>"),
        (
            "phi-4",
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>What is 2 + 2?<|im_end|>"
            "<|im_start|>assistant<|im_sep|>4<|im_end|>",
        ),
        (
            "phi-4-mini-instruct",
            "<|system|>Be brief.<|end|><|user|>What is 2 + 2?<|end|><|assistant|>4<|end|><|endoftext|>",
        ),
    ],
)
def test_chat_template_that_trl_does_not_package(name: str, expected: str) -> None:
    preset = PRESETS[name]
    assert preset.chat_template
    assert _render(preset.chat_template, preset, TURNS[:3]) == expected


# Its template shows a system prompt in the last message while that is the user's, and nowhere once it is answered.
SYSTEM_BEFORE_AN_OPEN_QUESTION = "mistral-7b-instruct-v0.3"
_FIRST_ANSWERED = "<s>[INST] What is 2 + 2?[/INST] 4</s>"


@pytest.mark.train
@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (2, "<s>[INST] Be brief.\n\nWhat is 2 + 2?[/INST]"),
        (3, _FIRST_ANSWERED),
        (4, _FIRST_ANSWERED + "[INST] Be brief.\n\nGrüße auf Deutsch?[/INST]"),
        (5, _FIRST_ANSWERED + "[INST] Grüße auf Deutsch?[/INST] Grüß Gott</s>"),
    ],
)
def test_mistrals_chat_template_renders_as_its_tokenizers(turns: int, expected: str) -> None:
    preset = PRESETS[SYSTEM_BEFORE_AN_OPEN_QUESTION]
    assert preset.chat_template
    assert _render(preset.chat_template, preset, TURNS[:turns], add_generation_prompt=turns % 2 == 0) == expected


@pytest.mark.train
def test_mistrals_calls_render_as_its_tokenizers() -> None:
    preset = PRESETS[SYSTEM_BEFORE_AN_OPEN_QUESTION]
    assert preset.chat_template
    messages = deepcopy(CALLS)
    for number, (call, result) in enumerate(zip(messages[1]["tool_calls"], messages[2:4], strict=True)):  # type: ignore[arg-type]
        call["id"] = result["tool_call_id"] = f"call{number:05}"
    assert _render(preset.chat_template, preset, messages, tools=[TOOL]) == (
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", '
        '"properties": {}}}}][/AVAILABLE_TOOLS][INST] Weather in Kyiv and Oslo?[/INST][TOOL_CALLS] '
        '[{"name": "weather", "arguments": {"city": "Kyiv"}, "id": "call00000"}, '
        '{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>'
        '[TOOL_RESULTS] {"content": 12, "call_id": "call00000"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": 7, "call_id": "call00001"}[/TOOL_RESULTS] 12 and 7.</s>'
    )


@pytest.mark.train
@each_preset
def test_special_tokens_are_all_that_the_template_writes(preset: Preset) -> None:
    named = {token for token in (preset.bos_token, preset.eos_token, preset.pad_token) if token}
    assert named <= set(preset.special_tokens)
    assert preset.chat_template
    text = _render(preset.chat_template, preset, TURNS, add_generation_prompt=True)
    written = set(re.findall(r"<[^\s<>]+>|\[/?INST\]", text))
    assert written <= set(preset.special_tokens)


@pytest.mark.train
@pytest.mark.parametrize("turns", [2, 3, 4, 5])
@pytest.mark.parametrize("first", [0, 1], ids=["system", "no-system"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("phi-3-mini-4k-instruct", "phi3"),
        ("phi-3-medium-128k-instruct", "phi3"),
        ("phi-3.5-mini-instruct", "phi3_5"),
        ("qwen2.5-coder-7b-instruct", "qwen2_5"),
        ("qwen3-8b", "qwen3"),
        ("llama-3.1-8b-instruct", "llama3_1"),
        ("llama-3.2-1b-instruct", "llama3_2"),
        ("gemma-3-1b-it", "gemma3"),
    ],
)
def test_chat_template_renders_as_the_models_own(name: str, theirs: str, turns: int, first: int) -> None:
    own = _trl_template(theirs)
    preset = PRESETS[name]
    assert preset.chat_template
    messages = TURNS[first:turns]
    for add_generation_prompt in (False, True):
        # Llama 3.2's own writes today's date, ours always the same one.
        options = {"add_generation_prompt": add_generation_prompt, "date_string": "26 Jul 2024"}
        assert _render(preset.chat_template, preset, messages, **options) == _render(own, preset, messages, **options)


CALLS = [
    {"role": "user", "content": "Weather in Kyiv and Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyiv"}}},
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
        ],
    },
    {"role": "tool", "content": "12"},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "12 and 7."},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.train
@pytest.mark.parametrize(("name", "theirs"), [("qwen2.5-coder-7b-instruct", "qwen2_5"), ("qwen3-8b", "qwen3")])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["undeclared", "declared"])
def test_tool_calls_render_as_the_models_own(name: str, theirs: str, tools: list[object] | None) -> None:
    preset = PRESETS[name]
    assert preset.chat_template
    for messages in (CALLS, [TURNS[0], *CALLS]):
        expected = _render(_trl_template(theirs), preset, messages, tools=tools)
        assert _render(preset.chat_template, preset, messages, tools=tools) == expected


@pytest.mark.train
def test_tool_calls_render_as_llamas_own() -> None:
    preset = PRESETS["llama-3.1-8b-instruct"]
    assert preset.chat_template
    one_call = [CALLS[0], CALLS[1] | {"tool_calls": CALLS[1]["tool_calls"][:1]}, CALLS[2], CALLS[4]]  # type: ignore[index]
    expected = _render(_trl_template("llama3_1"), preset, one_call)
    assert _render(preset.chat_template, preset, one_call) == expected


def _trl_template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this trl packages no {name} template")
    return file.read_text(encoding="utf-8")
