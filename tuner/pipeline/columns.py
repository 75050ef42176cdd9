"""Which column is what: one table of known names, and how a row's columns together make a conversation or a text.

    shape               columns                                                            becomes
    messages            messages, conversations or conversation (+ tools, system; an       Conversation
                        answer beside turns that end with a question)
    prompt/response     prompt and completion alone: TRL's form, two texts as they are     Completion
                        any other question and its answer (+ system, history, context,     Conversation
                        choices, tools, reasoning)
    text                text                                                               PlainText

Each row has the shape of the columns that are filled in it, so a column that only late rows have is read in those.
Whatever columns a shape does not read are counted by name (`unread`); preference pairs and pictures stop the run.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from string import Formatter
from types import MappingProxyType
from typing import Any, Literal

from tuner.errors import DataError, did_you_mean
from tuner.pipeline.messages import MEDIA, Messages, is_empty, parsed, tools_of, turns_in
from tuner.pipeline.rows import (
    Completion,
    Conversation,
    Origin,
    PlainText,
    Row,
    Unusable,
    filled_text,
    listed,
    text_of,
    type_name,
)
from tuner.training_settings import ColumnRole, DatasetSettings

Role = ColumnRole | Literal["preference", "media"]

# Within a role the first name goes before the others, where several may stand in one file.
_NAMES: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        "messages": ("messages", "conversations", "conversation"),
        "prompt": ("instruction", "prompt", "question", "query"),
        "response": ("output", "completion", "response", "answer"),
        "context": ("input", "context"),
        "text": ("text",),
        "system": ("system", "system_prompt"),
        "history": ("history",),
        "tools": ("tools", "functions"),
        "choices": ("choices", "options"),
        "reasoning": ("reasoning_content", "reasoning", "thinking"),
        "documents": ("documents",),
        "chat_template_kwargs": ("chat_template_kwargs",),
        "label": ("label", "kto_tag"),
        "split": ("split",),
        "preference": (
            *("chosen", "rejected", "rejected_response", "rejected_messages", "preferred_output"),
            *("non_preferred_output", "chosen_response"),
        ),
        "media": MEDIA,
    }
)
KNOWN: Mapping[str, Role] = MappingProxyType({name: role for role, names in _NAMES.items() for name in names})
_SHAPE_ROLES: tuple[Role, ...] = (
    "messages",
    "prompt",
    "response",
    "text",
)  # one of them is named: others are not known
_EXTRA_ROLES: tuple[Role, ...] = ("system", "history", "tools", "documents", "chat_template_kwargs")
_RAW = ("prompt", "completion")  # TRL's names for two texts that follow each other as they are
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERS = _ALPHABET[:10]  # columns of the choices of a question, as in CEval and MMLU
_A_TYPO = 0.8  # a likeness that words of another meaning do not have
_STOPS: Mapping[Role, tuple[str, str]] = MappingProxyType(
    {
        "preference": (
            "pairs of a preferred and a rejected answer, for DPO: a supervised run cannot learn them",
            "to learn one of the answers, name it: DatasetConfig.columns: {{prompt: prompt, {column}: response}}; to "
            "leave the column out: {{{column}: ignored}}",
        ),
        "media": (
            "pictures, sound or video, and only text is trained on",
            "take these rows out, or train on their text alone: DatasetConfig.columns: {{{column}: ignored}}",
        ),
    }
)
# What a template is rendered with whatever a row says.
_OURS = frozenset({"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"}) | {
    *("tokenize", "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}

Build = Callable[[Origin, Mapping[str, Any], Counter[str]], Row]


@dataclass(frozen=True, slots=True)
class Shape:
    """`columns` are read; `build` raises Unusable, and counts in the Counter what else of a row is not read."""

    name: str
    columns: frozenset[str]
    build: Build
    has_answer: bool = True
    beside: tuple[str, ...] = ()  # what is read beyond what the name says


class Roles:
    """What each column of a file is, by DatasetConfig and else by its name."""

    def __init__(
        self, settings: DatasetSettings, present: Sequence[str], filled: Mapping[str, int], source: str, *, chat: bool
    ) -> None:
        """`present`: every column of the file, `filled`: in how many rows it says something. `chat`: the model has a
        chat template.

        Raises DataError for a column that is named and not there.
        """
        named: Mapping[str, Role] = settings.named_columns
        self._settings = settings
        self._source = source
        self._chat = chat
        self._template = settings.prompt_columns
        for column in dict.fromkeys((*named, *self._template)):
            if column not in present:
                raise DataError(
                    f"{source}: no column {column!r}; the file has {listed(present)}",
                    hint=did_you_mean(column, present) or f"set DatasetConfig.{settings.naming(column)} to one of them",
                )
        given: set[Role] = {*named.values()}
        if self._template:
            given |= {"prompt", "context"}
        self._is_named = bool(given & {*_SHAPE_ROLES})
        self._ignored = frozenset(column for column, role in named.items() if role == "ignored")
        known = {column: role for column in present if (role := KNOWN.get(column)) and self._is_known(role, given)}
        self._roles: Mapping[str, Role] = {**known, **named}
        letters = takewhile(lambda letter: letter in present, _LETTERS)
        self._letters = tuple(letters) if "A" in present and "B" in present and "choices" not in given else ()
        # All rows of a file are raw text or none is: what one row has beside prompt and response needs a chat turn.
        beside = [
            column for role in ("context", "choices", "reasoning", *_EXTRA_ROLES) for column in self.columns(role)
        ]
        self._has_more = any(filled.get(column) for column in (*beside, *self._letters))

    def _is_known(self, role: Role, given: Collection[Role]) -> bool:
        """Whether a column of this role is known by its own name beside those roles that somebody gave to columns."""
        if role in given:
            return False
        if not self._is_named or role not in ("context", "preference", *_SHAPE_ROLES):
            return True
        # What completes a prompt or a response that was named alone.
        return (
            role in ("prompt", "response", "context")
            and not {"messages", "text"} & {*given}
            and not ({"prompt", "response"} <= {*given})
        )

    def columns(self, role: Role) -> list[str]:
        """The columns of this role, in the order of the table."""
        names = _NAMES.get(role, ())
        found = [column for column, known in self._roles.items() if known == role]
        return sorted(found, key=lambda column: names.index(column) if column in names else -1)

    def is_ignored(self, column: str) -> bool:
        return column in self._ignored

    def is_of_use(self, column: str) -> bool:
        """Whether it must be read to tell what a row is."""
        role = self._roles.get(column)
        return role not in (None, "ignored", "media") or column in self._letters or column in self._template

    def stop(self, filled: Mapping[str, int]) -> None:
        """DataError where rows have what a supervised run must not train on. `filled`: column → rows that have it."""
        for role, (what, hint) in _STOPS.items():
            found = [column for column in self.columns(role) if filled.get(column)]
            if found:
                rows = max(filled[column] for column in found)
                raise DataError(
                    f"{self._source}: {rows:,} {'row has' if rows == 1 else 'rows have'} {what} "
                    f"({'column' if len(found) == 1 else 'columns'} {listed(found)})",
                    hint=hint.format(column=found[0]),
                )

    def shape_of(self, filled: Sequence[str]) -> Shape | str:
        """What a row with these columns is, or why that cannot be told ("" for nothing that is known)."""
        there = {*filled}
        by: dict[Role, list[str]] = {role: [name for name in self.columns(role) if name in there] for role in _NAMES}
        if by["messages"]:
            return self._messages_shape(by)
        if not by["prompt"] and not self._template and "input" in by["context"]:
            by["prompt"], by["context"] = ["input"], [name for name in by["context"] if name != "input"]
        if not self._is_named and there >= {*_RAW}:
            by["prompt"], by["response"] = [_RAW[0]], [_RAW[1]]
        has_prompt = bool(by["prompt"]) or bool(there & {*self._template})
        if has_prompt and by["response"]:
            for role in ("prompt", "response"):
                if len(by[role]) > 1:
                    return f"{' and '.join(by[role])} could each be the {role}"
            letters = tuple(letter for letter in self._letters if letter in there)
            return self._answer_shape(by, letters if len(letters) > 1 else ())
        if not by["text"]:
            return ""
        beside = [*by["prompt"], *by["response"]]
        if beside and not self._is_named:
            return f"{listed(beside)} beside text: a prompt, or its answer?"
        return _text_shape(by["text"][0])

    def unknown(self, present: Sequence[str], why: str) -> DataError:
        """What to raise of a file of no known shape."""
        near = {column: get_close_matches(column.strip().lower(), KNOWN, 1, _A_TYPO) for column in present}
        meant = [f"{column!r} as {found[0]}" for column, found in near.items() if found and column not in KNOWN]
        return DataError(
            f"{self._source}: rows of no known shape{f' ({why})' if why else ''}; the file has {listed(present)}",
            hint=(f"is {' and '.join(meant)} meant? " if meant else "")
            + "say what the columns are: DatasetConfig.columns: {COLUMN: prompt, OTHER: response}, or messages, text, "
            "system, …; known without that are messages, conversations, prompt/completion, instruction/input/output, "
            "question/answer and text",
        )

    # ── shapes ──

    def _messages_shape(self, by: Mapping[Role, Sequence[str]]) -> Shape:
        """Turns, and the answer to the last of them where that has a column of its own."""
        column = by["messages"][0]
        answer = by["response"][0] if len(by["response"]) == 1 else None

        def build(origin: Origin, record: Mapping[str, Any], unread: Counter[str]) -> Row:
            found = Messages(unread)
            found.add(record.get(column), column)
            if answer and not is_empty(record.get(answer)):
                if found.ends_with_answer:
                    unread[answer] += 1
                else:
                    _add_answer(found, record[answer], answer)
            return self._conversation(origin, record, found, by)

        beside = [*([answer] if answer else []), *_first_of(by, _EXTRA_ROLES)]
        return Shape(column, frozenset({column, *beside}), build, beside=tuple(beside))

    def _answer_shape(self, by: Mapping[Role, Sequence[str]], letters: Sequence[str]) -> Shape:
        """A question, asked in one column or put together by the template, and its answer."""
        prompt = by["prompt"][0] if not self._template else None
        response = by["response"][0]
        contexts = [] if self._template else by["context"]
        beside = [*_first_of(by, ("choices", "reasoning", *_EXTRA_ROLES)), *letters]
        is_raw = self._is_raw(prompt, response)
        choices = _first_of(by, ("choices",))

        def build(origin: Origin, record: Mapping[str, Any], unread: Counter[str]) -> Row:
            asked, answer = record.get(prompt) if prompt else None, record.get(response)
            asks_in_turns = isinstance(asked, list) or turns_in(asked)
            if is_raw and not asks_in_turns and not isinstance(answer, list | dict):
                return Completion(origin, self._asked(record, prompt, contexts), filled_text(answer, response))
            found = Messages(unread)
            for column in by["history"][:1]:
                if not is_empty(record.get(column)):
                    found.add_pairs(record[column], column)
            if prompt and asks_in_turns:
                found.add(asked, prompt)
                found.learns_nothing_so_far()
                unread.update(name for name in (*contexts, *choices, *letters) if not is_empty(record.get(name)))
            else:
                text = self._asked(record, prompt, contexts)
                options = _choices(record, choices, letters)
                found.add_text("user", f"{text}\n\n{options}" if options else text)
            _add_answer(found, answer, response)
            for column in by["reasoning"][:1]:
                if not is_empty(record.get(column)):
                    found.messages[-1].setdefault("reasoning_content", text_of(record[column], column))
            return self._conversation(origin, record, found, by)

        more = [*contexts, *([] if is_raw else beside)]
        read = {*self._template, *([prompt] if prompt else []), response, *more}
        return Shape(f"{prompt or 'prompt_template'}/{response}", frozenset(read), build, beside=tuple(more))

    def _is_raw(self, prompt: str | None, response: str) -> bool:
        """Whether two texts follow each other as they are, without a chat template."""
        if self._settings.raw_text is not None:
            return self._settings.raw_text
        if self._has_more:
            return False
        return not self._chat if self._is_named else (prompt, response) == _RAW

    def _asked(self, record: Mapping[str, Any], prompt: str | None, contexts: Sequence[str]) -> str:
        if prompt is None:
            values = {column: _in_template(record.get(column), column) for column in self._template}
            if not any(values.values()):
                verb = "is" if len(values) == 1 else "are"
                raise Unusable(f"{' and '.join(self._template)} {verb} empty")
            parts = Formatter().parse(self._settings.prompt_template or "")
            text = "".join(before + (values[name] if name else "") for before, name, _, _ in parts)
            return filled_text(text, "the prompt of prompt_template")
        texts = [text_of(record[name], name) for name in (prompt, *contexts) if not is_empty(record.get(name))]
        filled = [text for text in texts if text.strip()]
        if not filled:
            raise Unusable(f"{prompt} is empty")
        return "\n\n".join(filled)

    def _conversation(
        self, origin: Origin, record: Mapping[str, Any], found: Messages, by: Mapping[Role, Sequence[str]]
    ) -> Conversation:
        for column in by["system"][:1]:
            found.add_system(record.get(column), column)
        if self._settings.system_prompt:
            found.add_system(self._settings.system_prompt, "DatasetConfig.system_prompt")
        tools = [tools_of(record.get(column), column) for column in by["tools"][:1]]
        arguments: dict[str, Any] = {}
        for column in by["chat_template_kwargs"][:1]:
            arguments |= _template_arguments(record.get(column), column)
        for column in by["documents"][:1]:
            arguments |= _documents(record.get(column), column)
        if found.learnt == 0:
            some = " to learn" if any(message["role"] == "assistant" for message in found.messages) else ""
            raise Unusable(f"no assistant turn{some}")
        return Conversation(
            origin,
            found.messages,
            next(filter(None, tools), None) or tools_of(found.tools, "messages[].tools"),
            frozenset(found.not_learnt),
            arguments,
        )


def _text_shape(column: str) -> Shape:
    def build(origin: Origin, record: Mapping[str, Any], _unread: Counter[str]) -> Row:
        return PlainText(origin, filled_text(record.get(column), column))

    return Shape(column, frozenset({column}), build, has_answer=False)


def _first_of(by: Mapping[Role, Sequence[str]], roles: Sequence[Role]) -> list[str]:
    return [column for role in roles for column in by[role][:1]]


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _add_answer(found: Messages, answer: object, column: str) -> None:
    if isinstance(answer, list) or turns_in(answer):
        found.add(answer, column)
    elif isinstance(answer, dict):
        found.add_turn({"role": "assistant", **answer} if "from" not in answer else answer, column, column)
    else:
        found.add_text("assistant", filled_text(answer, column))


def _in_template(value: object, column: str) -> str:
    """Text as it is, a number as it is written, and nothing for what is missing."""
    if is_empty(value):
        return ""
    return text_of(str(value) if isinstance(value, int | float) else value, column)


def _choices(record: Mapping[str, Any], columns: Sequence[str], letters: Sequence[str]) -> str:
    """The choices of a question, one a line after its letter; "" where there are none. Raises Unusable."""
    options: list[tuple[str, Any]] = [
        (letter, record[letter]) for letter in letters if not is_empty(record.get(letter))
    ]
    for column in columns:
        value = record.get(column)
        if is_empty(value):
            continue
        if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
            return text_of(value, column)
        value = parsed(value, column)
        if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
            options += zip(value["label"], value["text"], strict=False)
        elif isinstance(value, dict):
            options += value.items()
        elif isinstance(value, list) and all(isinstance(each, dict) and "text" in each for each in value):
            options += [
                (each.get("label", letter), each["text"]) for letter, each in zip(_ALPHABET, value, strict=False)
            ]
        elif isinstance(value, list) and len(value) <= len(_ALPHABET):
            options += zip(_ALPHABET, value, strict=False)
        else:
            raise Unusable(f"{column} is {type_name(value)}, not a list of choices")
    for letter, option in options:
        if not isinstance(option, str | int | float):
            raise Unusable(f"the choice {letter} is {type_name(option)}, not text")
    return "\n".join(f"{letter}. {option}" for letter, option in options)


def _template_arguments(value: object, column: str) -> dict[str, Any]:
    if is_empty(value):
        return {}
    arguments = parsed(value, column)
    if not isinstance(arguments, dict):
        raise Unusable(f"{column} is {type_name(arguments)}, not an object")
    if ours := _OURS & arguments.keys():
        raise Unusable(f"{column} sets {', '.join(sorted(ours))}, which training decides")
    return {name: argument for name, argument in arguments.items() if argument is not None}


def _documents(value: object, column: str) -> dict[str, Any]:
    if is_empty(value):
        return {}
    documents = parsed(value, column)
    if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
        raise Unusable(f"{column} is {type_name(documents)}, not a list of objects")
    return {"documents": documents}
