"""Which tokens are learnt, for real chat templates (TRL's copies of the models' own) and shapes of rows."""

import re
from copy import copy
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from tiny import tiny_tokenizer

from tuner.errors import ConfigError
from tuner.pipeline.labels import IGNORED, Labeller, TokenRow
from tuner.pipeline.rows import BadRow, Completion, Conversation, Origin, PlainText
from tuner.presets import load_presets

pytestmark = pytest.mark.train

HERE = Origin("rows.jsonl", 1)

# Real templates: TRL's copies of the models' own, rendered with a preset's special tokens.
REAL_TEMPLATES = {
    "phi3": "phi-3-mini-4k-instruct",
    "phi3_5": "phi-3.5-mini-instruct",
    "qwen2_5": "qwen2.5-7b-instruct",
    "qwen3": "qwen3-4b",
    "qwen3_instruct_2507": "qwen3-4b",
    "llama3": "llama-3.1-8b-instruct",
    "llama3_1": "llama-3.1-8b-instruct",
    "gemma": "gemma-3-1b-it",
    "gemma3": "gemma-3-1b-it",
}
# Formats that TRL has no copy of, written here: what they are known for, in as few words.
WRITTEN_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "qwen2.5-7b-instruct",
    ),
    # The system prompt stands in the last user turn, so earlier turns look other than they did when they were answered.
    "mistral": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if system and m == last else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "mistral-7b-instruct-v0.3",
    ),
    "none": ("", "mistral-7b"),
}
TEMPLATES = [*((name, preset, True) for name, preset in REAL_TEMPLATES.items())] + [
    (name, name, False) for name in load_presets()
]
TEMPLATES += [(name, preset, True) for name, (_, preset) in WRITTEN_TEMPLATES.items()]


def _labeller(name: str, preset: str, real: bool) -> Labeller:
    if name in WRITTEN_TEMPLATES:
        return Labeller(tiny_tokenizer(preset, WRITTEN_TEMPLATES[name][0]))
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8") if real else None
    return Labeller(tiny_tokenizer(preset, template))


def conversation(*turns: tuple[str, str], not_learnt: tuple[int, ...] = (), tools: Any = None) -> Conversation:
    return Conversation(HERE, [{"role": role, "content": text} for role, text in turns], tools, frozenset(not_learnt))


SINGLE = conversation(("user", "What is 2 + 2?"), ("assistant", "It is 4."))
WITH_SYSTEM = conversation(("system", "Be brief."), ("user", "What is 2 + 2?"), ("assistant", "It is 4."))
NON_ASCII = conversation(("user", "Grüße? 你好"), ("assistant", "Привет 🙂\n\nZürich"))
MULTI = conversation(("user", "What is 2?"), ("assistant", "A number."), ("user", "And 3?"), ("assistant", "It too."))
EMPTY = conversation(("user", "Say nothing."), ("assistant", ""))
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
WITH_TOOLS = Conversation(
    HERE,
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "content": "rain today"},
        {"role": "assistant", "content": "It rains."},
    ],
    [TOOL],
)
SHOW_TOOLS = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1")
TRAILING_USER = conversation(("user", "What is 2?"), ("assistant", "A number."), ("user", "Thanks"))


def learnt(labeller: Labeller, row: Conversation | Completion | PlainText) -> list[str]:
    """Each unbroken run of learnt tokens as text, over all the row's examples."""
    examples = labeller.examples(row)
    assert not isinstance(examples, BadRow), examples.reason
    runs = []
    for tokens in labeller.tokenize(examples):
        run: list[int] = []
        for token, is_learnt in zip([*tokens.input_ids, 0], [*tokens.supervised, False], strict=True):
            if is_learnt:
                run.append(int(token))
            elif run:
                runs.append(labeller.tokenizer.decode(run))
                run = []
    return runs


def only(rows: list[TokenRow]) -> TokenRow:
    assert len(rows) == 1
    return rows[0]


def _rendered(labeller: Labeller, messages: list[dict[str, Any]]) -> list[int]:
    ids: list[int] = labeller.tokenizer.apply_chat_template(
        messages, chat_template=labeller.template_for(None), tokenize=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize(("name", "preset", "real"), TEMPLATES)
class TestEveryTemplate:
    def test_learns_the_answer_and_its_end_of_turn_and_nothing_else(self, name: str, preset: str, real: bool) -> None:
        labeller = _labeller(name, preset, real)
        end = labeller.end_of_turn.token
        assert end is not None
        for row in (SINGLE, NON_ASCII):
            (answer,) = learnt(labeller, row)
            assert answer.endswith(end)
            text = answer.removesuffix(end)
            # Qwen3 writes an empty thought before an answer without one: the model must produce it too.
            assert text.replace("<think>\n\n</think>\n\n", "").strip() == row.messages[-1]["content"]

    def test_system_prompt_is_not_learnt(self, name: str, preset: str, real: bool) -> None:
        labeller = _labeller(name, preset, real)
        examples = labeller.examples(WITH_SYSTEM)
        assert not isinstance(examples, BadRow)
        assert "brief" in examples[-1].text
        (answer,) = learnt(labeller, WITH_SYSTEM)
        assert "brief" not in answer
        assert "It is 4." in answer

    def test_every_turn_is_learnt_once(self, name: str, preset: str, real: bool) -> None:
        labeller = _labeller(name, preset, real)
        runs = learnt(labeller, MULTI)
        end = labeller.end_of_turn.token
        assert [run.removesuffix(end).rpartition("\n\n")[2].strip() for run in runs] == ["A number.", "It too."]
        assert all(run.endswith(end) for run in runs)

    def test_a_trailing_user_turn_is_not_learnt(self, name: str, preset: str, real: bool) -> None:
        (answer,) = learnt(_labeller(name, preset, real), TRAILING_USER)
        assert "A number." in answer
        assert "Thanks" not in answer

    def test_what_precedes_an_answer_is_the_prompt_as_at_inference(self, name: str, preset: str, real: bool) -> None:
        labeller = _labeller(name, preset, real)
        for row in (SINGLE, MULTI, NON_ASCII):
            examples = labeller.examples(row)
            assert not isinstance(examples, BadRow)
            for tokens in labeller.tokenize(examples):
                ids = tokens.input_ids.tolist()
                assert tokens.straddles == 0
                for index in range(1, len(row.messages), 2):
                    prompt = labeller.tokenizer.apply_chat_template(
                        row.messages[:index],
                        chat_template=labeller.template_for(None),
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=False,
                    )
                    if tokens.supervised[len(prompt)] and not tokens.supervised[len(prompt) - 1]:
                        assert ids[: len(prompt)] == prompt
                        break
                else:
                    raise AssertionError("no prompt of the row precedes a learnt token")

    def test_rows_are_rendered_as_the_template_does(self, name: str, preset: str, real: bool) -> None:
        labeller = _labeller(name, preset, real)
        for row in (SINGLE, NON_ASCII, MULTI, TRAILING_USER, EMPTY):
            examples = labeller.examples(row)
            assert not isinstance(examples, BadRow)
            rows = list(labeller.tokenize(examples))
            # The whole row, or where the template shows an earlier answer in another form each turn as it was answered.
            answers = [index + 1 for index, message in enumerate(row.messages) if message["role"] == "assistant"]

            found = [tokens.input_ids.tolist() for tokens in rows]
            assert found in (
                [_rendered(labeller, row.messages)],
                [_rendered(labeller, row.messages[:e]) for e in answers],
            )

    def test_an_empty_answer_learns_its_end_alone(self, name: str, preset: str, real: bool) -> None:
        labeller = _labeller(name, preset, real)
        (answer,) = learnt(labeller, EMPTY)
        end = labeller.end_of_turn.token
        assert end is not None
        assert answer.replace("<think>\n\n</think>\n\n", "").strip() == end

    def test_a_tool_call_is_learnt_or_the_row_is_put_aside(self, name: str, preset: str, real: bool) -> None:
        """A template that shows no calls would teach to answer with nothing."""
        labeller = _labeller(name, preset, real)
        examples = labeller.examples(WITH_TOOLS)
        if isinstance(examples, BadRow):
            assert re.search("does not show its (tools|call of get_weather)|template fails", examples.reason)
            assert name not in SHOW_TOOLS
            return
        called, answered = learnt(labeller, WITH_TOOLS)
        assert "get_weather" in called
        assert "Paris" in called
        assert "rain today" not in called + answered
        assert "It rains." in answered


def test_only_the_completion_of_a_prompt_in_messages_is_learnt() -> None:
    row = conversation(
        ("user", "a"), ("assistant", "shown before"), ("user", "b"), ("assistant", "learn"), not_learnt=(1,)
    )
    (answer,) = learnt(_labeller("phi3", "phi-3-mini-4k-instruct", True), row)
    assert answer == "learn<|end|>"


def test_a_turn_in_the_middle_that_is_not_to_be_learnt_is_not() -> None:
    turns = [(role, f"{role} {number}") for number in range(3) for role in ("user", "assistant")]
    row = conversation(*turns, not_learnt=(3,))
    assert learnt(_labeller("phi3", "phi-3-mini-4k-instruct", True), row) == [
        "assistant 0<|end|>",
        "assistant 2<|end|>",
    ]


def test_a_template_is_rendered_with_a_rows_own_arguments() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}{{ mood }}]{{ m.content }}<|end|>{% endfor %}"
        "{% for d in documents or [] %}{{ d.text }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant{{ mood }}]{% endif %}"
    )
    labeller = Labeller(tiny_tokenizer("phi-3-mini-4k-instruct", template))
    (example,) = labeller.examples(replace(SINGLE, template_arguments={"mood": "!"}))
    assert example.text == "[user!]What is 2 + 2?<|end|>[assistant!]It is 4.<|end|>"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (replace(SINGLE, tools=[TOOL]), "tools"),
        (replace(SINGLE, template_arguments={"documents": [{"text": "w"}]}), "documents"),
    ],
)
def test_a_row_with_what_the_template_does_not_take_is_put_aside(row: Conversation, name: str) -> None:
    found = _labeller("phi3", "phi-3-mini-4k-instruct", True).examples(row)
    assert isinstance(found, BadRow)
    assert found.reason == f"the chat template does not show its {name}"


def test_a_template_that_rewrites_history_gives_one_example_a_turn() -> None:
    """Qwen3 shows earlier answers without their thought, so learning them there would teach not to think."""
    labeller = _labeller("qwen3", "qwen3-4b", True)
    examples = labeller.examples(MULTI)
    assert not isinstance(examples, BadRow)
    assert len(examples) == 2
    assert all("<think>" in run for run in learnt(labeller, MULTI))


def test_prompt_completion_learns_the_completion_and_eos() -> None:
    """KAITO fault 6: the prompt was learnt, and EOS was not where pad is EOS."""
    tokenizer = tiny_tokenizer("phi-3-mini-4k-instruct")
    assert tokenizer.pad_token == tokenizer.eos_token
    labeller = Labeller(tokenizer)
    examples = labeller.examples(Completion(HERE, "What is 2 + 2?", " It is 4."))
    assert not isinstance(examples, BadRow)
    row = only(list(labeller.tokenize(examples)))
    assert row.labels()[-1] == tokenizer.eos_token_id
    assert learnt(labeller, Completion(HERE, "What is 2 + 2?", " It is 4.")) == [" It is 4.<|endoftext|>"]
    assert set(row.labels()[: row.supervised.argmax()]) == {IGNORED}


def test_a_completion_whose_first_token_begins_in_the_prompt_is_counted() -> None:
    labeller = Labeller(tiny_tokenizer("phi-3-mini-4k-instruct"))
    examples = labeller.examples(Completion(HERE, "What is 2 + 2? ", "It is 4."))
    assert not isinstance(examples, BadRow)
    assert only(list(labeller.tokenize(examples))).straddles == 1


def test_plain_text_learns_everything_that_something_predicts_and_eos() -> None:
    labeller = Labeller(tiny_tokenizer("mistral-7b"))  # it adds no BOS
    assert learnt(labeller, PlainText(HERE, "It is 4.")) == [" is 4.</s>"]


def test_a_model_without_a_template_gets_one_that_ends_answers_with_its_eos() -> None:
    tokenizer = tiny_tokenizer("mistral-7b", "")
    assert learnt(Labeller(tokenizer), MULTI) == ["A number.</s>", "It too.</s>"]


def test_a_template_that_closes_no_turn_gets_eos_after_every_answer() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    labeller = Labeller(tiny_tokenizer("mistral-7b", template))
    assert labeller.end_of_turn.token is None
    assert learnt(labeller, MULTI) == ["A number.</s>", "It too.</s>"]
    assert labeller.remarks() == [
        "the chat template closes no turn with a special token: EOS is learnt as an answer's end"
    ]


def test_words_that_close_a_turn_are_learnt_before_eos() -> None:
    """A model's `</s>` that is no token of this tokenizer: the history of every later prompt has it."""
    template = "{% for m in messages %}{{ m.role + ':\n' + m.content + '[end]\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    labeller = Labeller(tiny_tokenizer("mistral-7b", template))
    assert learnt(labeller, MULTI) == ["A number.[end]</s>", "It too.[end]</s>"]


def test_of_several_templates_rows_with_tools_take_the_one_for_tools() -> None:
    """As Hermes 2 Pro and Command R have them."""
    chatml = WRITTEN_TEMPLATES["chatml"][0]
    tokenizer = copy(tiny_tokenizer("qwen2.5-7b-instruct"))
    tokenizer.chat_template = {"default": chatml, "tool_use": "{{ tools | tojson }}" + chatml}
    labeller = Labeller(tokenizer)
    tools = ({"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {}}},)
    for row, begins in ((SINGLE, "<|im_start|>"), (replace(SINGLE, tools=tools), '[{"type": "function"')):
        (example,) = labeller.examples(row)
        assert example.text.startswith(begins)
        assert learnt(labeller, row) == ["It is 4.<|im_end|>"]


def test_a_template_that_tells_the_date_gives_equal_tokens_on_every_day() -> None:
    """As Llama 3.2's does."""
    day = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y, %A') %}{% endif %}{{ day }}"
    dated = day + WRITTEN_TEMPLATES["chatml"][0]
    (example,) = Labeller(tiny_tokenizer("qwen2.5-7b-instruct", dated)).examples(SINGLE)
    assert example.text.startswith("26 Jul 2024, Friday<|im_start|>")


def test_a_thought_that_the_generation_prompt_opens_stays_in_the_prompt() -> None:
    """As DeepSeek-R1-Distill's: every server sends it, and the finished conversation does not show it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    labeller = Labeller(tiny_tokenizer("qwen3-4b", template))
    first, second = labeller.examples(MULTI)
    assert first.text.endswith("<|im_start|>assistant\n<think>\nA number.<|im_end|>\n")
    assert second.text.count("<think>") == 1  # as the served history: the first answer stands there without
    assert learnt(labeller, MULTI) == ["A number.<|im_end|>", "It too.<|im_end|>"]


def test_an_answer_that_contains_the_end_of_turn_token_is_a_bad_row() -> None:
    labeller = _labeller("phi3", "phi-3-mini-4k-instruct", True)
    bad = labeller.examples(conversation(("user", "a"), ("assistant", "b<|end|>c")))
    assert isinstance(bad, BadRow)
    assert "<|end|>" in bad.reason


def test_a_greeting_that_nothing_asks_for_is_context() -> None:
    turns = (("assistant", "Hello!"), ("user", "a"), ("assistant", "b"))
    labeller = _labeller("phi3", "phi-3-mini-4k-instruct", True)
    assert learnt(labeller, conversation(*turns)) == ["b<|end|>"]
    bad = labeller.examples(conversation(turns[0]))
    assert isinstance(bad, BadRow)
    assert bad.reason == "no assistant turn to learn"


def test_a_thought_that_the_template_does_not_show_is_a_bad_row() -> None:
    """Else answering without a thought would be learnt of rows that have one."""
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "\nLet me see.\n"},
    ]
    row = Conversation(HERE, turns)
    bad = _labeller("phi3", "phi-3-mini-4k-instruct", True).examples(row)
    assert isinstance(bad, BadRow)
    assert bad.reason == "message 2: the chat template does not show its reasoning_content"
    assert "Let me see." in learnt(_labeller("qwen3", "qwen3-4b", True), row)[0]


def test_a_row_that_the_template_refuses_is_a_bad_row_and_not_a_crash() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    bad = Labeller(tiny_tokenizer("mistral-7b", template)).examples(
        conversation(("user", "a"), ("tool", "x"), ("assistant", "b"))
    )
    assert isinstance(bad, BadRow)
    assert "no tools here" in bad.reason


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ 1 / 0 }}", "fails"), ("{{ undefined.thing }}", "fails"), ("hello", "does not show"), ("{% if %}", "fails")],
)
def test_a_useless_chat_template_is_refused_before_any_row(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Labeller(tiny_tokenizer("mistral-7b", template))


def test_empty_content_does_not_hide_the_end_of_turn() -> None:
    labeller = _labeller("qwen2_5", "qwen2.5-7b-instruct", True)
    row = conversation(("user", "a"), ("assistant", ""))
    assert learnt(labeller, row) == ["<|im_end|>"]
