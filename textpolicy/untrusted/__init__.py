"""Reading and showing what other people wrote: files, JSON and TOML with bounds, terminal text."""
