import logging
import re
import sys
from collections.abc import Iterator

import orjson
import pytest

from relay import logs


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    levels = {name: logging.getLogger(name).level for name in ("aiokafka", "asyncio")}
    yield
    root.handlers[:], root.level = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def record(name: str = "relay.spool", message: str = "Hello %s.", *args: object, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": name, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message, "args": args, **extra}
    )
    made.created, made.msecs = 1_764_000_000.007, 7.0
    return made


def test_a_line_is_one_json_object() -> None:
    line = logs.JsonFormatter().format(record("relay.spool", "Hello %s\n%d.", "Ada", 7, action="greeting", events=3))
    assert "\n" not in line
    assert orjson.loads(line) == {
        "time": "2025-11-24T16:00:00.007Z",
        "level": "warning",
        "logger": "relay.spool",
        "message": "Hello Ada\n7.",
        "action": "greeting",
        "events": 3,
    }


def test_an_exception_is_in_its_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = logs.JsonFormatter().format(record(message="Oh.", exc_info=sys.exc_info()))
    assert orjson.loads(line)["exception"].endswith("ValueError: broken")


def test_what_json_does_not_know_is_written_as_text() -> None:
    fields = orjson.loads(logs.JsonFormatter().format(record(message="Oh.", error=ValueError("broken"), names={1})))
    assert fields["error"] == "broken"
    assert fields["names"] == "{1}"


def test_a_line_for_people_begins_with_time_and_level() -> None:
    line = logs.TextFormatter().format(record("relay.spool", "Hello %s.", "Ada", action="greeting"))
    assert line == "2025-11-24T16:00:00.007Z WARNING Hello Ada."
    try:
        raise ValueError("broken")
    except ValueError:
        text = logs.TextFormatter().format(record(message="Oh.", exc_info=sys.exc_info()))
    assert text.splitlines()[0] == "2025-11-24T16:00:00.007Z WARNING Oh."
    assert text.splitlines()[-1] == "ValueError: broken"


def test_aiokafka_says_the_same_thing_once_a_minute() -> None:
    quiet = logs.QuietFilter()

    def passes(at: float, message: str = "Unable to connect to %s", *args: object, name: str = "aiokafka.conn") -> bool:
        made = record(name, message, *args)
        made.created = at
        return quiet.filter(made)

    assert passes(0.0, "Unable to connect to %s", "b1")
    assert not passes(0.1, "Unable to connect to %s", "b1")
    assert not passes(59.0, "Unable to connect to %s", "b2")
    assert passes(1.0, "Heartbeat failed")
    assert passes(60.0, "Unable to connect to %s", "b1")
    assert not passes(61.0, "Unable to connect to %s", "b1")


def test_the_relay_itself_is_never_silenced() -> None:
    quiet = logs.QuietFilter()
    assert all(quiet.filter(record("relay.publisher")) for _ in range(3))
    assert all(quiet.filter(record("aiohttp.server")) for _ in range(3))


@pytest.mark.parametrize(("style", "begin"), [("json", r"\{"), ("text", r"\d{4}-")])
def test_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str], style: str, begin: str) -> None:
    logs.configure("info", style)
    logging.getLogger("relay.test").info("Visible.")
    logging.getLogger("relay.test").debug("Invisible.")
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.match(begin, err)
    assert "Visible." in err


def test_aiokafka_is_heard_from_errors_on(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logger = logging.getLogger("aiokafka.client")
    logger.warning("Lost.")
    for _ in range(3):
        logger.error("Broken.")
    assert capsys.readouterr().err.count("\n") == 1


def test_the_level_is_that_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for level, lines in (("debug", 4), ("info", 3), ("warning", 2), ("error", 1)):
        logs.configure(level, "text")
        logger = logging.getLogger("relay.test")
        for speak in (logger.debug, logger.info, logger.warning, logger.error):
            speak("Said.")
        assert capsys.readouterr().err.count("Said.") == lines
