"""Replaces what RELAY_REDACT names in a body before anything is stored."""

import json
from collections.abc import Sequence
from typing import Any

import orjson

from relay.errors import BadJson

REDACTED = "[redacted]"


class Redaction:
    """The places of RELAY_REDACT: JSON pointers (RFC 6901) in which `*` stands for every item of an array."""

    def __init__(self, pointers: Sequence[str]) -> None:
        """Raises: ValueError for a text that is no JSON pointer."""
        self._paths = [_parse(pointer) for pointer in pointers]

    def __bool__(self) -> bool:
        return bool(self._paths)

    def apply(self, payload: dict[str, Any]) -> bytes:
        """
        The body of *payload* with the named values replaced; *payload* itself is changed too.

        Raises: BadJson for a number that cannot be written again.
        """
        for path in self._paths:
            _replace(payload, path)
        try:
            return orjson.dumps(payload)
        except TypeError:  # Lone surrogates and integers beyond 64 bits: JSON, but not for orjson.
            try:
                return json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()
            except ValueError as error:
                raise BadJson("The body holds a number that is too large.") from error


def _parse(pointer: str) -> list[str]:
    if not pointer.startswith("/"):
        raise ValueError(f"{pointer!r} is not a JSON pointer: it must begin with '/'")
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer[1:].split("/")]


def _replace(node: Any, path: Sequence[str]) -> None:
    step, rest = path[0], path[1:]
    for container, place in _places(node, step):
        if rest:
            _replace(container[place], rest)
        else:
            container[place] = REDACTED


def _places(node: Any, step: str) -> list[tuple[Any, Any]]:
    if isinstance(node, dict):
        return [(node, step)] if step in node else []
    if isinstance(node, list):
        if step == "*":
            return [(node, index) for index in range(len(node))]
        if step.isdecimal() and int(step) < len(node):
            return [(node, int(step))]
    return []
