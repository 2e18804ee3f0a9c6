"""How a relay's vitals look on a terminal, wide or narrow, with colours or without."""

from collections.abc import Iterator, Mapping

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from relay.operate.vitals import Count, Kafka, Latency, Registry, Spool, Vitals

#: Columns from which traffic and latency stand side by side.
_WIDE = 72
_NARROWEST_BAR, _WIDEST_BAR = 10, 40
_NOTHING = "-"
#: The share of the spool from which it is worth a warning, and an alarm.
_FILLING, _NEARLY_FULL = 0.5, 0.95
_OLD_SECONDS = 300.0
_TRAFFIC = {
    "accepted": "accepted",
    "duplicate": "retries",
    "rejected": "rejected",
    "published": "published",
    "dead_lettered": "dead letters",
}
_LATENCIES = {
    "accept": "accept",
    "spool_commit": "spool commit",
    "publish": "publish",
    "end_to_end": "end to end",
}
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


class Screen:
    """All that there is to see of a relay, to be printed by rich."""

    def __init__(self, url: str, vitals: Vitals) -> None:
        self._url = url
        self._vitals = vitals

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        vitals = self._vitals
        yield _title(self._url, vitals)
        yield ""
        tables = (_traffic(vitals.traffic), _latencies(vitals.latency_seconds))
        if options.max_width < _WIDE:
            yield Group(tables[0], "", tables[1])
        else:
            side_by_side = Table.grid(padding=(0, 6))
            side_by_side.add_row(*tables)
            yield side_by_side
        yield ""
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(style="bold", no_wrap=True)
        rows.add_column(overflow="fold")
        rows.add_row("Spool", _spool(vitals.spool, options))
        rows.add_row("Kafka", _kafka(vitals.kafka))
        rows.add_row("Registry", _registry(vitals.registry))
        rows.add_row("Rejects", _counted(vitals.rejected, "red"))
        rows.add_row("Dead letters", _counted(vitals.dead_letters, "yellow"))
        if vitals.invalid:
            rows.add_row("Invalid", _counted(vitals.invalid, "yellow"))
        in_use = {name: count for name, count in vitals.tokens.items() if count.total}
        rows.add_row("Tokens", _counted(in_use, ""))
        yield rows


def unreachable(why: str, seconds: float) -> RenderableType:
    """What is shown while no relay answers, for as long as that."""
    return Group(
        Text(why, style="bold red"),
        Text(f"For {duration(seconds)}; asking again." if seconds else "Asking again."),
    )


def duration(seconds: float) -> str:
    """*seconds* for people, in the largest fitting unit and the one below it."""
    whole = int(seconds)
    for number, (size, unit) in enumerate(_UNITS):
        if whole >= size:
            rest = _UNITS[number + 1] if number + 1 < len(_UNITS) else (1, "s")
            return f"{whole // size} {unit} {whole % size // rest[0]} {rest[1]}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _title(url: str, vitals: Vitals) -> Text:
    ready = Text("stopping", style="yellow") if vitals.draining else Text("ready", style="green")
    if vitals.unready and not vitals.draining:
        ready = Text(f"NOT READY: {vitals.unready}", style="bold red")
    return Text.assemble(
        ("relay ", "bold"), (vitals.version, "bold"), f"  {url}  up {duration(vitals.uptime_seconds)}  ", ready
    )


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _traffic(traffic: Mapping[str, Count]) -> Table:
    table = _table("Events", "per s", "total")
    for name, title in _TRAFFIC.items():
        count = traffic[name]
        style = "red" if name == "rejected" and count.per_second else ""
        table.add_row(title, Text(_rate(count.per_second), style=style), f"{count.total:,}")
    return table


def _latencies(latencies: Mapping[str, Latency]) -> Table:
    table = _table("Latency", "p50", "p99")
    for name, title in _LATENCIES.items():
        latency = latencies[name]
        table.add_row(title, _latency(latency.p50, latency.limit), _latency(latency.p99, latency.limit))
    return table


def _latency(seconds: float | None, limit: float) -> str:
    if seconds is None:
        return _NOTHING
    sign = "> " if seconds >= limit else ""
    return f"{sign}{seconds * 1000:.3g} ms" if seconds < 1 else f"{sign}{seconds:.3g} s"


def _rate(per_second: float | None) -> str:
    return _NOTHING if per_second is None else f"{per_second:,.1f}"


def _spool(spool: Spool, options: ConsoleOptions) -> RenderableType:
    late = "yellow" if spool.oldest_event_age_seconds > _OLD_SECONDS else ""
    waiting = Text.assemble(
        f"{spool.events:,} waiting, oldest ",
        (duration(spool.oldest_event_age_seconds), late),
        ", ",
        (f"{spool.dead_events:,} dead", "bold red" if spool.dead_events else ""),
    )
    if not spool.capacity_bytes:
        return Group(Text("none (RELAY_ACK=kafka)"), waiting)
    share = min(1.0, spool.bytes / spool.capacity_bytes)
    style = "red" if share >= _NEARLY_FULL else "yellow" if share >= _FILLING else "green"
    width = max(_NARROWEST_BAR, min(_WIDEST_BAR, options.max_width // 3))
    full = round(share * width)
    used, room = ("#", ".") if options.ascii_only else ("█", "░")
    bar = Text.assemble((used * full, style), room * (width - full), f"  {share:.1%} of {size(spool.capacity_bytes)}")
    lines = [bar, waiting]
    if spool.seconds_until_full is not None:
        lines.append(Text(f"full in {duration(spool.seconds_until_full)} at this rate", style="bold red"))
    return Group(*lines)


def _kafka(kafka: Kafka) -> RenderableType:
    restarts = kafka.producer_restarts.total
    lines = [
        Text.assemble(
            ("connected", "green") if kafka.connected else ("NOT CONNECTED", "bold red"),
            f", {restarts:,} producer {'restart' if restarts == 1 else 'restarts'}",
        )
    ]
    if kafka.error:
        lines.append(Text(kafka.error, style="red"))
    if kafka.publish_errors:
        lines.append(Text.assemble("errors: ", _counted(kafka.publish_errors, "red")))
    return Group(*lines)


def _registry(registry: Registry) -> RenderableType:
    if not registry.configured:
        return Text("none")
    state = Text("connected", style="green") if registry.connected else Text("NOT CONNECTED", style="bold red")
    return Group(state, *(Text(f"{subject}: {error}", style="red") for subject, error in registry.errors.items()))


def _counted(counts: Mapping[str, Count], style: str) -> Text:
    return Text(", ").join(_items(counts, style)) if counts else Text("none")


def _items(counts: Mapping[str, Count], style: str) -> Iterator[Text]:
    for name, count in counts.items():
        growing = style if count.per_second else ""
        yield Text.assemble(f"{name} {count.total:,} ", (f"({_rate(count.per_second)}/s)", growing))
