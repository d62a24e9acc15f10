"""Fixtures of the tests of GGUF files."""

import pytest


@pytest.fixture(scope="session")
def tiny_architecture(tiny):
    """Return the content of the embedded model's config.json."""
    from textpolicy.generation.model_files import read_architecture_file

    return read_architecture_file(tiny)
