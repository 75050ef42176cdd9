"""The prompt that is trained on is the prompt that is served, for templates of every structure that is known.

The templates are written here in as few words as their structure needs; each says which models are like it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny import WORDS, tiny_tokenizer
from tokenizers import processors

from tuner.pipeline import messages as reading
from tuner.pipeline.chat_template import FALLBACK_CHAT_TEMPLATE, fallback_chat_template, stop_tokens
from tuner.pipeline.labels import Example, Labeller
from tuner.pipeline.rows import BadRow, Completion, Conversation, Origin, PlainText
from tuner.presets import find_preset

pytestmark = pytest.mark.train

HERE = Origin("rows.jsonl", 1)
Messages = list[dict[str, Any]]


def _as_it_is(messages: Messages) -> Messages:
    return messages


def _in_parts(messages: Messages) -> Messages:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _arguments_as_text(messages: Messages) -> Messages:
    messages = deepcopy(messages)
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


def _system_in_the_users_turn(messages: Messages) -> Messages:
    if messages[0]["role"] != "system":
        return messages
    asked = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [messages[1] | {"content": asked}, *messages[2:]]


@dataclass(frozen=True)
class Written:
    """A template, `ends` of an answer and of a call, and what a server must give it other than OpenAI's form.

    `aside` is why rows of a kind are put aside: each kind that is not named is learnt.
    """

    like: str
    source: str
    tokens: tuple[str, ...]
    ends: tuple[str, str]
    served: Callable[[Messages], Messages] = _as_it_is
    aside: dict[str, str] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    eos: str = "</s>"


_NO_CALLS = dict.fromkeys(("call", "parallel calls", "text and call"), "does not show its call of weather")
_NO_THOUGHT_KEY = {"thought": "does not show its reasoning_content"}

TEMPLATES = {
    "thought opened in the prompt": Written(
        "DeepSeek-R1-Distill",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|U|>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<|A|>' + m.content.split('</think>')[-1] + eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|A|><think>\n' }}{% endif %}",
        ("<|U|>", "<|A|>", "<think>", "</think>"),
        ("</s>", "</s>"),
        aside=_NO_CALLS | _NO_THOUGHT_KEY,
    ),
    "thought closed in the prompt": Written(
        "Gemma 4",
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role != 'tool' and not (loop.index0 and messages[loop.index0 - 1].role == 'tool') %}"
        "{{ '<|turn>' + m.role + '\n' }}{% endif %}"
        "{% if m.role == 'tool' %}{{ m.content + '<tool_response|>' }}{% else %}"
        "{% if m.reasoning_content %}{{ '<|channel>thought\n' + m.reasoning_content + '<channel|>' }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ '<|tool_call>' + (c.function | tojson) + '<tool_call|>' }}{% endfor %}"
        "{{ m.content }}{{ '<|tool_response>' if m.tool_calls else '<turn|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}"
        "{{ '<|turn>assistant\n<|channel>thought\n<channel|>' }}{% endif %}",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
        ("<turn|>", "<|tool_response>"),
        aside={"thought": "its thought comes after a generation prompt that ends the thought already"},
    ),
    "empty thought in the answer": Written(
        "Nemotron 3",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}"
        "{% elif '</think>' not in m.content %}{{ '<think></think>' }}{% endif %}{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '<tool_call>\n' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        ("<|im_end|>", "<|im_end|>"),
    ),
    "system prompt before the open question": Written(
        "Mistral Nemo, Pixtral",
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST]' + (system + '\n\n' if system and loop.last else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        ("</s>", "</s>"),
        aside=_NO_CALLS | _NO_THOUGHT_KEY,
    ),
    "a call closed by a token of its own": Written(
        "gpt-oss",
        "{% for m in messages %}{% if m.tool_calls %}"
        "{% if m.content %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.content + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}"
        "{{ (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}{% elif m.role == 'assistant' %}"
        "{% if m.thinking and loop.last %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|end|>"),
        ("<|return|>", "<|call|>"),
        aside={"parallel calls": "does not show its call of weather with ROME"},
        eos="<|return|>",
    ),
    "a response closed within its turn": Written(
        "Command A",
        "{{ bos_token }}{% for m in messages %}{{ '<|START|><|' + m.role + '|>' }}{% if m.tool_calls %}"
        "{% if m.content %}{{ '<|PLAN|>' + m.content + '<|/PLAN|>' }}{% endif %}"
        "{{ '<|ACTION|>' + (m.tool_calls | map(attribute='function') | list | tojson) + '<|/ACTION|>' }}"
        "{% elif m.role == 'assistant' %}{{ '<|RESPONSE|>' + m.content + '<|/RESPONSE|>' }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|END|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START|><|assistant|>' }}{% endif %}",
        ("<|START|>", "<|END|>", "<|ACTION|>", "<|/ACTION|>", "<|RESPONSE|>", "<|/RESPONSE|>"),
        ("<|/RESPONSE|><|END|>", "<|/ACTION|><|END|>"),
        aside=_NO_THOUGHT_KEY,
        eos="<|END|>",
    ),
    "arguments as text": Written(
        "DeepSeek V3",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|U|>' + m.content }}"
        "{% elif m.role == 'tool' %}{{ '<|O|>' + m.content }}{% elif m.role == 'system' %}{{ m.content }}"
        "{% else %}{{ '<|A|>' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<|C|>' + c.function.name + '\n' + c.function.arguments + '<|/C|>' }}{% endfor %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|A|>' }}{% endif %}",
        ("<|U|>", "<|A|>", "<|O|>", "<|C|>", "<|/C|>"),
        ("</s>", "<|/C|></s>"),
        _arguments_as_text,
        _NO_THOUGHT_KEY,
    ),
    "content in parts": Written(
        "idefics3, SmolVLM, LLaVA-Next",
        "{% for m in messages %}{{ m.role.capitalize() + ': ' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        ("<end_of_utterance>",),
        ("<end_of_utterance>", ""),
        _in_parts,
        _NO_CALLS | _NO_THOUGHT_KEY,
    ),
    "no system role": Written(
        "Gemma 1 and 2, Mistral v0.1",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{{ '<|turn>' + m.role + '\n' + m.content | trim + '<turn|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}",
        ("<|turn>", "<turn|>"),
        ("<turn|>", ""),
        _system_in_the_users_turn,
        _NO_THOUGHT_KEY
        | {"call": "does not show its call", "parallel calls": "does not show", "text and call": "does not show"},
    ),
    "the next role ends a turn": Written(
        "GLM-4.5",
        "[gMASK]{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}{% else %}"
        "{{ '<|' + m.role + '|>\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<tool_call>", "</tool_call>"),
        ("<|user|>", "</tool_call><|observation|>"),
        aside=_NO_THOUGHT_KEY,
        stops=("</s>", "<|user|>", "<|observation|>"),
    ),
    "no turn is ever closed": Written(
        "a template of special role tokens for a model that stops at EOS",
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"),
        ("</s>", "</call></s>"),
        aside=_NO_THOUGHT_KEY,
        stops=("</s>",),
    ),
    "text beside a call is hidden": Written(
        "Llama 3.1",
        "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m.role + '\n' }}{% if m.tool_calls %}"
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
        "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|h|>assistant\n' }}{% endif %}",
        ("<|h|>", "<|eot|>"),
        ("<|eot|>", "<|eot|>"),
        aside=_NO_THOUGHT_KEY
        | {"text and call": "does not show its content", "parallel calls": "the chat template fails on it"},
        eos="<|eot|>",
    ),
}

TOOL = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
ASKED, ASKED_AGAIN = {"role": "user", "content": "QUESTION"}, {"role": "user", "content": "ANOTHER"}
ANSWERED, ANSWERED_AGAIN = {"role": "assistant", "content": "ANSWER"}, {"role": "assistant", "content": "REPLY"}


def _call(city: str, text: str = "") -> dict[str, Any]:
    call = {
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": city, "days": [3, {"at": "NOON"}]}},
    }
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def _result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "content": text}


KINDS: dict[str, Messages] = {
    "one turn": [ASKED, ANSWERED],
    "two turns": [ASKED, ANSWERED, ASKED_AGAIN, ANSWERED_AGAIN],
    "system": [{"role": "system", "content": "SYSTEM"}, ASKED, ANSWERED, ASKED_AGAIN, ANSWERED_AGAIN],
    "trailing question": [ASKED, ANSWERED, ASKED_AGAIN],
    "thought": [ASKED, ANSWERED | {"reasoning_content": "THOUGHT"}],
    "thought in content": [ASKED, {"role": "assistant", "content": "<think>\nTHOUGHT\n</think>\n\nANSWER"}],
    "call": [ASKED, _call("BONN"), _result("RESULT"), ANSWERED],
    "text and call": [ASKED, _call("BONN", "LOOKING"), _result("RESULT"), ANSWERED],
    "parallel calls": [ASKED, _call("BONN"), _call("ROME"), _result("RESULT"), _result("RESULT"), ANSWERED],
}
LEARNT_WORDS = ("ANSWER", "REPLY", "THOUGHT", "BONN", "ROME", "NOON", "LOOKING")
OTHERS_WORDS = ("QUESTION", "ANOTHER", "SYSTEM", "RESULT")


def _row(kind: str, source: str) -> Conversation:
    """The row, with its tool where a call is in it and the template shows tools: another one takes no such row."""
    calls = any("tool_calls" in message for message in KINDS[kind])
    return _as_read(KINDS[kind], [TOOL] if calls and "tools" in source else None)


def _as_read(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Conversation:
    """The row as it is read from a file: tools in their wrapper, calls in a row in one message."""
    found = reading.Messages(Counter())
    found.add(deepcopy(messages), "messages")
    return Conversation(HERE, found.messages, reading.tools_of(tools, "tools"), frozenset(found.not_learnt))


def _labeller(written: Written) -> Labeller:
    from tuner.pipeline.tiny_model import make_tiny_tokenizer

    special = tuple(dict.fromkeys(("<s>", written.eos, *written.tokens)))
    facts = {"bos_token": "<s>", "eos_token": written.eos, "special_tokens": special, "chat_template": written.source}
    tokenizer = make_tiny_tokenizer(find_preset("mistral-7b").model_copy(update=facts), WORDS)
    return Labeller(tokenizer, frozenset(written.stops))


@pytest.fixture(scope="module")
def labellers() -> dict[str, Labeller]:
    return {name: _labeller(written) for name, written in TEMPLATES.items()}


def _learnt(example: Example, eos: str) -> list[str]:
    words = [example.text[start:end] for start, end in example.spans]
    return [*words[:-1], words[-1] + eos * example.append_eos]


def _served_prompt(labeller: Labeller, written: Written, messages: Messages) -> str:
    """What a server makes of the messages: OpenAI's form of parallel calls and tools, in the form that it must have."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if len(calls) > 1:
        first = next(index for index, message in enumerate(messages) if "tool_calls" in message)
        messages = [*messages[:first], messages[first] | {"tool_calls": calls}, *messages[first + len(calls) :]]
    tools = [{"type": "function", "function": TOOL}] if calls else None
    return str(
        labeller.tokenizer.apply_chat_template(
            written.served(messages), tools=tools, add_generation_prompt=True, tokenize=False
        )
    )


each_template = pytest.mark.parametrize("name", TEMPLATES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def _examples(labellers: dict[str, Labeller], name: str, kind: str) -> Sequence[Example]:
    """Of a row that is learnt; the others are put aside for the reason that the table has."""
    examples = labellers[name].examples(_row(kind, TEMPLATES[name].source))
    reason = TEMPLATES[name].aside.get(kind)
    if reason:
        assert isinstance(examples, BadRow), examples
        assert reason in examples.reason
        return ()
    assert not isinstance(examples, BadRow), examples.reason
    return examples


@each_template
@each_kind
class TestEveryTemplate:
    def test_an_example_begins_with_the_prompt_that_is_served(
        self, labellers: dict[str, Labeller], name: str, kind: str
    ) -> None:
        examples, labeller = _examples(labellers, name, kind), labellers[name]
        served = [
            _served_prompt(labeller, TEMPLATES[name], KINDS[kind][:index])
            for index, message in enumerate(KINDS[kind])
            if examples and message["role"] == "assistant" and KINDS[kind][index - 1]["role"] != "assistant"
        ]
        assert [example.text[:start] for example in examples for start, _ in example.spans] == served
        tokens = iter(labeller.tokenize(examples))
        for example in examples:
            ids = next(tokens).input_ids.tolist()
            for start, _ in example.spans:
                prompt = labeller.tokenizer(example.text[:start], add_special_tokens=False)["input_ids"]
                assert ids[: len(prompt)] == prompt

    def test_all_that_the_assistant_said_is_learnt_and_nothing_that_others_said(
        self, labellers: dict[str, Labeller], name: str, kind: str
    ) -> None:
        learnt = "".join(word for e in _examples(labellers, name, kind) for word in _learnt(e, TEMPLATES[name].eos))
        said = json.dumps([message for message in KINDS[kind] if message["role"] == "assistant"])
        assert [word for word in LEARNT_WORDS if word in said and word not in learnt] == [
            word for word in LEARNT_WORDS if word in said and kind in TEMPLATES[name].aside
        ]
        assert not [word for word in OTHERS_WORDS if word in learnt]

    def test_an_answer_and_a_call_are_learnt_with_their_end_once(
        self, labellers: dict[str, Labeller], name: str, kind: str
    ) -> None:
        written = TEMPLATES[name]
        for example in _examples(labellers, name, kind):
            for learnt in _learnt(example, written.eos):
                end = written.ends["BONN" in learnt]
                assert learnt.endswith(end)
                assert learnt.count(end) == 1

    def test_bos_stands_once_where_the_template_writes_it_and_eos_never_twice(
        self, labellers: dict[str, Labeller], name: str, kind: str
    ) -> None:
        labeller = labellers[name]
        for tokens in labeller.tokenize(_examples(labellers, name, kind)):
            words = labeller.tokenizer.convert_ids_to_tokens(tokens.input_ids.tolist())
            assert [index for index, word in enumerate(words) if word == "<s>"] == [0] * (
                "bos_token" in TEMPLATES[name].source
            )
            assert (TEMPLATES[name].eos,) * 2 not in pairwise(words)


# ── ids of calls ─────────────────────────────────────────────────────────────────────────────────────────────────────

_NINE = (  # Mistral v0.3, Nemo, Small
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ '[CALL]' + c.function.name + (c.function.arguments | tojson) + c.id }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}{{ '[RESULT]' + m.content + m.tool_call_id }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
_ANY = _NINE.replace("or c.id | length != 9", "").replace("or m.tool_call_id | length != 9", "")


def _two_calls(ids: Sequence[str | None]) -> Conversation:
    """Two calls of one turn, and their results in the other order where they are named."""
    calls = _call("BONN")["tool_calls"] + _call("ROME")["tool_calls"]
    results = [_result("SUN"), _result("RAIN")]
    for call, result, name in zip(calls, results, ids, strict=True):
        if name:
            call["id"] = result["tool_call_id"] = name
    results = results[::-1] if all(ids) else results
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    return Conversation(HERE, [dict(ASKED), said, *results, dict(ANSWERED)])


def _ids(template: str, row: Conversation) -> tuple[list[str], list[str]]:
    """The ids of the calls, and the result's of each call."""
    (example,) = Labeller(tiny_tokenizer("mistral-7b", template)).examples(row)
    calls = re.findall(r"\[CALL\]weather\{.*?\}\]\}([^\[<]+)", example.text)
    results = dict(re.findall(r"\[RESULT\](SUN|RAIN)(.+?)(?=\[RESULT|ANSWER)", example.text))
    return calls, [results["SUN"], results["RAIN"]]


OPENAI_IDS = ("call_BTwoxSHAPwMgjsWFIzfPKS7y", "call_Sc4eJnkGXpjAbG6YnWpvRoLq")


@pytest.mark.parametrize("ids", [(None, None), OPENAI_IDS], ids=["none", "OpenAI's"])
def test_a_template_that_wants_ids_of_nine_characters_gets_them(ids: tuple[str | None, str | None]) -> None:
    calls, results = _ids(_NINE, _two_calls(ids))
    assert calls == results
    assert len(set(calls)) == 2
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", name) for name in calls)
    assert _ids(_NINE, _two_calls(ids)) == (calls, results)


def test_ids_that_a_template_takes_stay_as_they_are() -> None:
    assert _ids(_NINE, _two_calls(("abc123DEF", "ghi456JKL")))[0] == ["abc123DEF", "ghi456JKL"]
    assert _ids(_ANY, _two_calls(OPENAI_IDS)) == (list(OPENAI_IDS), list(OPENAI_IDS))


def test_a_template_that_wants_some_id_gets_one() -> None:
    calls, results = _ids(_ANY, _two_calls((None, None)))
    assert calls == results
    assert len(set(calls)) == 2


# ── tools, turns of one answer, system prompts ───────────────────────────────────────────────────────────────────────

_CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
_CHATML += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_WRAPPED = {"type": "function", "function": TOOL}


@pytest.mark.parametrize(
    "tool",
    [
        TOOL,
        _WRAPPED,
        {"type": "function", **TOOL},  # OpenAI's Responses API
        {("input_schema" if key == "parameters" else key): value for key, value in TOOL.items()},  # Anthropic's
    ],
    ids=["bare", "wrapped", "flat", "input_schema"],
)
def test_tools_of_every_form_are_shown_as_servers_show_them(tool: dict[str, Any]) -> None:
    labeller = Labeller(tiny_tokenizer("qwen2.5-7b-instruct", "{{ tools | tojson }}\n" + _CHATML))
    (example,) = labeller.examples(_as_read([ASKED, ANSWERED], [tool]))
    assert json.loads(example.text.partition("\n")[0]) == [_WRAPPED]


def test_a_text_and_the_call_that_follows_it_are_one_turn() -> None:
    """As ShareGPT has them: gpt, then function_call."""
    labeller = Labeller(tiny_tokenizer("qwen2.5-7b-instruct"))
    turns = [ASKED, {"role": "assistant", "content": "LOOKING"}, _call("BONN"), _result("RESULT"), ANSWERED]
    (example,) = labeller.examples(_as_read(turns))
    first, second = _learnt(example, "")
    assert first.startswith("LOOKING")
    assert "BONN" in first
    assert first.count("<|im_end|>") == 1
    assert second == "ANSWER<|im_end|>"


def test_a_call_that_is_learnt_is_not_put_into_a_turn_that_is_not() -> None:
    labeller = Labeller(tiny_tokenizer("qwen2.5-7b-instruct"))
    turns = [ASKED, _call("BONN") | {"weight": 0}, _call("ROME"), _result("RESULT"), ANSWERED]
    (example,) = labeller.examples(_as_read(turns))
    assert [("BONN" in learnt, "ROME" in learnt) for learnt in _learnt(example, "")] == [(False, True), (False, False)]


def test_what_a_template_does_to_a_system_prompt_is_said() -> None:
    system = [{"role": "system", "content": "SYSTEM"}]
    row = Conversation(HERE, [*system, ASKED, ANSWERED])
    silent = _CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + _CHATML
    said = {}
    for template in (_CHATML, silent, refusing):
        labeller = Labeller(tiny_tokenizer("qwen2.5-7b-instruct", template))
        (example,) = labeller.examples(row)
        said["SYSTEM" in example.text, len(labeller.remarks())] = "".join(labeller.remarks())
    assert said == {
        (True, 0): "",
        (False, 1): "1 row: the chat template shows the system prompt neither here nor when it is served",
        (True, 1): "1 row: the system prompt opens the user's turn, as the chat template has no system role: "
        "serve it in the same way",
    }


# ── thoughts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", ["<think>\nTHOUGHT\n</think>\n\nANSWER", "THOUGHT\n</think>\n\nANSWER"])
def test_a_hidden_thought_is_learnt_after_the_prompt_that_opens_it(
    labellers: dict[str, Labeller], content: str
) -> None:
    row = Conversation(HERE, [ASKED, {"role": "assistant", "content": content}])
    (example,) = labellers["thought opened in the prompt"].examples(row)
    assert example.text.endswith("<|A|><think>\nTHOUGHT\n</think>\n\nANSWER</s>")
    assert _learnt(example, "") == ["THOUGHT\n</think>\n\nANSWER</s>"]


def test_an_answer_that_leaves_the_prompts_thought_open_is_counted() -> None:
    labeller = _labeller(TEMPLATES["thought opened in the prompt"])
    for kind in ("one turn", "two turns", "thought in content"):
        labeller.examples(_row(kind, labeller.template_for(None)))
    assert labeller.remarks() == ["2 rows: the answer does not close the thought that the generation prompt opens"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("shown", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_shown_whichever_key_the_row_and_the_template_have(key: str, shown: str) -> None:
    template = _CHATML.replace("+ m.content", f"+ (m.{shown} | default('')) + '</think>' + m.content")
    labeller = Labeller(tiny_tokenizer("qwen2.5-7b-instruct", template))
    (example,) = labeller.examples(Conversation(HERE, [ASKED, ANSWERED | {key: "THOUGHT"}]))
    assert "THOUGHT</think>ANSWER" in _learnt(example, "")[0]


# ── BOS and EOS ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _with_bos() -> Any:
    """A tokenizer that begins a text with BOS, as Llama's, Mistral's and Gemma's do."""
    tokenizer = deepcopy(tiny_tokenizer("mistral-7b", ""))
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [
        PlainText(HERE, "It is 4."),
        PlainText(HERE, "<s>[INST] What is 2 + 2? [/INST] It is 4. </s>"),
        PlainText(HERE, " <s> It is 4. </s>\n"),
        PlainText(HERE, "It is 4.</s></s>"),
        Completion(HERE, "What is 2 + 2?", " It is 4."),
        Completion(HERE, "<s>[INST] What is 2 + 2? [/INST]", " It is 4. </s>"),
        Completion(HERE, "\n<s>What is 2 + 2?", " It is 4.</s> \n"),
        Conversation(HERE, [ASKED, ANSWERED]),
    ],
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_and_eos_stand_once_whoever_writes_them(row: Any, adds_bos: bool) -> None:
    tokenizer = _with_bos() if adds_bos else tiny_tokenizer("mistral-7b", "")
    labeller = Labeller(tokenizer)
    (example,) = labeller.examples(row)
    (tokens,) = labeller.tokenize([example])
    words = tokenizer.convert_ids_to_tokens(tokens.input_ids.tolist())
    written = not isinstance(row, Conversation) and "<s>" in (row.text if isinstance(row, PlainText) else row.prompt)
    assert [index for index, word in enumerate(words) if word == "<s>"] == [0] * (adds_bos or written)
    assert words.count("</s>") == 1
    learnt = tokenizer.decode(tokens.input_ids[tokens.supervised])
    assert learnt.endswith("</s>")
    assert "What is" not in learnt or isinstance(row, PlainText)


def test_the_fallback_template_begins_with_bos_where_the_tokenizer_does() -> None:
    assert fallback_chat_template(_with_bos()) == "{{ bos_token }}" + FALLBACK_CHAT_TEMPLATE
    assert fallback_chat_template(tiny_tokenizer("mistral-7b", "")) == FALLBACK_CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("config", "stops"),
    [
        ('{"eos_token_id": EOS}', {"</s>"}),
        ('{"eos_token_id": [EOS, BOS, 999999]}', {"</s>", "<s>"}),
        ("{}", set()),
        ("[]", set()),
        ("{", set()),
    ],
)
def test_stop_tokens_are_those_of_generation_config(tmp_path: Path, config: str, stops: set[str]) -> None:
    tokenizer = tiny_tokenizer("mistral-7b")
    assert stop_tokens(tokenizer, tmp_path) == set()
    config = config.replace("EOS", str(tokenizer.eos_token_id)).replace("BOS", str(tokenizer.bos_token_id))
    (tmp_path / "generation_config.json").write_text(config)
    assert stop_tokens(tokenizer, tmp_path) == stops
