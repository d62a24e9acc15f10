"""Feed the readers of files with mutated bytes, guided by coverage: `make fuzz MINUTES=10`.

    python tools/fuzz_readers.py [READER ...] [--minutes 10]

Needs atheris (`pip install atheris`), which is no dependency of the project. Each reader starts
from the files of tests/faults/corpus/READER. An input that raises anything but an error of the
library is written to build/fuzz; once the reader is mended, it moves to the corpus, which a test
replays.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.files.adapter_file import peek_version, read_adapter_file
from textpolicy.adapters.files.gguf_lora import read_gguf_lora
from textpolicy.config import TrainConfig
from textpolicy.config.toml import read_toml
from textpolicy.environments.data_files import load_rows
from textpolicy.environments.template import check_template, fill_template
from textpolicy.errors import TextPolicyError
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.untrusted.parsing import read_json_object

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/faults/corpus"


def read_adapter(path: Path) -> None:
    with suppress(TextPolicyError):
        peek_version(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_adapter_file(path)


def read_adapter_config(path: Path) -> None:
    data = read_json_object(path)
    with suppress(TextPolicyError):
        AdapterConfig.from_peft(data, trained=True)
    AdapterConfig.from_dict(data)


def read_template(path: Path) -> None:
    text, row = path.read_text("utf-8", errors="replace"), {"a": "{b}", "b": 1}
    check_template(text, row)
    fill_template(text, row)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "adapter": (".safetensors", read_adapter),
    "adapter_config": (".json", read_adapter_config),
    "gguf": (".gguf", read_gguf_lora),
    "config": (".toml", lambda path: read_toml(path, TrainConfig())),
    "rows": (".jsonl", load_rows),
    "csv": (".csv", load_rows),
    "metrics": (".jsonl", read_metrics),
    "template": (".txt", read_template),
}


def feed(reader: str, content: bytes, folder: Path) -> None:
    """Give a reader a file of this content. Only errors of the library are caught."""
    suffix, read = READERS[reader]
    path = folder / f"input{suffix}"
    path.write_bytes(content)
    with suppress(TextPolicyError):
        read(path)


def is_ours(value: object) -> bool:
    return isinstance(value, FunctionType) and value.__module__.startswith("textpolicy.")


def fuzz(reader: str, seconds: int) -> None:
    import atheris  # pyright: ignore[reportMissingImports]

    finds = ROOT / "build/fuzz" / reader
    (finds / "corpus").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    options = [f"-max_total_time={seconds}", "-max_len=8192", "-timeout=20", "-rss_limit_mb=4096"]
    places = [str(finds / "corpus"), str(CORPUS / reader), f"-artifact_prefix={finds}/"]
    # The functions of our readers guide the search.
    ours = [module for name, module in sys.modules.items() if name.startswith("textpolicy.")]
    for function in {one for module in ours for one in vars(module).values() if is_ours(one)}:
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *options, *places], lambda data: feed(reader, data, folder))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", default=[], metavar="READER")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all readers together")
    options = parser.parse_args()
    if len(options.readers) == 1:
        fuzz(options.readers[0], round(60 * options.minutes))
        return 0
    readers = options.readers or list(READERS)
    share = str(options.minutes / len(readers))
    codes = {
        reader: subprocess.run([sys.executable, __file__, reader, "--minutes", share]).returncode
        for reader in readers
    }
    for reader, code in codes.items():
        print(f"{reader}: {'held' if code == 0 else 'broke; see build/fuzz'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
