"""What completes the command line in a shell."""

import argparse
from collections.abc import Iterator

import shtab

#: What an argument with such a name in its help stands for.
_KINDS = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for *shell* that completes what *parser*, with all its commands, understands."""
    for action in _actions(parser):
        if isinstance(action.metavar, str) and action.metavar in _KINDS:
            vars(action)["complete"] = _KINDS[action.metavar]  # Where shtab looks for it.
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no other list of them.
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                yield from _actions(command)
