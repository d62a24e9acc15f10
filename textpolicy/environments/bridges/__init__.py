"""Environments of other libraries. A bridge is imported when an environment of it is loaded."""
