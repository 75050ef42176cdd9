"""Merge patch, JSON patch and server-side apply, for the fake API server.

Server-side apply knows who wrote which leaf: `Owners` is manager → paths. What a manager leaves out of its next apply
goes, unless another one has it too; two that want different values are a conflict.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]  # names of fields, and (key, value) for an item of a list that is a map
Owners = dict[str, set[Path]]

# Lists that are maps by a key of their items; all others are replaced whole.
_KEYS = {
    "conditions": "type",
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "ownerReferences": "uid",
}
_SERVERS_OWN = {"apiVersion", "kind"}
_SERVERS_METADATA = {
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "deletionTimestamp",
}


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def strategically_merged(target: Any, patch: Any, name: str = "") -> Any:
    """A merge patch in which the lists that are maps are merged by key (`$patch: delete` removes an item)."""
    key = _KEYS.get(name)
    if isinstance(patch, list) and key and isinstance(target, list):
        items = {item[key]: item for item in target}
        for item in patch:
            if item.get("$patch") == "delete":
                items.pop(item[key], None)
            else:
                items[item[key]] = strategically_merged(items.get(item[key], {}), item)
        return list(items.values())
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for field, value in patch.items():
        if value is None:
            result.pop(field, None)
        else:
            result[field] = strategically_merged(result.get(field), value, field)
    return result


def json_patched(target: Any, operations: list[Mapping[str, Any]]) -> Any:
    """RFC 6902: add, replace, remove and test. Raises ValueError when it does not apply."""
    document = copied(target)
    for operation in operations:
        parts = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place = document
        try:
            for part in parts[:-1]:
                place = place[int(part)] if isinstance(place, list) else place[part]
            last: Any = parts[-1]
            if isinstance(place, list) and last != "-":
                last = int(last)
            match operation["op"]:
                case "test" if place[last] != operation["value"]:
                    raise ValueError(f"testing value {operation['path']} failed")
                case "test":
                    pass
                case "remove":
                    del place[last]
                case "replace":
                    place[last]  # must be there
                    place[last] = operation["value"]
                case "add" if isinstance(place, list):
                    place.insert(len(place) if last == "-" else last, operation["value"])
                case "add":
                    place[last] = operation["value"]
                case other:
                    raise ValueError(f"{other} is not supported")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{operation['op']} operation does not apply: doc is missing path: {operation['path']}"
            ) from error
    return document


# ── server-side apply ────────────────────────────────────────────────────────────────────────────────────────────────


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Each leaf of an object that a manager can own."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            if not path and name in _SERVERS_OWN:
                continue
            if path == ("metadata",) and name in _SERVERS_METADATA:
                continue
            yield from leaves(inner, (*path, name))
        return
    key = _KEYS.get(path[-1]) if path and isinstance(path[-1], str) else None
    if isinstance(value, list) and value and key and all(isinstance(item, dict) and key in item for item in value):
        for item in value:
            yield from leaves(item, (*path, (key, item[key])))
        return
    yield path, value


def applied(
    current: Mapping[str, Any], wanted: Mapping[str, Any], manager: str, owners: Owners, *, force: bool
) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
    """The object after `manager` applied `wanted`, with `owners` brought up to date; or the conflicts, by manager."""
    result = copied(current)
    new = dict(leaves(wanted))
    there = dict(leaves(current))
    conflicts = [
        (other, path)
        for other, paths in owners.items()
        if other != manager
        for path in sorted(paths & set(new), key=str)
        if path in there and there[path] != new[path]
    ]
    if conflicts and not force:
        return result, conflicts
    for other, path in conflicts:
        owners[other].discard(path)
    others: set[Path] = set().union(*(paths for other, paths in owners.items() if other != manager))
    for path in sorted(owners.get(manager, set()) - set(new) - others, key=_keys_last):
        _remove(result, path)
    for path, value in new.items():
        _set(result, path, copied(value))
    # An empty list of things with keys has nothing in it that could be owned.
    owners[manager] = {path for path, value in new.items() if value != [] or path[-1] not in _KEYS}
    return result, []


def written(old: Mapping[str, Any], new: Mapping[str, Any], manager: str, owners: Owners) -> None:
    """Bring `owners` up to date after a plain write: who changes a leaf owns it."""
    before, after = dict(leaves(old)), dict(leaves(new))
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    for paths in owners.values():
        paths -= changed
        paths &= set(after)
    owners.setdefault(manager, set()).update(changed)


def _item(place: Any, part: Any, *, make: bool) -> Any:
    if isinstance(part, tuple):
        key, value = part
        found = next((item for item in place if item.get(key) == value), None)
        if found is None and make:
            place.append(found := {key: value})
        return found
    if part not in place and make:
        place[part] = None
    return place.get(part)


def _set(document: dict[str, Any], path: Path, value: Any) -> None:
    place: Any = document
    for part, following in itertools.pairwise(path):
        inner = _item(place, part, make=True)
        if inner is None:
            inner = [] if isinstance(following, tuple) else {}
            place[part] = inner
        elif isinstance(part, str) and isinstance(following, str) and not isinstance(inner, dict):
            inner = place[part] = {}
        place = inner
    place[path[-1]] = value


def _keys_last(path: Path) -> tuple[bool, int]:
    """An item whose key is gone is not found any more: what else it has goes first."""
    is_key = len(path) > 1 and isinstance(path[-2], tuple) and path[-1] == path[-2][0]
    return is_key, -len(path)


def _remove(document: dict[str, Any], path: Path) -> None:
    """Without the leaf, and without what is empty then or is only the key of a list's item."""
    places: list[Any] = [document]
    for part in path[:-1]:
        inner = _item(places[-1], part, make=False)
        if inner is None:
            return
        places.append(inner)
    places[-1].pop(path[-1], None)
    # The places as they were found: an item whose key has been removed is not found by it any more.
    for place, part, inner in zip(reversed(places[:-1]), reversed(path[:-1]), reversed(places[1:]), strict=True):
        if isinstance(part, tuple):
            if set(inner) <= {part[0]} and inner in place:
                place.remove(inner)
        elif not inner:
            del place[part]
