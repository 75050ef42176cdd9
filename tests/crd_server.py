"""What an API server does with a custom resource: defaults, structural validation, CEL, columns; and CEL's price.

Written from the documentation of CustomResourceDefinitions and, for the price, from the estimator of cel-go and
Kubernetes' library (checker/cost.go, library/cost.go). Expressions are evaluated by cel-python on RE2; the functions
that Kubernetes adds are below.
"""

import copy
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
    """One line of `The Workspace "x" is invalid`. `by` is "schema", "rule" or "decoding" (an unknown field)."""

    path: str
    message: str
    by: str = "schema"
    kind: str = "object"  # of the value; the server shows this and not the value


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
def _program(expression: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions=_FUNCTIONS)


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
        if refused := list(_structural(schema, new, "")):
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
    kind = schema["type"]
    if not _TYPES[kind](value):
        yield Refusal(path, f"must be of type {kind}")
        return
    if kind == "object":
        for key in schema.get("required", ()):
            if key not in value:
                yield Refusal(f"{path}.{key}".lstrip("."), "Required value")
        if len(value) > schema.get("maxProperties", len(value)):
            yield Refusal(path, "must have at most properties")
        for key, each in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if below is not None:
                yield from _structural(below, each, f"{path}.{key}".lstrip("."))
    elif kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            yield Refusal(path, f"Too many: must have at most {schema['maxItems']} items")
        for index, each in enumerate(value):
            yield from _structural(schema["items"], each, f"{path}[{index}]")
    elif kind == "string":
        if len(value) > schema.get("maxLength", len(value)):
            yield Refusal(path, f"Too long: may not be more than {schema['maxLength']} bytes")
        if "enum" in schema and value not in schema["enum"]:
            yield Refusal(path, f"Unsupported value: supported values: {', '.join(schema['enum'])}")
        if "pattern" in schema and not re2.search(schema["pattern"], value):
            yield Refusal(path, f"should match {schema['pattern']}")
    elif not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield Refusal(path, "should be greater than or equal to")


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
            yield Refusal(where, rule["message"] if not said or "\n" in said else said.strip(), "rule", schema["type"])
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
_UNKNOWN = float("inf")
_TRAVERSAL, _REGEX = 0.1, 0.25


@dataclass(frozen=True)
class _Estimate:
    """Of an expression: what it costs, how long its value is, and the schema where it has one."""

    cost: float
    size: float = 1
    schema: Schema | None = None


@dataclass(frozen=True)
class _Estimator:
    variables: Mapping[str, Schema] = field(default_factory=dict)

    def of(self, tree: Any) -> _Estimate:
        kind, parts = str(tree.data), tree.children
        if len(parts) == 1 and kind not in ("literal", "ident", "list_lit"):
            return self.of(parts[0])
        return getattr(self, f"_{kind}")(parts)  # type: ignore[no-any-return]

    def _literal(self, parts: list[Any]) -> _Estimate:
        return _Estimate(0, len(str(parts[0]).lstrip("r")) - 2 if parts[0].type == "STRING_LIT" else 1)

    def _ident(self, parts: list[Any]) -> _Estimate:
        schema = self.variables[str(parts[0])]
        return _Estimate(1, _size(schema), schema)

    def _list_lit(self, parts: list[Any]) -> _Estimate:
        items = parts[0].children if parts and parts[0] is not None else []
        return _Estimate(10 + sum(self.of(each).cost for each in items), len(items), {"type": "boolean"})

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
        return _Estimate(cost + ceil(min(left.size, right.size) * _TRAVERSAL))

    def _addition(self, parts: list[Any]) -> _Estimate:
        left, right = self.of(parts[0].children[0]), self.of(parts[1])
        size = left.size + right.size
        return _Estimate(left.cost + right.cost + ceil(size * _TRAVERSAL), size)

    def _member_dot(self, parts: list[Any]) -> _Estimate:
        of = self.of(parts[0])
        assert of.schema is not None
        schema = of.schema["properties"][str(parts[1])]
        return _Estimate(of.cost + 1, _size(schema), schema)

    def _ident_arg(self, parts: list[Any]) -> _Estimate:
        assert parts[0] == "has", parts[0]
        return _Estimate(self.of(parts[1].children[0]).cost)

    def _member_dot_arg(self, parts: list[Any]) -> _Estimate:
        of, name = self.of(parts[0]), str(parts[1])
        arguments = parts[2].children if len(parts) > 2 and parts[2] is not None else []
        if name in ("all", "exists", "filter", "map"):
            assert of.schema is not None
            variable = str(next(iter(arguments[0].scan_values(lambda _: True))))
            item = of.schema.get("items", of.schema)
            body = _Estimator({**self.variables, variable: item}).of(arguments[1])
            return _Estimate(of.cost + of.size * (body.cost + 3), of.size)
        given = [self.of(each) for each in arguments]
        cost = of.cost + sum(each.cost for each in given)
        if name in ("matches", "find", "findAll"):
            return _Estimate(cost + ceil((of.size + 1) * _TRAVERSAL) * ceil(given[0].size * _REGEX), of.size)
        if name == "contains":
            return _Estimate(cost + ceil(of.size * _TRAVERSAL) * ceil(given[0].size * _TRAVERSAL))
        if name in ("lowerAscii", "substring"):
            return _Estimate(cost + ceil(of.size * _TRAVERSAL), of.size)
        if name == "join":
            size = of.size * given[0].size
            return _Estimate(cost + ceil(size * _TRAVERSAL), size)
        assert name == "size", name
        return _Estimate(cost + 1)


def _size(schema: Schema) -> float:
    match schema["type"]:
        case "string":
            return schema["maxLength"] * 4 if "maxLength" in schema else _REQUEST_BYTES  # type: ignore[no-any-return]
        case "array":
            return schema.get("maxItems", _REQUEST_BYTES)  # type: ignore[no-any-return]
        case "object":
            return _REQUEST_BYTES  # equality of objects; the server counts less
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
        estimator = _Estimator({"self": schema, "oldSelf": schema})
        holds, message = (
            estimator.of(celpy.Environment().compile(text)).cost if text else 0
            for text in (rule["rule"], rule.get("messageExpression"))
        )
        yield Price(path, rule["rule"], holds * places, message)
    for key, below in schema.get("properties", {}).items():
        yield from prices(below, f"{path}.{key}".lstrip("."), places)
    if "items" in schema:
        yield from prices(schema["items"], f"{path}[]", places * schema.get("maxItems", _REQUEST_BYTES))
    if "additionalProperties" in schema:
        yield from prices(schema["additionalProperties"], f"{path}[]", places * schema.get("maxProperties", 1e6))
