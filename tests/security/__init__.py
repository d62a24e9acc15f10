"""Tests that attack the library: tests/faults/table.toml says what is tried and what must hold."""
