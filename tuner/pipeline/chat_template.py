"""A chat template as servers use it: in which form it wants messages, and where what the model says begins and ends.

    a row's messages ── as a server has them ──► Turns ── in the template's dialect ──► its text

Nothing here knows a model by its name. What differs between templates is found once for each, by rendering probes:
words that no template trims, escapes or interprets, looked for in what comes out.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]

# For a base model without a template: words, and its own EOS after each answer, so that no token is new to it.
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

# Llama 3.2's template writes the date of the day: equal rows would be other tokens tomorrow. It is always the day that
# this template writes where there is no clock. A macro, as transformers lets no function into a template.
_STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f" | replace('{code}', '{date(2024, 7, 26).strftime(code)}')"
        for code in ("%d", "%e", "%m", "%b", "%B", "%y", "%Y", "%a", "%A", "%j", "%H", "%I", "%M", "%S", "%p")
    )
    + " }}{%- endmacro -%}"
)
_WRITE_A_TEMPLATE = "set ModelConfig.chat_template to one that takes user and assistant turns"
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


class TemplateFault(Exception):  # noqa: N818 - why one row is put aside, not an error of the run
    """The chat template raised."""


def fallback_chat_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    """FALLBACK_CHAT_TEMPLATE, after BOS where the tokenizer begins a text with it: so the model was pretrained."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + FALLBACK_CHAT_TEMPLATE


def _thought(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The key and the text of a thought that stands beside the content."""
    return next(((key, message[key]) for key in THOUGHT_KEYS if message.get(key)), None)


def stop_tokens(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> frozenset[str]:
    """The tokens at which servers of this model stop, by its generation_config.json; none where that does not say."""
    try:
        config = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frozenset()
    ids = config.get("eos_token_id") if isinstance(config, dict) else None
    listed = ids if isinstance(ids, list) else [ids]
    known = [number for number in listed if isinstance(number, int) and 0 <= number < len(tokenizer)]
    return frozenset(str(token) for token in tokenizer.convert_ids_to_tokens(known))


def opens_thought(prompt: str) -> bool:
    """Whether the model begins in the middle of a thought."""
    return prompt.rstrip().endswith("<think>")


def _ends_thought(prompt: str) -> bool:
    return prompt.rstrip().endswith("</think>")


# ── the form that a template wants ───────────────────────────────────────────────────────────────────────────────────


CallIds = Literal["as written", "filled in", "of nine characters"]
_CALL_IDS: tuple[CallIds, ...] = get_args(CallIds)


@dataclass(frozen=True, slots=True)
class Dialect:
    """The form in which a chat template takes what OpenAI's API has one form for.

    `call_ids`: most templates do not look at them; some need one, Mistral's one of nine letters and digits.
    `thought_key` is None where the template shows none of THOUGHT_KEYS.
    """

    parts: bool = False  # content as [{"type": "text", "text": …}]
    system_role: bool = True  # else the system prompt opens the next user's turn
    arguments_as_text: bool = False
    empty_content: str | None = ""  # of a turn that only calls
    call_ids: CallIds = "as written"
    thought_key: str | None = None

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in this form."""
        shaped = [self._thought(message) for message in messages]
        shaped = shaped if self.system_role else _with_system_merged(shaped)
        shaped = shaped if self.call_ids == "as written" else list(self._with_ids(shaped))
        return [self._content(self._arguments(message)) for message in shaped]

    def _thought(self, message: Message) -> Message:
        if self.thought_key is None or (thought := _thought(message)) is None:
            return message
        others = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
        return others | {self.thought_key: thought[1]}

    def _arguments(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls:
            return message
        if self.arguments_as_text:
            calls = [call | {"function": _with_argument_text(call["function"])} for call in calls]
        return message | {"content": message["content"] or self.empty_content, "tool_calls": calls}

    def _content(self, message: Message) -> Message:
        if not self.parts or message["content"] is None:
            return message
        return message | {"content": [{"type": "text", "text": message["content"]}]}

    def _with_ids(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Each call with an id, each result with that of its call: by its own, else in the order of the calls."""
        given: dict[str, str] = {}
        waiting: list[str] = []
        for index, message in enumerate(messages):
            if calls := message.get("tool_calls"):
                named = []
                for number, call in enumerate(calls):
                    written = call.get("id")
                    name = self._call_id(written, [index, number, call["function"]])
                    if written:
                        given[written] = name
                    named.append(call | {"id": name})
                waiting = [call["id"] for call in named]
                yield message | {"tool_calls": named}
            elif message["role"] == "tool":
                written = message.get("tool_call_id")
                if written:
                    name = given.get(written) or self._call_id(written, [])
                else:
                    name = waiting[0] if waiting else self._call_id(None, [index])
                waiting = [other for other in waiting if other != name]
                yield message | {"tool_call_id": name}
            else:
                yield message

    def _call_id(self, written: str | None, content: list[Any]) -> str:
        """Nine letters and digits, equal for equal calls: a run must give the same tokens again."""
        if written and (self.call_ids == "filled in" or re.fullmatch("[a-zA-Z0-9]{9}", written)):
            return written
        named = written or json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(named.encode()).hexdigest()[:9]


def _with_argument_text(function: Mapping[str, Any]) -> dict[str, Any]:
    return dict(function) | {"arguments": json.dumps(function["arguments"], ensure_ascii=False, default=str)}


def _with_system_merged(messages: Sequence[Message]) -> list[Message]:
    """System prompts before the words of the next user's turn, as Gemma's and Mistral's makers put them."""
    merged: list[Message] = []
    pending: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            pending.append(message)
            continue
        if pending and message["role"] == "user":
            words = [*(system["content"] for system in pending), message["content"]]
            message = message | {"content": "\n\n".join(words)}
        else:
            merged += pending  # nobody's turn to put it in: the template says what it thinks of that
        pending = []
        merged.append(message)
    return merged + pending


# ── where a turn ends ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Produced:
    """What the model must produce, whether EOS comes after it, and `rest`: how the finished conversation goes on."""

    text: str
    rest: str
    append_eos: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """How an assistant's turn is closed.

    By `token`, after which a finished conversation has `rest`. Where the template writes none (`token` is None): by
    `next_role`, with which the turn that follows begins, when servers stop there (GLM-4.5), else by EOS instead of
    `rest`.
    """

    token: str | None
    rest: str
    next_role: str = ""

    def closes(self, answer: str) -> bool:
        return self.token is not None and answer.endswith(self.token + self.rest)

    def close(self, answer: str) -> Produced | str:
        """`answer` is what a finished conversation shows of the turn. A text is the reason why it cannot be learnt."""
        if self.token is None:
            if self.next_role:
                return Produced(answer + self.next_role, "", append_eos=False)
            return Produced(answer.removesuffix(self.rest), "", append_eos=True)
        closing = self.token + self.rest
        end = len(answer) - len(closing) if answer.endswith(closing) else answer.rfind(self.token)
        if end < 0:
            return f"the chat template does not close it with {self.token}"
        if self.token in answer[:end]:
            return f"its content has the end-of-turn token {self.token}"
        end += len(self.token)
        return Produced(answer[:end], answer[end:], append_eos=False)


# ── the template ─────────────────────────────────────────────────────────────────────────────────────────────────────

# Plain letters: no template trims, escapes or interprets them.
_QUESTION, _ANSWER, _SYSTEM, _THOUGHT = "Tuner4question", "Tuner5answer", "Tuner6system", "Tuner7thought"
_FUNCTION, _ARGUMENT, _VALUE, _RESULT = "Tuner8function", "Tuner9argument", "Tuner10value", "Tuner11result"
_ASK: Message = {"role": "user", "content": _QUESTION}
_REPLY: Message = {"role": "assistant", "content": _ANSWER}
_THOUGHT_IS_OVER = "its thought comes after a generation prompt that ends the thought already"
_ANOTHER_PROMPT = "the chat template shows the prompt differently once it is answered"
_OPENAI_ID = "call_4TunerProbesTheChatTemp"


def _calling(call_id: str | None) -> list[Message]:
    """A call and its result."""
    function = {"name": _FUNCTION, "arguments": {_ARGUMENT: _VALUE}}
    call: Message = {"type": "function", "function": function} | ({"id": call_id} if call_id else {})
    result: Message = {"role": "tool", "name": _FUNCTION, "content": _RESULT}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        result | ({"tool_call_id": call_id} if call_id else {}),
    ]


class ChatTemplate:
    """One chat template of one tokenizer: its dialect, and the endings of its turns."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", source: str, stops: frozenset[str]) -> None:
        """`stops` are the tokens at which servers stop, none where that is not known.

        Raises ConfigError for a template that cannot show one question and one answer.
        """
        self._tokenizer = tokenizer
        self.source = _STOPPED_CLOCK + source if "strftime_now" in source else source
        self._stops = stops if tokenizer.eos_token in stops else frozenset()  # else it was not made for this tokenizer
        special = {str(added.content) for added in tokenizer.added_tokens_decoder.values()}
        special |= set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(re.escape(word) for word in sorted(special, key=lambda word: -len(word))))
        self.dialect = Dialect()
        self.dialect = self._probe_parts()
        self._lead, self._tail, forced = self._probe_frame()
        self.shows_calls = self._probe_calls()
        self.shows_system = self._probe_system()
        self._probe_thought()
        self.answer_ending = self._probe_ending([_REPLY], _ANSWER, _ASK)
        self.call_ending = self.answer_ending
        if self.shows_calls:
            call, result = _calling(_OPENAI_ID)
            self.call_ending = self._probe_ending([call], _VALUE, result)
        # Longest first: a shorter one may be the end of it.
        self.forced = sorted({forced, *self._probe_forced()} - {""}, key=len, reverse=True)

    def render(
        self, messages: Sequence[Message], given: Mapping[str, Any] = MappingProxyType({}), *, prompt: bool = False
    ) -> str:
        """The text of the messages, with the generation prompt where the model is to answer. Raises TemplateFault.

        `given` is what the template gets beside messages: tools, documents, enable_thinking, …
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    self.dialect.messages(messages),
                    chat_template=self.source,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **given,
                )
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise TemplateFault(f"{type(error).__name__}: {error}") from error

    def answer_start(self, prompt: str, turn: str, before: Sequence[Message], given: Mapping[str, Any]) -> int | str:
        """Where in `turn`, the messages `before` and the answer, what the model said begins, or why that is not told.

        `prompt` is what it saw. Usually `turn` goes on from there. Else the template shows the prompt differently once
        it is answered: without what it makes the model begin with, or without a system prompt that stands only before
        an open question. Then another answer to the same shows where the common part ends.
        """
        if turn.startswith(prompt):
            return len(prompt)
        for forced in self.forced:
            start = len(prompt) - len(forced)
            if prompt.endswith(forced) and turn.startswith(prompt[:start]):
                again = self._shared(forced, turn[start:])
                return start + again if not forced[again:].strip() else _THOUGHT_IS_OVER if again else start
        head, found, _ = self.render([*before, _REPLY], given).partition(_ANSWER)
        context = head.removesuffix(self._lead)
        if found and head.endswith(self._lead) and turn.startswith(context):
            return len(context)
        return (
            _THOUGHT_IS_OVER
            if _ends_thought(prompt)
            else "the chat template shows the prompt differently once it is answered"
        )

    def written_answer(self, prompt: str, message: Message) -> str | None:
        """An answer whose thought the template hides, as the model writes it: its content, word for word.

        None where the template has a way of its own to write thoughts, or has ended the thought in the prompt.
        """
        if message.get("tool_calls") or self._lead.strip() or _ends_thought(prompt):
            return None
        content: str = message["content"]
        if opens_thought(prompt):
            content = content.lstrip().removeprefix("<think>").lstrip("\n")
        return self._lead + content + self._tail

    def close(self, message: Message, answer: str) -> Produced | str:
        """What the model must produce of `answer`, which a finished conversation shows, or why that cannot be told."""
        endings = [self.answer_ending, self.call_ending]
        ending = endings[bool(message.get("tool_calls"))]
        return next((other for other in (ending, *endings) if other.closes(answer)), ending).close(answer)

    # ── probes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tried(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text, or nothing where the template raises."""
        try:
            return self.render(messages, prompt=prompt)
        except TemplateFault:
            return ""

    def _probe_parts(self) -> Dialect:
        fault = None
        for parts in (False, True):
            self.dialect = Dialect(parts=parts)
            try:
                text = self.render([_ASK, _REPLY])
            except TemplateFault as error:
                fault = fault or error
                continue
            if _QUESTION in text and _ANSWER in text:
                return self.dialect
        if fault:
            raise ConfigError(
                f"the chat template fails on one question and one answer: {fault}", hint=_WRITE_A_TEMPLATE
            ) from fault
        raise ConfigError("the chat template does not show the assistant's answer", hint=_WRITE_A_TEMPLATE)

    def _probe_frame(self) -> tuple[str, str, str]:
        """What the template writes before and after an answer's words, and what it forces into the prompt."""
        try:
            prompt = self.render([_ASK], prompt=True)
        except TemplateFault as error:
            raise ConfigError(
                f"the chat template fails on one question and one answer: {error}", hint=_WRITE_A_TEMPLATE
            ) from error
        head, _, tail = self.render([_ASK, _REPLY]).partition(_ANSWER)
        shared = self._shared(prompt, head)
        if _QUESTION not in prompt[:shared]:
            raise ConfigError("the chat template's generation prompt is not how its assistant turn begins")
        return head[shared:], tail, prompt[shared:]

    def _probe_calls(self) -> bool:
        """Whether the template shows calls; in which form they, their results and ids must be is then known."""
        plain = self.dialect
        for with_result, call_ids, empty, as_text in product((True, False), _CALL_IDS, ("", None), (False, True)):
            self.dialect = replace(plain, call_ids=call_ids, empty_content=empty, arguments_as_text=as_text)
            if all(self._shows_call(call_id, with_result=with_result) for call_id in (None, _OPENAI_ID)):
                return True
        self.dialect = plain
        return False

    def _shows_call(self, call_id: str | None, *, with_result: bool) -> bool:
        call, result = _calling(call_id)
        text = self._tried([_ASK, call, result] if with_result else [_ASK, call])
        shown = (_FUNCTION, _VALUE, _RESULT) if with_result else (_FUNCTION, _VALUE)
        # A mapping that is put into a text as it is, and a text that is made JSON once more.
        wrong = (f"'{_ARGUMENT}'", f'\\"{_ARGUMENT}')
        return all(word in text for word in shown) and not any(word in text for word in wrong)

    def _probe_system(self) -> bool:
        """Whether a system prompt is shown, in a turn of its own or, where the template raises at that, the user's."""
        asked = [{"role": "system", "content": _SYSTEM}, _ASK]
        own = self._tried(asked, prompt=True)
        if own:
            return _SYSTEM in own
        plain = self.dialect
        self.dialect = replace(plain, system_role=False)
        if _SYSTEM in self._tried(asked, prompt=True):
            return True
        self.dialect = plain
        return False

    def _probe_thought(self) -> None:
        for key in THOUGHT_KEYS:
            if _THOUGHT in self._tried([_ASK, _REPLY | {key: _THOUGHT}]):
                self.dialect = replace(self.dialect, thought_key=key)
                return

    def _probe_ending(self, said: list[Message], last_word: str, follows: Message) -> Ending:
        """How a turn whose words end with `last_word` is closed, before EOS is thought of.

        Of the special tokens after it that the next turn does not take back the last one closes it: the first would be
        </tool_call>, or Cohere's end of a response within its turn.
        """
        tail = self.render([_ASK, *said]).rpartition(last_word)[2]
        continued = self._tried([_ASK, *said, follows]).partition(last_word)[2]
        shared = self._shared(tail, continued)
        tokens = list(self._special.finditer(tail))
        stopping = [token for token in tokens if token.group() in self._stops]
        lasting = [token for token in tokens if token.end() <= shared]
        is_call = last_word == _VALUE
        if is_call and (closing := self.answer_ending.token):
            stopping = [token for token in tokens if token.group() == closing] or stopping
        if stopping:
            found = stopping[0]
            return Ending(found.group(), tail[found.end() :])
        # What servers do not stop at closes no call of a template whose answers end with what they do stop at.
        unclosed = is_call and (self.answer_ending.token is None or self.answer_ending.token in self._stops)
        if tokens and not unclosed:
            found = lasting[-1] if lasting else tokens[0]
            return Ending(found.group(), tail[found.end() :])
        after = continued[len(tail) :] if continued.startswith(tail) else ""
        begins = self._special.match(after.lstrip())
        closing = tail[:shared].rstrip()  # words of the template's own, which every later prompt has after the answer
        rest = tail[len(closing) :]
        if begins and (not self._stops or begins.group() in self._stops):
            blank = len(after) - len(after.lstrip())
            return Ending(None, rest, after[: blank + len(begins.group())])
        return Ending(None, rest)

    def _probe_forced(self) -> Iterator[str]:
        """What the template forces into the prompt before a call, and after a result."""
        if not self.shows_calls:
            return
        call, result = _calling(_OPENAI_ID)
        for before in ([_ASK], [_ASK, call, result]):
            prompt = self._tried(before, prompt=True)
            for said in (_REPLY, call):
                turn = self._tried([*before, said])
                shared = self._shared(prompt, turn)
                if turn and prompt[:shared].rfind(before[-1]["content"]) >= 0:
                    yield prompt[shared:]

    def _shared(self, one: str, other: str) -> int:
        """How many characters both begin with, without a part of a special token, tag or word."""
        pairs = enumerate(zip(one, other, strict=False))
        length = next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
        if length == len(one):
            return length
        for words in (self._special, _WORD):
            for word in words.finditer(one):
                if word.start() < length < word.end():
                    return word.start()
        return length


_WORD = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+")
