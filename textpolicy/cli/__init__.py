"""The `textpolicy` command."""

try:
    from textpolicy.cli.main import main
except KeyboardInterrupt:
    # Ctrl-C while the command loads; a traceback would look like a bug.
    raise SystemExit(130) from None

__all__ = ["main"]
