"""The table at the end of a run."""

from chaos.ledger import Chat, Layout, Ledger
from chaos.report import report
from chaos.run import Outcome
from chaos.schedule import KINDS


def test_the_table_has_each_kind_what_was_not_possible_and_what_became_of_events() -> None:
    ledger = Ledger(Layout("events", "dead", 1, {}, framed=False))
    for number in range(3):
        ledger.answered(ledger.send(Chat(), b"%d" % number))
    ledger.blame("duplicated", "events-0@7: an event, 2 times")
    outcome = Outcome(seconds=2.0, late=3, impossible={"disk full": "not possible here: no C compiler"})
    outcome.done["relay killed"] = 12
    outcome.recoveries["relay killed"] += [0.5, 2.25]
    ledger.close()

    said = report(outcome, ledger, cluster=1)

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line[:1] == "|"]
    assert ["relay killed", "12", "2.2 s of 2", ""] in rows
    assert ["disk full", "0", "", "not possible here: no C compiler"] in rows
    assert {row[0] for row in rows} >= {kind.name for kind in KINDS if 1 in kind.clusters}
    assert "two of three brokers down" not in said
    assert ["3", "0", "3", "1", "0", "0", "0"] in rows
    assert "events-0@7: an event, 2 times" in said
    assert "1 broker, 2 s, 2 events/s accepted" in said
    assert "The time was up: 3 faults were not done" in said
