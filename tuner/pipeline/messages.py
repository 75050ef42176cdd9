"""Turns as people write them → messages as chat templates take them, and which of them are learnt.

    written                                                       becomes
    role/content, from/value, or {"user": …, "assistant": …}      role and content
    content as parts, as text, a tool's answer as an object        one text
    function_call and tool_call turns, `function_call`             tool_calls of an assistant's message
    several calls in a row, before any answer to them              one message: they are made at once
    weight, train, training, loss, loss_weight, mask               whether the turn is learnt

A key that means nothing here is counted in `unread`, never passed over in silence.
"""

import ast
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tuner.pipeline.rows import Unusable, filled_text, shortened, text_of, type_name

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),  # ShareGPT: an assistant's call, as JSON
}
_IN_A_PAIR = ("system", "user", "assistant")  # the order of the messages that one {"user": …, "assistant": …} holds
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_PASSED_ON = ("name", "tool_call_id")  # what templates read beside role and content
# A thought is read by most templates as reasoning_content; gpt-oss's reads thinking.
_THOUGHTS = {"reasoning_content": "reasoning_content", "reasoning": "reasoning_content", "thinking": "thinking"}
# Whether a turn is learnt, as OpenAI (weight), Axolotl (train, training), ms-swift (loss), LLaMA-Factory (loss_weight)
# and NeMo (mask, which says the opposite) mark it.
_MARKS = {"weight": True, "train": True, "training": True, "loss": True, "loss_weight": True, "mask": False}
_OF_ANY_TURN = ("train", "training", "loss_weight")  # that teach a user's turn, too, where they are understood so
_MARKS_OF_PARTS = ("train_detail", "training_detail")
_KNOWN_KEYS = frozenset(
    {*_ROLE_KEYS, *_CONTENT_KEYS, *_PASSED_ON, *_THOUGHTS, *_MARKS, *_MARKS_OF_PARTS, "tool_calls", "function_call"}
)
_LONGEST_LITERAL = 100_000  # characters of what is tried as Python
_TEXT_PARTS = (None, "text", "input_text", "output_text")  # Bedrock's have no type, OpenAI's Responses two of their own
_OF_ASSISTANTS = ("tool_calls", "function_call")
MEDIA = ("images", "image", "videos", "video", "audios", "audio", "image_path", "image_url")  # columns and keys
_MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")
_TRUE, _FALSE = frozenset({"true", "1", "1.0", "yes"}), frozenset({"false", "0", "0.0", "no"})


def truth(value: object) -> bool | None:
    """What a mark says, in any spelling of true and false; None for something else."""
    word = str(value).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def is_empty(value: object) -> bool:
    """Whether nothing is said by it: null, NaN, an empty text, list or object."""
    return value is None or value != value or (isinstance(value, str | list | dict) and not value)


class Messages:
    """Messages in the form that templates take, the indexes of those that are not learnt, and tools among them.

    Turns may come in any order: whether a template can do with that is seen when it does.
    """

    def __init__(self, unread: Counter[str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.not_learnt: set[int] = set()
        self.tools: object = None
        self._unread = unread

    @property
    def ends_with_answer(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def learnt(self) -> int:
        """How many turns are learnt."""
        return sum(
            message["role"] == "assistant" and index not in self.not_learnt
            for index, message in enumerate(self.messages)
        )

    def learns_nothing_so_far(self) -> None:
        """What is there is what answers to come are given for."""
        self.not_learnt.update(range(len(self.messages)))

    def add_system(self, value: object, where: str) -> None:
        """A system prompt before all, unless there is one or nothing in it."""
        if is_empty(value) or (self.messages and self.messages[0]["role"] == "system"):
            return
        content = _content(value.get("content", value) if isinstance(value, dict) else value, where)[0]
        if content.strip():
            self.messages.insert(0, {"role": "system", "content": content})
            self.not_learnt = {index + 1 for index in self.not_learnt}

    def add(self, value: object, where: str) -> None:
        """All turns of a conversation. Raises Unusable."""
        turns = _as_list(value, where)
        if not turns:
            raise Unusable(f"{where} is empty")
        for index, turn in enumerate(turns):
            self.add_turn(parsed(turn, f"{where}[{index}]", "message"), f"{where}[{index}]", where)

    def add_text(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": text})

    def add_pairs(self, value: object, where: str) -> None:
        """Earlier turns: a list of [question, answer], or of messages."""
        turns = parsed(value, where)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            self.add(turns, where)
            return
        if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise Unusable(f"{where} is not a list of [question, answer]")
        for index, (question, answer) in enumerate(turns):
            self.add_text("user", text_of(question, f"{where}[{index}][0]"))
            self.add_text("assistant", filled_text(answer, f"{where}[{index}][1]"))

    def add_turn(self, turn: object, where: str, column: str) -> None:
        if not isinstance(turn, dict):
            raise Unusable(f"{where} is {type_name(turn)}, not a message")
        if not any(key in turn for key in _ROLE_KEYS) and (pair := _pair(turn)):
            for key, role in pair:
                self.add_turn({"role": role, "content": turn[key]}, f"{where}.{key}", column)
            self._unread.update(f"{column}[].{key}" for key in turn if key not in dict(pair))
            return
        for key in turn.keys() - _KNOWN_KEYS:
            if is_empty(turn[key]):
                continue
            if key == "tools" and _role(turn, where) == "system":  # GLM-4 and ChatGLM3 write them here
                self.tools = turn[key]
            elif key in MEDIA:
                raise Unusable(f"{where}.{key} is a picture, sound or video, and only text is trained on")
            else:
                self._unread[f"{column}[].{key}"] += 1
        message = _message(turn, where)
        if message is None:
            return
        if message["role"] != "assistant":
            self._unread.update(f"{column}[].{key}" for key in _OF_ASSISTANTS if not is_empty(turn.get(key)))
        learnt = _is_learnt(turn, message["role"], where)
        if learnt is None or message["role"] != "assistant":
            learnt = True
        if self._joins(message, learnt):
            before = self.messages[-1]
            before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
            return
        if not learnt:
            self.not_learnt.add(len(self.messages))
        self.messages.append(message)

    def _joins(self, message: Mapping[str, Any], learnt: bool) -> bool:
        """Whether a call belongs to the assistant's message before it: nothing has come between that the model could
        have answered, so it is made in one turn with it. A call with a thought of its own is a turn of its own."""
        has_more = bool(message["content"]) or any(message.get(key) for key in _THOUGHTS.values())
        if not self.ends_with_answer or not message.get("tool_calls") or has_more:
            return False
        return learnt is (len(self.messages) - 1 not in self.not_learnt)


def _as_list(value: object, where: str) -> list[Any]:
    turns = parsed(value, where)
    if isinstance(turns, dict) and (columns := _columns_of_turns(turns)):
        return columns
    if not isinstance(turns, list):
        raise Unusable(f"{where} is {type_name(turns)}, not a list of messages")
    return turns


def _columns_of_turns(turns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The turns in {"role": [all roles], "content": [all contents]}, as the datasets library stores a Sequence."""
    lists = {key: value for key, value in turns.items() if isinstance(value, list)}
    lengths = {len(value) for value in lists.values()}
    if len(lengths) != 1 or not any(key in lists for key in _ROLE_KEYS):
        return None
    return [
        {key: value[index] for key, value in lists.items() if value[index] is not None}
        for index in range(lengths.pop())
    ]


def _pair(turn: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key and role of the messages that {"human": …, "assistant": …} holds, in their order, or none."""
    roles = {_ROLES.get(key.strip().lower()): key for key, value in turn.items() if not is_empty(value)}
    return [(roles[role], role) for role in _IN_A_PAIR if role in roles]


def _role(turn: Mapping[str, Any], where: str) -> str:
    key = next((key for key in _ROLE_KEYS if not is_empty(turn.get(key))), None)
    written = turn[key] if key else None
    role = _ROLES.get(written.strip().lower()) if isinstance(written, str) else None
    if role is None:
        keys = "" if key else f"; its keys are {', '.join(turn) or 'none'}"
        raise Unusable(
            f"{where}.{key or _ROLE_KEYS[0]} is {shortened(written)}, not system, user, assistant or tool{keys}"
        )
    return role


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """None for a system turn in which nothing stands. Raises Unusable."""
    role = _role(turn, where)
    usual = "value" if "from" in turn else "content"
    content_key = next((key for key in _CONTENT_KEYS if not is_empty(turn.get(key))), usual)
    if content_key not in turn:
        content_key = next((key for key in _CONTENT_KEYS if key in turn), usual)
    content, place = turn.get(content_key), f"{where}.{content_key}"
    if role == "system" and is_empty(content):
        return None
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": tool_calls(content, place)}
    message: dict[str, Any] = {"role": role}
    calls = parsed(turn.get("tool_calls") or turn.get("function_call"), f"{where}.tool_calls")
    thoughts = {name: turn[key] for key, name in _THOUGHTS.items() if not is_empty(turn.get(key))}
    if role == "tool" and not isinstance(content, str) and not _are_parts(content):
        message["content"] = _json_text(content, place)
    elif role == "assistant":
        text, thought, called = ("", "", []) if content is None and calls else _content(content, place)
        if thought:
            thoughts.setdefault("reasoning_content", thought)
        if calls or called:
            given = tool_calls(calls, f"{where}.tool_calls") if calls else []
            message |= {"content": text, "tool_calls": [*given, *called]}
        elif not text.strip():
            raise Unusable(f"{place} is empty: an assistant turn without text and without tool calls")
        else:
            message["content"] = text
    else:
        message["content"] = _content(content, place)[0]
    for key in _PASSED_ON:
        if turn.get(key) is not None:
            message[key] = text_of(turn[key], f"{where}.{key}")
    return message | {name: text_of(thought, f"{where}.{name}") for name, thought in thoughts.items()}


def _is_learnt(turn: Mapping[str, Any], role: str, where: str) -> bool | None:
    """What the turn's marks say; None where it has none. Raises Unusable for what cannot be done."""
    for key in _MARKS_OF_PARTS:
        if not is_empty(turn.get(key)):
            raise Unusable(f"{where}.{key} marks parts of a turn, and a turn is learnt whole or not at all")
    learnt: bool | None = None
    for key, when_true in _MARKS.items():
        if is_empty(turn.get(key)):
            continue
        said = truth(turn[key])
        if said is None:
            raise Unusable(f"{where}.{key} is {shortened(turn[key])}; a turn is learnt or not: 1 or 0, true or false")
        if said and key in _OF_ANY_TURN and role != "assistant":
            raise Unusable(f"{where}.{key} asks to learn a turn of the {role}; only the assistant's are")
        said = said is when_true
        if learnt not in (None, said):
            raise Unusable(f"{where}: its marks contradict each other: {', '.join(k for k in _MARKS if k in turn)}")
        learnt = said
    return learnt


# ── contents ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _are_parts(value: object) -> bool:
    """Whether a tool's answer is parts of content, and not a list that happens to have a type or a text."""
    return isinstance(value, list) and all(
        isinstance(part, dict) and (part.keys() <= {"type", "text", "value"} or part.get("type") in _MEDIA_PARTS)
        for part in value
    )


def _content(value: object, where: str) -> tuple[str, str, list[dict[str, Any]]]:
    """The text, the thought and the calls in a turn's content. Raises Unusable for parts that are no text."""
    if isinstance(value, dict) and ("text" in value or "value" in value):
        value = [value]
    if not isinstance(value, list):
        return text_of(value, where), "", []
    texts, thoughts, calls = [], [], []
    for index, part in enumerate(value):
        place = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or (kind is None and "text" not in part):
            keys = f"; its keys are {', '.join(part)}" if isinstance(part, dict) else ""
            raise Unusable(f"{place} is a part of type {shortened(kind)}; only text can be trained on{keys}")
        key = next((key for key in ("text", "value", "content") if key in part), "text")
        if kind in _TEXT_PARTS:
            texts.append(text_of(part.get(key), f"{place}.{key}"))
        elif kind in ("reasoning", "thinking"):
            key = kind if kind in part else key
            thoughts.append(text_of(part.get(key), f"{place}.{key}"))
        elif kind in ("tool_call", "tool_calls", "function_call"):
            calls += tool_calls(part.get("value", part.get("tool_call", part)), place)
        elif kind == "tool_use":  # Anthropic's
            calls += tool_calls({**part, "arguments": part.get("input")}, place)
        else:
            raise Unusable(f"{place} is a part of type {shortened(kind)}; only text can be trained on")
    return "".join(texts), "".join(thoughts), calls


def tool_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Calls as templates take them: arguments are an object, which they write as JSON themselves. Raises Unusable."""
    calls = parsed(value, where)
    normal = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = parsed(call, where, "call") if isinstance(call, str) else call
        if not isinstance(call, dict) or not isinstance(function := call.get("function", call), dict):
            raise Unusable(f"{where} is {type_name(calls)} that holds no call of a function")
        arguments = parsed(function.get("arguments") or function.get("parameters") or {}, f"{where}.arguments")
        if not isinstance(arguments, dict):
            raise Unusable(f"{where}.arguments is {type_name(arguments)}, not an object")
        name = filled_text(function.get("name"), f"{where}.name")
        _json_text(arguments, f"{where}.arguments")
        identity = {"id": text_of(call["id"], f"{where}.id")} if call.get("id") is not None else {}
        normal.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return normal


def tools_of(value: object, where: str) -> list[dict[str, Any]] | None:
    """Definitions of functions as every server passes them to a template: each in `{"type": "function", …}`.

    Bare ones, Anthropic's (`input_schema`) and the flat ones of OpenAI's Responses API are wrapped. Raises Unusable.
    """
    tools = parsed(value, where) if value else None
    if not tools:
        return None
    tools = [parsed(tool, where) for tool in tools] if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(f"{where} is {type_name(parsed(value, where))}, not a list of objects")
    wrapped = [_wrapped(tool) for tool in tools]
    _json_text(wrapped, where)
    return wrapped


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool or tool.get("type", "function") != "function":
        return tool
    names = {"input_schema": "parameters"} if "parameters" not in tool else {}
    return {"type": "function", "function": {names.get(key, key): tool[key] for key in tool if key != "type"}}


def _json_text(value: object, where: str) -> str:
    if value is None:
        raise Unusable(f"{where} is null")
    return text_of(json.dumps(value, ensure_ascii=False, default=str), where)


# ── JSON in texts ────────────────────────────────────────────────────────────────────────────────────────────────────


def parsed(value: object, where: str, expected: str = "") -> Any:
    """The value itself, or what its JSON text says. Raises Unusable."""
    if not isinstance(value, str):
        return value
    result = json_value(value)
    if isinstance(result, Unusable):
        what = f", not a {expected}, and" if expected else ", but"
        raise Unusable(f"{where} is text{what} {result}")
    return result


def json_value(text: str | bytes) -> Any:
    """The value, or an Unusable that says why there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if is_python(text):
            return Unusable("not JSON, but as Python prints it: json.dumps writes what can be read")
        return Unusable(f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # not UTF-8, numbers of too many digits, too deep
        return Unusable(f"not JSON: {error}")


def is_python(text: str | bytes) -> bool:
    """Whether this is what Python's repr makes of a list or a dict, as `print` and pandas' to_csv write it."""
    written = (text.decode(errors="replace") if isinstance(text, bytes) else text).strip()
    if written.startswith(("{'", "[{'", "['")):  # no JSON begins so
        return True
    if not written.startswith(("{", "[")) or len(written) > _LONGEST_LITERAL:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return isinstance(ast.literal_eval(written), dict | list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def turns_in(value: object) -> bool:
    """Whether a value is a list of turns, as it is or as JSON text. An answer that is JSON is none."""
    if not isinstance(value, str):
        return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
    if not value.lstrip().startswith("[{"):
        return False
    turns = json_value(value)
    return isinstance(turns, list) and all(
        isinstance(turn, dict)
        and any(turn.get(key) in _ROLES for key in _ROLE_KEYS)
        and any(key in turn for key in _CONTENT_KEYS)
        for turn in turns
    )
