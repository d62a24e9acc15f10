"""`python -m textpolicy` is the `textpolicy` command."""

from textpolicy.cli import main

raise SystemExit(main())
