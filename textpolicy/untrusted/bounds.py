"""Every bound on what a file from elsewhere may ask of this machine."""

MAX_CONFIG_BYTES = 16 * 2**20
"""Bytes of a JSON file of settings, such as the config of a model or of an adapter."""

MAX_TOML_BYTES = 2**18
"""Bytes of a TOML config. Python's reader of TOML takes quadratic time for some texts."""

MAX_DEPTH = 64
"""How deep lists and tables in JSON and TOML may be nested."""

MAX_DATA_BYTES = 8 * 2**30
"""Bytes of a data file, which is read as a whole."""

MAX_LINE_CHARACTERS = 16 * 2**20
"""Characters of one line of a data file."""

MAX_HEADER_BYTES = 100_000_000
"""Bytes of the header of a safetensors file; the format has the same bound."""

MAX_MESSAGE_CHARACTERS = 4000
"""Characters of an error message that the command prints."""
