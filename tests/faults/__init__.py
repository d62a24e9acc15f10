"""Tests that break a run on purpose: table.toml says what is done and what must hold."""
