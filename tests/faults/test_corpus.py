"""Every input of the corpus of tools/fuzz_readers.py is read, or refused with an error of ours."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.attempts import Attempts

ROOT = Path(__file__).parents[2]
INPUTS = sorted((Path(__file__).parent / "corpus").glob("*/*"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_readers", ROOT / "tools/fuzz_readers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.proves("S2", "F19")
@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_of_the_corpus_is_read_or_refused(
    path: Path, tool: ModuleType, tmp_path: Path, attempts: Attempts
) -> None:
    tool.feed(path.parent.name, path.read_bytes(), tmp_path)
    attempts.add()


def test_every_reader_has_a_corpus_and_the_corpus_is_small(tool: ModuleType) -> None:
    assert {path.parent.name for path in INPUTS} == set(tool.READERS)
    assert sum(path.stat().st_size for path in INPUTS) < 200_000
