"""Rows → token ids and labels: which tokens are learnt, proved from the chat template itself.

    Conversation ┐            ┌ text + spans (characters that are answers) ┐             ┌ input_ids
    Completion   ├─ render ──►│ one row may become several examples        ├─ tokenize ─►│ supervised (a mask)
    PlainText    ┘            └────────────────────────────────────────────┘             └

No `{% generation %}` marker is needed. For each assistant turn the template is rendered twice more: up to the turn
with the generation prompt (what the model sees when it must answer) and up to the end of the turn. The difference is
the answer; it ends with the template's end-of-turn token, which is learnt too, and nothing after it is.
A template that rewrites history (Qwen3 drops earlier thoughts, Mistral moves the system prompt to the last turn) would
show the model an earlier answer in another form than it has to produce: such a row becomes one example a turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tuner.errors import ConfigError
from tuner.pipeline.dataset import BadRow, Completion, Conversation, Origin, PlainText, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index

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

# Plain letters: no template trims, escapes or interprets them.
_PROBE_QUESTION = "Tuner4question"
_PROBE_ANSWER = "Tuner5answer"


@dataclass(frozen=True, slots=True)
class Example:
    """One training text. `spans` are the half-open character ranges that are learnt, ascending, disjoint."""

    origin: Origin
    text: str
    spans: tuple[tuple[int, int], ...]
    special_tokens: bool  # let the tokenizer add BOS: a chat template writes its own
    append_eos: bool


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids (n,) int32 and which of them are learnt (n,) bool."""

    origin: Origin
    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    straddles: int  # answers whose first token begins in the prompt

    def labels(self) -> npt.NDArray[np.int32]:
        """(n,) int32: the token where it is learnt, -100 elsewhere."""
        return np.where(self.supervised, self.input_ids, np.int32(IGNORED))

    def truncated(self, max_length: int) -> "TokenRow":
        return TokenRow(self.origin, self.input_ids[:max_length], self.supervised[:max_length], self.straddles)


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """How a chat template closes an assistant turn.

    `token` is the first special token after the answer (None: the template writes none, EOS is appended),
    `count` how often it stands in the closing text, `tail` that text, `forced` what the generation prompt adds that
    a finished conversation does not show (`<think>\\n`).
    """

    token: str | None
    count: int
    tail: str
    forced: str


class TemplateFault(Exception):  # noqa: N818 - why one row is put aside, not an error of the run
    """The chat template raised."""


class Labeller:
    """Turns rows into examples and examples into token rows, for one tokenizer and its chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Raises ConfigError for a tokenizer without character offsets, an EOS token, or a template that fails."""
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__} cannot tell which characters a token covers")
        if tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no EOS token: the model could not learn to stop")
        self.tokenizer = tokenizer
        self.end_of_turn = self._probe_end_of_turn()

    def template_for(self, tools: Any) -> str:
        """The chat template of a row with these tools: some tokenizers have one for each case."""
        if not self.tokenizer.chat_template:
            return FALLBACK_CHAT_TEMPLATE
        template = str(self.tokenizer.get_chat_template(tools=tools))
        return _STOPPED_CLOCK + template if "strftime_now" in template else template

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any = None, *, prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=self.template_for(tools),
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise TemplateFault(f"{type(error).__name__}: {error}") from error

    def _probe_end_of_turn(self) -> EndOfTurn:
        question = [{"role": "user", "content": _PROBE_QUESTION}]
        answered = [*question, {"role": "assistant", "content": _PROBE_ANSWER}]
        try:
            prompt, whole = self._render(question, prompt=True), self._render(answered)
        except TemplateFault as error:
            raise ConfigError(
                f"the chat template fails on one question and one answer: {error}",
                hint="set ModelConfig.chat_template to one that takes user and assistant turns",
            ) from error
        head, found, tail = whole.partition(_PROBE_ANSWER)
        if not found or not prompt:
            raise ConfigError(
                "the chat template does not show the assistant's answer",
                hint="set ModelConfig.chat_template to one that takes user and assistant turns",
            )
        shared = _common_prefix(prompt, head)
        if _PROBE_QUESTION not in shared:
            raise ConfigError("the chat template's generation prompt is not how its assistant turn begins")
        token = min(
            (word for word in self._special_tokens() if word in tail),
            key=lambda word: (tail.index(word), -len(word)),
            default=None,
        )
        return EndOfTurn(token, tail.count(token) if token else 0, tail, prompt[len(shared) :])

    def _special_tokens(self) -> set[str]:
        return {str(added.content) for added in self.tokenizer.added_tokens_decoder.values()} | set(
            self.tokenizer.all_special_tokens
        )

    def examples(self, row: Row) -> list[Example] | BadRow:
        """What a row is trained as: one example, or one a turn where the template rewrites history."""
        match row:
            case PlainText():
                return [Example(row.origin, row.text, ((0, len(row.text)),), special_tokens=True, append_eos=True)]
            case Completion():
                text = row.prompt + row.completion
                span = (len(row.prompt), len(text))
                return [Example(row.origin, text, (span,), special_tokens=True, append_eos=True)]
            case Conversation():
                try:
                    return self._conversation(row)
                except TemplateFault as error:
                    return BadRow(row.origin, f"the chat template fails on it: {error}")

    def _conversation(self, row: Conversation) -> list[Example] | BadRow:
        whole = self._render(row.messages, row.tools)
        single: list[Example] = []
        spans: list[tuple[int, int]] = []
        as_history = True
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant" or index < max(1, row.supervised_from):
                continue  # a greeting that nothing asks for is what the user answers, not what is learnt
            prompt = self._render(row.messages[:index], row.tools, prompt=True)
            last = index == len(row.messages) - 1
            turn = whole if last else self._render(row.messages[: index + 1], row.tools)
            span = self._answer(prompt, turn)
            if isinstance(span, str):
                return BadRow(row.origin, f"message {index + 1}: {span}")
            start, end = span
            if hidden := _hidden(message, turn[start:end]):
                return BadRow(row.origin, f"message {index + 1}: the chat template does not show its {hidden}")
            single.append(self._example(row, turn, (span,)))
            if whole[:end] == turn[:end]:
                spans.append((start, end))
            else:
                as_history = False
        if not single:
            return BadRow(row.origin, "no assistant turn to learn")
        return [self._example(row, whole, tuple(spans))] if as_history else single

    def _example(self, row: Conversation, text: str, spans: tuple[tuple[int, int], ...]) -> Example:
        if self.end_of_turn.token:
            return Example(row.origin, text, spans, special_tokens=False, append_eos=False)
        # No token closes a turn, so EOS goes right after the last answer, where it can be learnt.
        return Example(row.origin, text[: spans[-1][1]], spans, special_tokens=False, append_eos=True)

    def _answer(self, prompt: str, turn: str) -> tuple[int, int] | str:
        """Where the answer that ends `turn` stands in it, or why that cannot be told."""
        closing = self.end_of_turn
        start = len(prompt)
        if not turn.startswith(prompt):
            start -= len(closing.forced)
            if not closing.forced or not prompt.endswith(closing.forced) or not turn.startswith(prompt[:start]):
                return "the chat template shows the prompt differently once it is answered"
        if closing.token is None:
            end = len(turn) - len(closing.tail) if turn.endswith(closing.tail) else len(turn)
            return (start, end) if end > start else "the chat template shows no answer"
        found = turn.count(closing.token, start)
        if found > closing.count:
            return f"its content has the end-of-turn token {closing.token}"
        if found == 0:
            return f"the chat template does not close it with {closing.token}"
        return start, turn.index(closing.token, start) + len(closing.token)

    def tokenize(self, examples: Sequence[Example]) -> Iterator[TokenRow]:
        """The examples' token rows, in order. Texts are tokenized in batches, on all cores."""
        for begin in range(0, len(examples), 1024):
            batch = examples[begin : begin + 1024]
            for special in (False, True):
                if all(example.special_tokens == special for example in batch):
                    yield from self._tokenize_batch(batch, special)
                    break
            else:
                for example in batch:
                    yield from self._tokenize_batch([example], example.special_tokens)

    def _tokenize_batch(self, examples: Sequence[Example], special_tokens: bool) -> Iterator[TokenRow]:
        encoded = self.tokenizer(
            [example.text for example in examples],
            add_special_tokens=special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # over-length rows are counted by us
        )
        for example, ids, offsets in zip(examples, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            input_ids = np.fromiter(ids, dtype=np.int32, count=len(ids))
            edges = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids))
            begins, ends = edges[::2], edges[1::2]
            supervised = np.zeros(len(input_ids), dtype=bool)
            straddles = 0
            for start, end in example.spans:
                supervised |= (ends > start) & (begins < end)
                straddles += int(np.any((begins < start) & (ends > start)))
            if example.append_eos:
                eos = self.tokenizer.eos_token_id
                if special_tokens and len(input_ids) and input_ids[-1] == eos and ends[-1] == begins[-1]:
                    input_ids, supervised = input_ids[:-1], supervised[:-1]  # the tokenizer's own
                input_ids = np.append(input_ids, np.int32(eos))
                supervised = np.append(supervised, True)
            supervised[:1] = False  # nothing predicts the first token
            yield TokenRow(example.origin, input_ids, supervised, straddles)


def _hidden(message: Mapping[str, Any], shown: str) -> str | None:
    """What an assistant turn has and its template does not show: a call, or a thought. Silence would be learnt, or to
    answer without thinking."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in shown:
            return f"call of {name}"
    for key in ("reasoning_content", "thinking"):
        thought = message.get(key)
        if isinstance(thought, str) and thought.strip() not in shown:
            return key
    return None


def _common_prefix(one: str, other: str) -> str:
    length = next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:length]
