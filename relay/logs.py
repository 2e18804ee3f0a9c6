"""Log lines for machines and people: one per change of state, none per event, never a body or a secret."""

import logging
import sys
import time
from typing import Any

import orjson

#: What a record carries beyond what was given as `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: Seconds for which aiokafka does not say the same thing again: it tells of a lost broker 40 times a second.
QUIET_SECONDS = 60.0


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of *record*."""
        fields: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(fields, default=str).decode()

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        """RFC 3339, in UTC, to the millisecond."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{second}.{int(record.msecs):03d}Z"


class TextFormatter(JsonFormatter):
    """One line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of *record*."""
        line = f"{self.formatTime(record)} {record.levelname:<7} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class QuietFilter(logging.Filter):
    """Lets a message of aiokafka's pass once a minute, whatever its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether *record* is logged."""
        if not record.name.startswith("aiokafka"):
            return True
        said = self._said.get(record.msg)
        if said is not None and record.created - said < QUIET_SECONDS:
            return False
        self._said[record.msg] = record.created
        return True


def configure(level: str, style: str) -> None:
    """Sends the log of this process to standard error, as *style* says: `json` or `text`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    handler.addFilter(QuietFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What aiokafka says of a lost broker, the publisher says once and better.
    logging.getLogger("aiokafka").setLevel(logging.DEBUG if level == "debug" else logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}
