"""Writes what the README says of settings and metrics, and asyncapi.yaml, from the code: `python tests/docs.py`."""

from pathlib import Path

import asyncapi
from prometheus_client import CollectorRegistry

from relay.config import settings_table
from relay.metrics import Metrics

README = Path(__file__).parent.parent / "README.md"


def metrics_table() -> str:
    """The metrics as the README's table."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.add_workspace("default", 1)
    metrics.add_topics(["topic"])
    rows = ["| Name | Type, labels | |", "|---|---|---|"]
    for family in registry.collect():
        labels = [f"`{label}`" for label in family.samples[0].labels if label != "le"]
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(f"| `{name}` | {', '.join([family.type, *labels])} | {family.documentation} |")
    return "\n".join(rows)


def rendered(readme: str) -> str:
    """*readme* with its tables as the code declares them now."""
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        before, rest = readme.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- /{name} -->\n")
        readme = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->\n{after}"
    return readme


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
    asyncapi.DOCUMENT.write_text(asyncapi.document())
