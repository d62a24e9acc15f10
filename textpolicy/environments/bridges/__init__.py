"""Environments of other libraries. `load` imports a bridge when it loads an environment of it."""
