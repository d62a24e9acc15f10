"""The `textpolicy` command."""

from textpolicy.cli.main import main

__all__ = ["main"]
