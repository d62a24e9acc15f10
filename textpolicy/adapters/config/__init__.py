"""Adapter configs: rules, how a config selects modules, and the JSON formats of a config."""
