"""The parser from which `shtab` makes tab completion, with file names where a path belongs."""

from argparse import ArgumentParser

from shtab import DIRECTORY, FILE

from textpolicy.cli.parser import build_parser, commands_of

_COMPLETED = {"FILE": FILE, "PATH": FILE, "DIR": DIRECTORY, "RUN": DIRECTORY}


def parser() -> ArgumentParser:
    """Return the parser of all commands, with `complete` set on options that take a path."""
    whole = build_parser()
    for command in commands_of(whole).values():
        for action in command._actions:
            kind = str(action.metavar).partition(".")[0]
            if kind in _COMPLETED:
                # shtab reads this attribute, which argparse does not know.
                vars(action)["complete"] = _COMPLETED[kind]
    return whole
