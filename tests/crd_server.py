"""What an API server does with a custom resource: defaults, structural validation, CEL, columns; and CEL's price.

Written from the documentation of CustomResourceDefinitions and, for the price, from the estimator of cel-go and
Kubernetes' library (checker/cost.go, library/cost.go). Expressions are evaluated by cel-python on RE2; the functions
that Kubernetes adds are below.
"""

import ast
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from math import ceil
from typing import Any

import celpy
import re2
from celpy import celtypes

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Refusal:
    """One line of `The Workspace "x" is invalid`. `by` is "schema", "rule" or "decoding" (an unknown field).

    `message` is the sentence, `said` what the server says, which is with the value where that is a text or a number.
    """

    path: str
    message: str
    by: str = "schema"
    reason: str = "FieldValueInvalid"
    value: Any = None

    @property
    def said(self) -> str:
        if self.by != "rule":
            return self.message
        shown = f"{json.dumps(self.value, ensure_ascii=False)}: " if isinstance(self.value, str | int | float) else ""
        return f"Invalid value: {shown}{self.message}"


# ── CEL ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _find(text: str, regex: str) -> celtypes.StringType:
    match = re2.search(str(regex), str(text))
    return celtypes.StringType(match.group(0) if match else "")


def _find_all(text: str, regex: str) -> celtypes.ListType:
    return celtypes.ListType(
        [celtypes.StringType(match.group(0)) for match in re2.compile(str(regex)).finditer(str(text))]
    )


def _substring(text: str, start: int) -> celtypes.StringType:
    if start > len(text):
        raise ValueError("substring: out of range")
    return celtypes.StringType(str(text)[int(start) :])


def _lower_ascii(text: str) -> celtypes.StringType:
    return celtypes.StringType("".join(c.lower() if c.isascii() else c for c in str(text)))


_FUNCTIONS = {
    "find": _find,
    "findAll": _find_all,
    "substring": _substring,
    "lowerAscii": _lower_ascii,
    "join": lambda texts, between: celtypes.StringType(str(between).join(map(str, texts))),
}


@cache
def _tree(expression: str) -> Any:
    return celpy.Environment().compile(expression)


@cache
def _program(expression: str) -> celpy.Runner:
    return celpy.Environment().program(_tree(expression), functions=_FUNCTIONS)


_program("true")  # cel-python raises the recursion limit with its first program: not in the middle of somebody's test


def evaluate(expression: str, **variables: Any) -> Any:
    return _program(expression).evaluate({name: celpy.json_to_cel(value) for name, value in variables.items()})


# ── create and update ────────────────────────────────────────────────────────────────────────────────────────────────


class CustomResourceServer:
    """The part of an API server that a CRD fills in."""

    def __init__(self, crd: Mapping[str, Any]) -> None:
        self.versions = {version["name"]: version for version in crd["spec"]["versions"]}

    def schema(self, version: str) -> Schema:
        return self.versions[version]["schema"]["openAPIV3Schema"]  # type: ignore[no-any-return]

    def apply(self, written: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> list[Refusal]:
        """What kubectl says, with its strict decoding. Updates never change the status."""
        schema = self.schema(written["apiVersion"].partition("/")[2])
        new = {key: value for key, value in without_nulls(written).items() if key != "status"}
        if unknown := list(_unknown(schema, new, "")):
            return unknown
        new = defaulted(schema, new)
        if refused := refusals_by_schema(schema, new):
            return refused
        return refusals_by_rules(schema, new, old)

    def judge(self, path: str, value: Any) -> list[Refusal]:
        """What the schema at `path` ("tuning.input.urls[]") says of one value."""
        schema = self.schema("v1beta1")
        for name in path.replace("[]", ".[]").split("."):
            schema = schema["items"] if name == "[]" else schema["properties"][name]
        return [*_structural(schema, value, path)] or [*_rules(schema, value, None, path)]

    def apply_status(self, written: Mapping[str, Any]) -> list[Refusal]:
        schema = self.schema(written["apiVersion"].partition("/")[2])["properties"]["status"]
        return [*_unknown(schema, written["status"], "status"), *_structural(schema, written["status"], "status")]


def without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def defaulted(schema: Schema, value: Any) -> Any:
    value = copy.deepcopy(value)
    if isinstance(value, dict):
        for key, below in schema.get("properties", {}).items():
            if key not in value and "default" in below:
                value[key] = copy.deepcopy(below["default"])
            if key in value:
                value[key] = defaulted(below, value[key])
    elif isinstance(value, list) and "items" in schema:
        value = [defaulted(schema["items"], each) for each in value]
    return value


def _unknown(schema: Schema, value: Any, path: str) -> Iterator[Refusal]:
    if isinstance(value, Mapping):
        known = schema.get("properties", {})
        for key, each in value.items():
            where = f"{path}.{key}".lstrip(".")
            if path == "metadata":
                continue
            if key in known:
                yield from _unknown(known[key], each, where)
            elif "additionalProperties" in schema:
                yield from _unknown(schema["additionalProperties"], each, where)
            elif not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield Refusal(where, f'strict decoding error: unknown field "{where}"', "decoding")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _unknown(schema.get("items", {}), each, f"{path}[{index}]")


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
}


def _structural(schema: Schema, value: Any, path: str) -> Iterator[Refusal]:
    kind = schema.get("type")
    if kind in _TYPES and not _TYPES[kind](value):
        found = _json_type(value)
        said = f'Invalid value: "{found}": {_in_body(path)} must be of type {kind}: "{found}"'
        yield Refusal(path, said, reason="FieldValueTypeInvalid")
        return
    if kind == "object":
        for key in schema.get("required", ()):
            if key not in value:
                yield Refusal(f"{path}.{key}".lstrip("."), "Required value", reason="FieldValueRequired")
        if len(value) > schema.get("maxProperties", len(value)):
            yield Refusal(path, "must have at most properties", reason="FieldValueTooMany")
        for key, each in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(below, Mapping) and key != "metadata":
                yield from _structural(below, each, f"{path}.{key}".lstrip("."))
    elif kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            said = f"Too many: {len(value)}: must have at most {schema['maxItems']} items"
            yield Refusal(path, said, reason="FieldValueTooMany")
        for index, each in enumerate(value):
            yield from _structural(schema.get("items", {}), each, f"{path}[{index}]")
    elif kind == "string":
        yield from _of_text(schema, value, path)
    elif kind in ("integer", "number"):
        if value < schema.get("minimum", value):
            said = f"should be greater than or equal to {schema['minimum']}"
            yield Refusal(path, f"Invalid value: {value}: {_in_body(path)} {said}")
        if value > schema.get("maximum", value):
            said = f"should be less than or equal to {schema['maximum']}"
            yield Refusal(path, f"Invalid value: {value}: {_in_body(path)} {said}")


def _of_text(schema: Schema, value: str, path: str) -> Iterator[Refusal]:
    if len(value) > schema.get("maxLength", len(value)):
        said = f"Too long: may not be more than {schema['maxLength']} bytes"
        yield Refusal(path, said, reason="FieldValueTooLong")
    if "enum" in schema and value not in schema["enum"]:
        choices = ", ".join(f'"{each}"' for each in schema["enum"])
        said = f'Unsupported value: "{value}": supported values: {choices}'
        yield Refusal(path, said, reason="FieldValueNotSupported")
    if "pattern" in schema and not re2.search(schema["pattern"], value):
        yield Refusal(path, f"Invalid value: \"{value}\": {_in_body(path)} should match '{schema['pattern']}'")


def _in_body(path: str) -> str:
    """The status is validated apart, and its fields are named from there."""
    return f"{path.removeprefix('status.')} in body"


def _json_type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def refusals_by_schema(schema: Schema, value: Any) -> list[Refusal]:
    """What types, lengths, choices and required fields say of a whole object."""
    return list(_structural(schema, value, ""))


def has_rules(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        return "x-kubernetes-validations" in schema or any(map(has_rules, schema.values()))
    return isinstance(schema, list) and any(map(has_rules, schema))


def refusals_by_rules(schema: Schema, new: Any, old: Any) -> list[Refusal]:
    """What the CEL rules say of a whole object and, in an update, of what becomes of the old one."""
    return list(_rules(schema, defaulted(schema, new), None if old is None else defaulted(schema, old), ""))


def _rules(schema: Schema, value: Any, old: Any, path: str) -> Iterator[Refusal]:
    """Where an old value is at the same place, rules with `oldSelf` count; items of atomic lists have no old value."""
    for rule in schema.get("x-kubernetes-validations", ()):
        variables = {"self": value}
        if "oldSelf" in rule["rule"]:
            if old is None:
                continue
            variables["oldSelf"] = old
        if not evaluate(rule["rule"], **variables):
            said = str(evaluate(rule["messageExpression"], **variables)) if "messageExpression" in rule else ""
            where = f"{path}{rule.get('fieldPath', '')}".lstrip(".")
            sentence = rule["message"] if not said or "\n" in said else said.strip()
            yield Refusal(where, sentence, "rule", value=None if "fieldPath" in rule else value)
    if isinstance(value, Mapping):
        for key, each in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if below is not None:
                before = old.get(key) if isinstance(old, Mapping) else None
                yield from _rules(below, each, before, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _rules(schema["items"], each, None, f"{path}[{index}]")


# ── kubectl get ──────────────────────────────────────────────────────────────────────────────────────────────────────


def json_path(value: Any, path: str) -> Any:
    """The first value at a JSONPath of field names and `[?(@.key=="text")]`, or None."""
    for name, key, text in re.findall(r'\.(\w+)|\[\?\(@\.(\w+)=="(\w+)"\)\]', path):
        if name:
            value = value.get(name) if isinstance(value, Mapping) else None
        else:
            value = next((each for each in value or () if each.get(key) == text), None)
        if value is None:
            return None
    return value


def table(version: Schema, objects: list[Mapping[str, Any]], now: datetime, *, wide: bool = False) -> str:
    """As `kubectl get` prints it (with `-o wide`): columns three spaces apart, as wide as what is in them."""
    columns = [each for each in version["additionalPrinterColumns"] if wide or not each.get("priority")]
    rows = [["NAME", *(each["name"].upper() for each in columns)]]
    rows += [[each["metadata"]["name"], *(_cell(each, column, now) for column in columns)] for each in objects]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def _cell(value: Mapping[str, Any], column: Schema, now: datetime) -> str:
    found = json_path(value, column["jsonPath"])
    if found is None:
        return "<none>" if column["type"] == "date" else ""
    if column["type"] == "date":
        return _age(now - datetime.fromisoformat(found.replace("Z", "+00:00")).astimezone(UTC))
    return str(found)


def _age(age: timedelta) -> str:
    minutes = int(age.total_seconds() // 60)
    if minutes < 180:
        return f"{minutes}m"
    return f"{minutes // 60}h" if minutes < 60 * 48 else f"{minutes // 60 // 24}d"


# ── what the API server thinks that a rule costs ─────────────────────────────────────────────────────────────────────

EXPRESSION_LIMIT, CRD_LIMIT, RUNTIME_LIMIT = 10_000_000, 100_000_000, 10_000_000
_REQUEST_BYTES = 3 * 1024 * 1024
_UNKNOWN = float("inf")  # of whose size nothing is known is taken to be 2^64 long
_TRAVERSAL, _REGEX = 0.1, 0.25


@dataclass(frozen=True)
class _Estimate:
    """Of an expression: what it costs, how long its value is, and the schema where it has one.

    `item` is the length of an item of a list that a function made: of those a field has, the schema tells.
    """

    cost: float
    size: float = 1
    schema: Schema | None = None
    item: float | None = None


@dataclass(frozen=True)
class _Estimator:
    """cel-go's checker/cost.go with k8s.io/apiserver/pkg/cel/library/cost.go, and apiextensions' sizeEstimator."""

    root: Schema
    variables: Mapping[str, _Estimate] = field(default_factory=dict)

    @classmethod
    def on(cls, schema: Schema) -> "_Estimator":
        whole = _Estimate(1, _size(schema), schema)
        return cls(schema, {"self": whole, "oldSelf": whole})

    def of(self, tree: Any) -> _Estimate:
        kind, parts = str(tree.data), tree.children
        if len(parts) == 1 and kind not in ("literal", "ident", "list_lit"):
            return self.of(parts[0])
        return getattr(self, f"_{kind}")(parts)  # type: ignore[no-any-return]

    def _literal(self, parts: list[Any]) -> _Estimate:
        return _Estimate(0, len(_text(str(parts[0]))) if parts[0].type == "STRING_LIT" else 1)

    def _ident(self, parts: list[Any]) -> _Estimate:
        return self.variables[str(parts[0])]

    def _list_lit(self, parts: list[Any]) -> _Estimate:
        items = [self.of(each) for each in parts[0].children] if parts and parts[0] is not None else []
        return _Estimate(
            10 + sum(each.cost for each in items), len(items), item=max((e.size for e in items), default=0)
        )

    def _expr(self, parts: list[Any]) -> _Estimate:
        condition, yes, no = map(self.of, parts)
        return _Estimate(condition.cost + max(yes.cost, no.cost), max(yes.size, no.size))

    def _conditionalor(self, parts: list[Any]) -> _Estimate:
        return _Estimate(sum(self.of(each).cost for each in parts))

    _conditionaland = _conditionalor

    def _unary(self, parts: list[Any]) -> _Estimate:
        return _Estimate(self.of(parts[1]).cost + 1)

    def _relation(self, parts: list[Any]) -> _Estimate:
        left, right = self.of(parts[0].children[0]), self.of(parts[1])
        cost = left.cost + right.cost
        if parts[0].data == "relation_in":
            return _Estimate(cost + right.size)
        return _Estimate(cost + _times(min(left.size, right.size), _TRAVERSAL))

    def _addition(self, parts: list[Any]) -> _Estimate:
        left, right = self.of(parts[0].children[0]), self.of(parts[1])
        size = left.size + right.size
        return _Estimate(left.cost + right.cost + _times(size, _TRAVERSAL), size)

    def _member_dot(self, parts: list[Any]) -> _Estimate:
        of = self.of(parts[0])
        assert of.schema is not None
        schema = of.schema["properties"][str(parts[1])]
        return _Estimate(of.cost + 1, _size(schema), schema)

    def _member_index(self, parts: list[Any]) -> _Estimate:
        of, index = self.of(parts[0]), self.of(parts[1])
        # The way to an item of what a function made ends at the root: it is taken to be as long as `self`.
        schema = of.schema["items"] if of.schema else self.root
        return _Estimate(of.cost + index.cost + 1, _size(schema), of.schema and schema)

    def _ident_arg(self, parts: list[Any]) -> _Estimate:
        assert parts[0] == "has", parts[0]
        return _Estimate(self.of(parts[1].children[0]).cost)

    def _member_dot_arg(self, parts: list[Any]) -> _Estimate:
        of, name = self.of(parts[0]), str(parts[1])
        arguments = parts[2].children if len(parts) > 2 and parts[2] is not None else []
        if name in ("all", "exists", "filter", "map"):
            variable = str(next(iter(arguments[0].scan_values(lambda _: True))))
            item = of.schema["items"] if of.schema else self.root
            known = _Estimate(1, _size(item) if of.item is None else of.item, item)
            body = _Estimator(self.root, {**self.variables, variable: known}).of(arguments[1])
            return _Estimate(of.cost + of.size * (body.cost + 3), of.size)
        given = [self.of(each) for each in arguments]
        cost = of.cost + sum(each.cost for each in given)
        if name in ("matches", "find", "findAll"):
            cost += _times(of.size + 1, _TRAVERSAL) * _times(given[0].size, _REGEX)
            return _Estimate(cost, of.size if name != "matches" else 1)
        if name == "contains":
            return _Estimate(cost + _times(of.size, _TRAVERSAL) * _times(given[0].size, _TRAVERSAL))
        if name in ("lowerAscii", "substring"):
            return _Estimate(cost + _times(of.size, _TRAVERSAL), of.size)
        if name == "join":
            item_size = _size(of.schema["items"]) if of.schema else _UNKNOWN
            size = of.size * item_size + given[0].size * max(of.size - 1, 0)
            return _Estimate(cost + _times(size, _TRAVERSAL), size)
        assert name == "size", name
        return _Estimate(cost + 1)


def _text(literal: str) -> str:
    return literal[2:-1] if literal.startswith("r") else str(ast.literal_eval(literal))


def _times(size: float, factor: float) -> float:
    return _UNKNOWN if size == _UNKNOWN else ceil(size * factor)


def _size(schema: Schema) -> float:
    match schema["type"]:
        case "string":
            return schema["maxLength"] * 4 if "maxLength" in schema else _REQUEST_BYTES - 2  # type: ignore[no-any-return]
        case "array":
            return schema.get("maxItems", _REQUEST_BYTES)  # type: ignore[no-any-return]
        case "object" if "additionalProperties" in schema:
            return schema.get("maxProperties", _REQUEST_BYTES)  # type: ignore[no-any-return]
        case "object":
            return 0
    return 1


@dataclass(frozen=True)
class Price:
    """The estimate for one rule at all the places where it may stand, and for its message, which is made once."""

    path: str
    rule: str
    holds: float
    message: float


def prices(schema: Schema, path: str = "", places: float = 1) -> Iterator[Price]:
    for rule in schema.get("x-kubernetes-validations", ()):
        estimator = _Estimator.on(schema)
        holds, message = (
            estimator.of(_tree(text)).cost if text else 0 for text in (rule["rule"], rule.get("messageExpression"))
        )
        yield Price(path, rule["rule"], holds * places, message)
    for key, below in schema.get("properties", {}).items():
        yield from prices(below, f"{path}.{key}".lstrip("."), places)
    if "items" in schema:
        yield from prices(schema["items"], f"{path}[]", places * schema.get("maxItems", _REQUEST_BYTES))
    if "additionalProperties" in schema:
        yield from prices(schema["additionalProperties"], f"{path}[]", places * schema.get("maxProperties", 1e6))


def too_dear(schema: Schema) -> list[tuple[str, str]]:
    """Where in a schema a server finds a rule too dear, and what it says."""
    found: list[tuple[str, str]] = []
    spent: list[tuple[float, str]] = []
    for where, cost, what in _expressions(schema, "", 1):
        spent.append((cost, where))
        if cost > EXPRESSION_LIMIT:
            found.append((where, _exceeds(what, cost, EXPRESSION_LIMIT)))
    total = sum(cost for cost, _ in spent)
    if total > CRD_LIMIT:
        dear = sorted((each for each in spent if each[0] >= CRD_LIMIT / 100), key=lambda each: -each[0])[:4]
        said = "Forbidden: contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema"
        found += [(where, said) for _, where in dear]
        what = "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema"
        found.append(("", _exceeds(what, total, CRD_LIMIT)))
    return found


def _expressions(schema: Schema, path: str, places: float) -> Iterator[tuple[str, float, str]]:
    for index, rule in enumerate(schema.get("x-kubernetes-validations", ())):
        (price, *_) = prices({**schema, "x-kubernetes-validations": [rule]})
        where = f"{path}.x-kubernetes-validations[{index}]"
        yield f"{where}.rule", price.holds * places, "estimated rule cost"
        if "messageExpression" in rule:
            yield f"{where}.messageExpression", price.message, "estimated messageExpression cost"
    for key, below in schema.get("properties", {}).items():
        yield from _expressions(below, f"{path}.properties[{key}]", places)
    if "items" in schema:
        yield from _expressions(schema["items"], f"{path}.items", places * schema.get("maxItems", _REQUEST_BYTES))
    if "additionalProperties" in schema:
        most = schema.get("maxProperties", 1e6)
        yield from _expressions(schema["additionalProperties"], f"{path}.additionalProperties", places * most)


def _exceeds(what: str, cost: float, limit: float) -> str:
    factor = cost / limit
    shown = "more than 100" if factor > 100 else f"{factor:f}" if factor < 1.5 else f"{factor:.1f}"
    return (
        f"Forbidden: {what} exceeds budget by factor of {shown}x (try simplifying the rule, or adding maxItems, "
        "maxProperties, and maxLength where arrays, maps, and strings are declared)"
    )
