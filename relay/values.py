"""What the values of settings may be: each parser takes a variable's text, or says in a ValueError what it must be."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from relay.redact import Redaction

_MASK = "********"
_MOST_SECONDS = 30 * 86400
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_PARTS_OF_A_TOPIC = re.compile(r"\{(type|workspace)\}")


class Secret:
    """A secret from the environment, or from a file that is read anew each time."""

    def __init__(self, value: str = "", path: Path | None = None) -> None:
        self._value = value
        self.path = path

    def read(self) -> str:
        """The secret. Raises: OSError, ValueError, which name the file."""
        return self._value if self.path is None else text_of(self.path).strip()

    def __str__(self) -> str:
        return _MASK if self.path is None else str(self.path)


def text_of(path: Path) -> str:
    """What a file holds. Raises: OSError, ValueError, which name the file."""
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error


def boolean(text: str) -> bool:
    choices = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in choices:
        raise ValueError("must be true or false")
    return choices[text.lower()]


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < least or (most is not None and int(text) > most):
            raise ValueError(f"must be a whole number {bounds}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,7}(\.\d{1,9})?", text) or float(text) > _MOST_SECONDS:
        raise ValueError(f"must be a number of seconds from 0 to {_MOST_SECONDS}")
    return float(text)


def choice(*choices: str) -> Callable[[str], Any]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def topic(text: str) -> str:
    if not _TOPIC.fullmatch(text) or text in {".", ".."}:
        raise ValueError("must be a topic name: letters, digits, '.', '_' and '-', at most 249")
    return text


def topic_template(text: str) -> str:
    topic(_PARTS_OF_A_TOPIC.sub("x", text))
    return text


def file(text: str) -> Path:
    path = Path(text)
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    return path


def http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be a URL that begins with http:// or https://, without ? and #")
    try:
        _ = parts.port, parts.hostname.encode("idna")
    except ValueError:
        raise ValueError("must be a URL whose host and port can be: what is between // and the next /") from None
    if parts.username or parts.password:
        raise ValueError("must not hold a password: there are settings for the user and the password")
    return text


def pointers(text: str) -> tuple[str, ...]:
    pointers = tuple(pointer.strip() for pointer in text.split(",") if pointer.strip())
    Redaction(pointers)
    return pointers
