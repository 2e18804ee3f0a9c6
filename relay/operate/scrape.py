"""What a relay's admin port says at one moment."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from relay.errors import AdminUnreachable

#: Seconds for each answer.
_TIMEOUT = 5.0
#: The admin port is next door: never through the proxy of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Scrape:
    """One look at a relay."""

    #: When, in seconds of a clock that never goes back.
    at: float
    #: The body of `/status`.
    status: Mapping[str, Any]
    #: Why it cannot make an event durable now, if it cannot.
    unready: str | None
    #: Every series of `/metrics`, by its name and its labels in the order of their names.
    series: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]

    def of(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """The labels and value of every series called *name*."""
        return ((dict(labels), value) for (called, labels), value in self.series.items() if called == name)

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series called *name* that have these *labels*; 0 if there is none."""
        return sum(value for having, value in self.of(name) if labels.items() <= having.items())


def scrape(url: str) -> Scrape:
    """
    Looks at the relay whose admin port is at *url*.

    Raises: AdminUnreachable.
    """
    code, unready = _get(url, "/readyz")
    try:
        status = json.loads(_found(url, "/status"))
        at = time.monotonic()
        series = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(_found(url, "/metrics"))
            for sample in family.samples
        }
        is_relay = "identity" in status["spool"]
    except (ValueError, KeyError, TypeError) as error:
        raise AdminUnreachable(f"What answers at {url} is no relay's admin port.") from error
    if not is_relay:
        raise AdminUnreachable(f"What answers at {url} is no relay's admin port.")
    return Scrape(at, status, None if code == http.client.OK else unready.strip(), series)


def _found(url: str, path: str) -> str:
    code, body = _get(url, path)
    if code != http.client.OK:
        raise AdminUnreachable(f"{url}{path} answers {code}: is this the relay's admin port?")
    return body


def _get(url: str, path: str) -> tuple[int, str]:
    try:
        with _OPENER.open(url + path, timeout=_TIMEOUT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read().decode(errors="replace")
    except urllib.error.URLError as error:
        reason = error.reason.strerror if isinstance(error.reason, OSError) else None
        raise AdminUnreachable(f"No relay answers at {url}: {reason or error.reason}.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AdminUnreachable(f"No relay answers at {url}: {str(error) or type(error).__name__}.") from error
