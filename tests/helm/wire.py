"""What Helm sends to an API server: Secrets in protobuf, changes as patches."""

from __future__ import annotations

import base64
from collections import defaultdict
from io import BytesIO
from typing import Any

Object = dict[str, Any]


def secret(message: bytes) -> Object:
    """The Secret in Kubernetes' protobuf envelope, in which Helm writes its records alone."""
    whole = _fields(_fields(message.removeprefix(b"k8s\0"))[2][0])
    metadata = _fields(whole[1][0])
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": metadata[1][0].decode(),
            "labels": {key: value.decode() for key, value in _pairs(metadata[11]).items()},
        },
        "data": {key: base64.b64encode(value).decode() for key, value in _pairs(whole[2]).items()},
        "type": whole[3][0].decode(),
    }


def _pairs(entries: list[bytes]) -> dict[str, bytes]:
    """A protobuf map."""
    return {entry[1][0].decode(): entry[2][0] for entry in map(_fields, entries)}


def _fields(message: bytes) -> dict[int, list[bytes]]:
    """The texts, bytes and messages in a protobuf message by their field numbers, without its integers."""
    found = defaultdict(list)
    stream = BytesIO(message)
    while stream.tell() < len(message):
        number, wire = divmod(_varint(stream), 8)
        value = _varint(stream)
        if wire == 2:
            found[number].append(stream.read(value))
    return found


def _varint(stream: BytesIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value


def merged(old: Any, patch: Any) -> Any:
    """The old value after a JSON merge patch or a strategic one."""
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) and patch.get("$patch") != "replace" else {}
    new = {field: value for field, value in new.items() if field in patch.get("$retainKeys", new)}
    for field, value in patch.items():
        if value is None:
            new.pop(field, None)
        elif order := patch.get(f"$setElementOrder/{field}"):
            new[field] = _joined(new.get(field, []), value, order)
        elif not field.startswith("$"):
            new[field] = merged(new.get(field), value)
    return new


def _joined(old: list[Any], patch: list[Any], order: list[Any]) -> list[Any]:
    """A list after a strategic patch, whose `order` has what remains, each with its merge key alone."""
    if not isinstance(order[0], dict):
        return order
    (key,) = order[0]
    before, changes = ({one[key]: one for one in items} for items in (old, patch))
    return [merged(before.get(one[key]), changes.get(one[key], {})) for one in order]
