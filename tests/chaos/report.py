"""What a run came to, as a table."""

from collections.abc import Sequence

from .ledger import Ledger
from .run import Outcome
from .schedule import KINDS

_FAULTS = ("missing", "duplicated", "reordered", "corrupted", "invented")


def report(outcome: Outcome, ledger: Ledger, *, cluster: int) -> str:
    """The table of faults, and below it what became of the events."""
    rows = [("Fault", "Times", "Longest recovery", "")]
    for kind in KINDS:
        if cluster not in kind.clusters:
            continue
        took = outcome.recoveries.get(kind.name, [])
        rows.append(
            (
                kind.name,
                str(outcome.done.get(kind.name, 0)),
                f"{max(took):.1f} s of {len(took)}" if took else "",
                outcome.impossible.get(kind.name, ""),
            )
        )
    checks = outcome.checks
    rows.append(("all", str(sum(outcome.done.values())), f"{max(checks):.1f} s of {len(checks)}" if checks else "", ""))
    brokers, rate = "1 broker" if cluster == 1 else f"{cluster} brokers", ledger.accepted / max(outcome.seconds, 1)
    counts = _table([("Accepted", "Published", *map(str.capitalize, _FAULTS)), _counts(ledger)])
    lines = [_table(rows), "", f"{brokers}, {outcome.seconds:.0f} s, {rate:.0f} events/s accepted", "", counts]
    if outcome.late:
        lines.append(f"The time was up: {outcome.late} faults were not done")
    if ledger.excused:
        lines.append(f"Within a fault's limits: {', '.join(f'{count} {why}' for why, count in ledger.excused.items())}")
    if answers := ledger.faults["answers"]:
        lines.append(f"Answers other than 200 and 503: {answers}")
    lines += [f"{kind}: {example}" for kind, examples in ledger.examples.items() for example in examples]
    return "\n".join(lines)


def _counts(ledger: Ledger) -> tuple[str, ...]:
    return (str(ledger.accepted), str(ledger.published), *(str(ledger.faults[kind]) for kind in _FAULTS))


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rest = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *rest])
