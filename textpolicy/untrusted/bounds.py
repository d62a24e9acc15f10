"""Every bound on what a file from elsewhere may ask of this machine."""

MAX_CONFIG_BYTES = 16 * 2**20
"""Bytes of a JSON file of settings, such as the config of a model or of an adapter."""

MAX_TOML_BYTES = 2**18
"""Bytes of a TOML config. Python's reader of TOML takes quadratic time for some texts."""

MAX_DEPTH = 64
"""How deep lists and tables in JSON and TOML may be nested."""

MAX_VOCABULARY_BYTES = 2**29
"""Bytes of any other file of a model that is not weights, such as tokenizer.json."""

MAX_LAYERS = 4096
"""Layers, blocks or experts that the config of a model may ask for."""

MAX_SIZE = 2**31 - 1
"""Any other number in the config of a model."""

MAX_TEMPLATE_SECONDS = 3
"""Seconds of a processor that a chat template may take for a short conversation."""

MAX_TEMPLATE_MEMORY = 2**31
"""Bytes of memory that a chat template may take for a short conversation."""

MAX_PATTERN_SECONDS = 1.0
"""Seconds that a regular expression of an adapter's config may take for the path of one module."""

MAX_REPETITIONS = 1000
"""The product of all counts of repetitions in such an expression, as in (a{10}){10}."""

MAX_DATA_BYTES = 8 * 2**30
"""Bytes of a data file, which is read as a whole."""

MAX_DATA_LINE_BYTES = 16 * 2**20
"""Bytes of one line of a data file."""

MAX_BUFFER_BYTES = 2**28
"""Bytes of the rows that wait in the shuffle buffer of streamed data."""

MAX_ROW_BYTES = 16 * 2**20
"""Bytes of one line of metrics.jsonl or samples.jsonl."""

MAX_STEP = 2**53
"""The number of a step in the files of a run; a larger one is no exact float."""

MAX_HEADER_BYTES = 100_000_000
"""Bytes of the header of a safetensors file; the format has the same bound."""

MAX_TENSORS = 2**20
"""Tensors in a GGUF file."""

MAX_MESSAGE_CHARACTERS = 4000
"""Characters of an error message that the command prints."""
