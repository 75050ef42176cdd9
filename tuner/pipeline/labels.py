"""Rows → token ids and labels: which tokens are learnt, proved from the chat template itself.

    Conversation ┐            ┌ text + spans (characters that are answers) ┐             ┌ input_ids
    Completion   ├─ render ──►│ one row may become several examples        ├─ tokenize ─►│ supervised (a mask)
    PlainText    ┘            └────────────────────────────────────────────┘             └

No `{% generation %}` marker is needed. For each assistant turn the template is rendered twice: up to the turn with the
generation prompt, which is what a server shows the model, and up to the end of the turn, which tells what it has to say
then. An example is the one and after it the other, with the end of the turn; only the other is learnt.
Turns share an example where the served prompt of the later one goes on from the earlier. A template that rewrites
history (Qwen3 drops earlier thoughts, Mistral moves the system prompt to the last turn) would show the model an earlier
answer in another form than it has to produce: there another example begins.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tuner.errors import ConfigError
from tuner.pipeline.chat_template import (
    THOUGHT_KEYS,
    ChatTemplate,
    Ending,
    Message,
    Produced,
    TemplateFault,
    fallback_chat_template,
    opens_thought,
)
from tuner.pipeline.rows import BadRow, Completion, Conversation, Origin, PlainText, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index


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


class Labeller:
    """Turns rows into examples and examples into token rows, for one tokenizer and its chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stops: frozenset[str] = frozenset()) -> None:
        """`stops` are the tokens at which servers stop, as generation_config.json says; none where nothing does.

        Raises ConfigError for a tokenizer without character offsets, an EOS token, or a template that fails.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__} cannot tell which characters a token covers")
        if tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no EOS token: the model could not learn to stop")
        self.tokenizer = tokenizer
        self._remarks: Counter[str] = Counter()
        self._conversations = 0
        self._stops = stops
        self._templates: dict[str, ChatTemplate] = {}
        self.end_of_turn: Ending = self._template(None).answer_ending

    def template_for(self, tools: Any) -> str:
        """The source of a row's chat template with these tools: some tokenizers have one for each case."""
        return self._template(tools).source

    def _template(self, tools: Any) -> ChatTemplate:
        source = fallback_chat_template(self.tokenizer)
        if self.tokenizer.chat_template:
            source = str(self.tokenizer.get_chat_template(tools=tools))
        if source not in self._templates:
            self._templates[source] = ChatTemplate(self.tokenizer, source, self._stops)
        return self._templates[source]

    def remarks(self) -> list[str]:
        """What somebody should know of the conversations so far, with the number of rows where not all are meant."""
        found = [f"{count:,} {'row' if count == 1 else 'rows'}: {remark}" for remark, count in self._remarks.items()]
        if self._conversations and self.end_of_turn.token is None:
            ends = self.end_of_turn.next_role.strip() or "EOS"
            found.append(f"the chat template closes no turn with a special token: {ends} is learnt as an answer's end")
        return found

    def examples(self, row: Row) -> list[Example] | BadRow:
        """What a row is trained as: one example, or several where the template rewrites history."""
        match row:
            case PlainText():
                return [self._as_written(row.origin, "", row.text)]
            case Completion():
                return [self._as_written(row.origin, row.prompt, row.completion)]
            case Conversation():
                try:
                    return self._conversation(row)
                except TemplateFault as error:
                    return BadRow(row.origin, f"the chat template fails on it: {error}")

    def _as_written(self, origin: Origin, prompt: str, learnt: str) -> Example:
        """The two texts with one BOS and one EOS, theirs where they have them: many sets are written for a model."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        text = prompt + learnt
        ended = text.rstrip()
        while (once := ended.removesuffix(eos).rstrip()).endswith(eos):
            ended = once
        has_eos = ended.endswith(eos)
        text = ended if has_eos else text
        blank = len(text) - len(text.lstrip()) if bos and text.lstrip().startswith(bos) else 0
        has_bos = bool(bos) and text.startswith(bos, blank)
        return Example(
            origin,
            text[blank:],
            ((max(0, len(prompt) - blank), len(text) - blank),),
            special_tokens=not has_bos,
            append_eos=not has_eos,
        )

    def _conversation(self, row: Conversation) -> list[Example] | BadRow:
        """Turns whose prompt goes on from the turn before share its example: that is how servers show them, too."""
        given = {**row.template_arguments, "tools": row.tools}
        template = self._template(row.tools)
        for name in ("tools", "documents"):
            if given.get(name) and not re.search(rf"\b{name}\b", template.source):
                return BadRow(row.origin, f"the chat template does not show its {name}")
        messages = row.messages
        examples: list[Example] = []
        rest = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0 or index in row.not_learnt:
                continue  # a greeting that nothing asks for is what the user answers, not what is learnt
            prompt = template.render(messages[:index], given, prompt=True)
            produced = self._produced(template, prompt, messages[: index + 1], given)
            if isinstance(produced, str):
                return BadRow(row.origin, f"message {index + 1}: {produced}")
            text = prompt + produced.text
            spans: tuple[tuple[int, int], ...] = ((len(prompt), len(text)),)
            if examples and not examples[-1].append_eos and prompt.startswith(examples[-1].text):
                spans = (*examples.pop().spans, *spans)
            elif examples and rest:
                examples[-1] = replace(examples[-1], text=examples[-1].text + rest)
            examples.append(Example(row.origin, text, spans, special_tokens=False, append_eos=produced.append_eos))
            rest = produced.rest
        if not examples:
            return BadRow(row.origin, "no assistant turn to learn")
        if rest:
            last = examples[-1]
            examples[-1] = replace(last, text=_finished(template, messages, given, last.text, rest))
        self._conversations += 1
        self._remarks.update(_remarks(template, messages, examples))
        return examples

    def _produced(
        self, template: ChatTemplate, prompt: str, messages: Sequence[Message], given: Mapping[str, Any]
    ) -> Produced | str:
        """What the model must produce after `prompt` to have said the last message, or why that cannot be told."""
        turn = template.render(messages, given)
        start = template.answer_start(prompt, turn, messages[:-1], given)
        if isinstance(start, str):
            return start
        answer = turn[start:]
        hidden = _hidden(messages[-1], answer)
        if hidden == "thought" and (written := template.written_answer(prompt, messages[-1])):
            answer, hidden = written, None
        return (
            template.close(messages[-1], answer) if hidden is None else f"the chat template does not show its {hidden}"
        )

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


def _finished(
    template: ChatTemplate, messages: Sequence[Message], given: Mapping[str, Any], text: str, rest: str
) -> str:
    """The text of the last example as the conversation goes on, where the template shows it so."""
    if messages[-1]["role"] == "assistant":
        return text + rest
    whole = template.render(messages, given)
    return whole if whole.startswith(text) else text + rest


_UNCLOSED = "the answer does not close the thought that the generation prompt opens"
_MERGED = "the system prompt opens the user's turn, as the chat template has no system role: serve it in the same way"
_NO_SYSTEM = "the chat template shows the system prompt neither here nor when it is served"


def _remarks(template: ChatTemplate, messages: Sequence[Message], examples: Sequence[Example]) -> Iterator[str]:
    if any(message["role"] == "system" for message in messages):
        if not template.shows_system:
            yield _NO_SYSTEM
        elif not template.dialect.system_role:
            yield _MERGED
    if any(
        opens_thought(example.text[:start]) and "</think>" not in example.text[start:end]
        for example in examples
        for start, end in example.spans
    ):
        yield _UNCLOSED


def _hidden(message: Message, shown: str) -> str | None:
    """What an assistant's message has and its template does not show. Silence would be learnt, or to answer without
    thinking."""
    for call in message.get("tool_calls") or []:
        function = call["function"]
        if not _is_in(function["name"], shown):
            return f"call of {function['name']}"
        for word in _words(function["arguments"]):
            if not any(_is_in(form, shown) for form in _forms(word)):
                return f"call of {function['name']} with {word}"
    for key in THOUGHT_KEYS:
        if not _is_in(message.get(key) or "", shown):
            return key
    *thoughts, text = message["content"].split("</think>")
    if not _is_in(text, shown):
        return "content"
    return None if all(_is_in(thought.replace("<think>", ""), shown) for thought in thoughts) else "thought"


def _words(arguments: object) -> Iterator[object]:
    """All names and values in a call's arguments."""
    match arguments:
        case dict():
            for key, value in arguments.items():
                yield key
                yield from _words(value)
        case list():
            for value in arguments:
                yield from _words(value)
        case _:
            yield arguments


def _forms(word: object) -> tuple[str, ...]:
    """How templates write it: as it is, or as JSON."""
    return str(word), json.dumps(word, ensure_ascii=False, default=str), json.dumps(word, default=str)


def _is_in(words: str, text: str) -> bool:
    """Whether they are shown, however the template trims, escapes and quotes them."""
    return words in text or _squeezed(words) in _squeezed(text)


def _squeezed(text: str) -> str:
    """Without what templates trim, escape or put around: blanks, quotes, backslashes."""
    return re.sub(r"""[\s\\"']+""", "", text)
