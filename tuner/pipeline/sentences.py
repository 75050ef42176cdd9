"""The sentences of canary.json, written as the run's own rows are: fixed texts, nobody's data.

Four are a question and its answer, which an adapter of any task answers otherwise than its base; two are plain English
that no row format touches.
"""

from collections.abc import Mapping
from typing import Any

from tuner.pipeline.labels import Example, Labeller
from tuner.pipeline.rows import BadRow, Completion, Conversation, Origin, PlainText, Row
from tuner.runspec import RowFormat, Sentence

_ASKED = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Tom has 12 apples and buys 30 more. How many apples does he have now?", "12 + 30 = 42, so Tom has 42 apples."),
    (
        "Write one sentence about the sea.",
        "The sea is grey and calm in the morning, when the boats come home.",
    ),
    ("Which of these is a fruit: a hammer, a pear or a shoe?", "A pear is a fruit; a hammer and a shoe are not."),
)
_GENERAL = (
    "The old bridge was closed in the spring, so the trains had to take the longer way around the lake.",
    "Water boils at a lower temperature in the mountains, because the air above it weighs less there.",
)
_NOWHERE = Origin("canary", 1)


def row_format(row: Row) -> RowFormat:
    """How a row is rendered: by the chat template, as two texts, or as one."""
    match row:
        case Conversation():
            return "messages"
        case Completion():
            return "prompt/completion"
        case PlainText():
            return "text"


def canary_sentences(labeller: Labeller, formats: Mapping[RowFormat, int]) -> tuple[Sentence, ...]:
    """Six sentences: four in the row format that most rows of the run have, two as text."""
    most = main_format(formats)
    asked = [_sentence(labeller, _asked_as(most, question, answer)) for question, answer in _ASKED]
    return (*asked, *(_sentence(labeller, PlainText(_NOWHERE, text), ends=False) for text in _GENERAL))


def main_format(formats: Mapping[RowFormat, int]) -> RowFormat:
    """The one that most rows have; of equals the one with more of a template."""
    order: tuple[RowFormat, ...] = ("messages", "prompt/completion", "text")
    return max(order, key=lambda name: formats.get(name, 0))


def _asked_as(name: RowFormat, question: str, answer: str) -> Row:
    match name:
        case "messages":
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return Conversation(_NOWHERE, turns)
        case "prompt/completion":
            return Completion(_NOWHERE, f"{question}\n", answer)
        case "text":
            return PlainText(_NOWHERE, f"{question}\n{answer}")


def _sentence(labeller: Labeller, row: Row, *, ends: bool = True) -> Sentence:
    """`ends`: with the EOS that a row of this format has."""
    examples = labeller.examples(row)
    if isinstance(examples, BadRow):  # a template that takes no such turn: its words at least
        row, ends = PlainText(_NOWHERE, " ".join(_words(row))), False
        examples = labeller.examples(row)
        assert not isinstance(examples, BadRow)
    (example,) = examples
    if not ends:
        example = Example(example.origin, example.text, example.spans, special_tokens=True, append_eos=False)
    (tokens,) = labeller.tokenize([example])
    ids = tokens.input_ids.tolist()
    # An answer is gone on to from its question, a text from its end.
    prompt = len(ids) - int(example.append_eos) if isinstance(row, PlainText) else int(tokens.supervised.argmax())
    return Sentence(row=_as_data(row), token_ids=tuple(ids), prompt_tokens=prompt)


def _words(row: Row) -> list[str]:
    return [message["content"] for message in row.messages] if isinstance(row, Conversation) else []


def _as_data(row: Row) -> dict[str, Any]:
    match row:
        case Conversation():
            return {"messages": row.messages}
        case Completion():
            return {"prompt": row.prompt, "completion": row.completion}
        case PlainText():
            return {"text": row.text}
