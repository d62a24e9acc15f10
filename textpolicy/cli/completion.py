"""The parser as `shtab` makes tab completion from it: names of files where a path belongs."""

from argparse import ArgumentParser

from shtab import DIRECTORY, FILE

from textpolicy.cli.parser import build_parser, commands_of

_COMPLETED = {"FILE": FILE, "PATH": FILE, "DIR": DIRECTORY, "RUN": DIRECTORY}


def parser() -> ArgumentParser:
    """Every command, with `complete` set on what takes a path."""
    whole = build_parser()
    for command in commands_of(whole).values():
        for action in command._actions:
            kind = str(action.metavar).partition(".")[0]
            if kind in _COMPLETED:
                # argparse does not know this attribute; shtab looks for it.
                vars(action)["complete"] = _COMPLETED[kind]
    return whole
