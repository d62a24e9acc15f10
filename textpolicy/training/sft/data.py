"""Training, validation and test data from a folder, a file or a Hugging Face data set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil
from pathlib import Path

import numpy as np

from textpolicy.environments.columns import ColumnNames
from textpolicy.environments.data_address import DataAddress
from textpolicy.environments.data_files import (
    DataRow,
    LocatedRow,
    load_rows_with_locations,
    read_text,
)
from textpolicy.environments.public_layouts import is_saved_folder, split_addresses
from textpolicy.environments.template import Template
from textpolicy.errors import DataError
from textpolicy.training.sft.demonstrations import Demonstration, EncodedRows, Encoding
from textpolicy.training.sft.row_parts import RowParts

_LocatedRows = list[LocatedRow]
_NO_ROWS = EncodedRows(demonstrations=[], places=[], truncated=0, dropped=0)
_NAMES_SHOWN = 5
_OTHER_NAMES = ("validation", "val", "dev")


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """The three parts of the data, and how they were made."""

    train: list[Demonstration]
    valid: list[Demonstration]
    test: list[Demonstration]
    truncated: int = 0
    dropped: int = 0
    max_length: int | None = None
    split_off: bool = False
    """Whether the validation part was split off from the training part."""
    valid_rows: list[DataRow] = field(default_factory=list[DataRow])
    """The rows of `valid`, with all their columns."""

    def __str__(self) -> str:
        text = f"{len(self.train)} demonstrations to train on, {len(self.valid)} to validate"
        text += " (split off from the training data)" if self.split_off else ""
        text += f", {len(self.test)} to test" if self.test else ""
        limit = f"the limit of {self.max_length} tokens"
        if self.truncated:
            text += f"\n{self.truncated} rows are truncated at {limit}"
        if self.dropped:
            text += f"\n{self.dropped} rows have no answer within {limit} and are left out"
        return text


def load_data(
    source: str | Path,
    encoding: Encoding,
    *,
    validation_share: float = 0.1,
    eval_data: str | Path | None = None,
    columns: ColumnNames | None = None,
    prompt: Template | None = None,
    gold_column: str | None = None,
) -> SFTData:
    """Return the demonstrations in a folder with train, and optionally valid and test, files.

    A file is NAME.jsonl, or NAME.txt with one text in each line. `source` may also be a single
    file (.jsonl, .txt, .csv or .parquet) with training data, a folder that `datasets` can read, or
    "hf:OWNER/NAME[:CONFIG][:SPLIT]". `eval_data` is such an address of the validation data.
    Without validation data, `validation_share` of the distinct rows is split off; their order does
    not matter, and 0 splits off none. `columns` gives columns other names. `prompt` is a template
    of the prompt over the columns, and `gold_column` the column of the completion.
    """
    if not 0 <= validation_share < 1:
        raise DataError(f"validation_share is {validation_share}; expected 0 or more, below 1")
    parts = RowParts(columns=columns or {}, prompt=prompt, gold_column=gold_column)
    found = _read_splits(source)
    if eval_data is not None:
        found["valid"] = load_rows_with_locations(eval_data, split=None)
    named = {
        name: [(where, parts.name(row, where)) for where, row in rows]
        for name, rows in found.items()
    }
    splits = {
        name: encoding.encode((where, parts.learned(row, where)) for where, row in rows)
        for name, rows in named.items()
    }
    if not splits["train"].demonstrations:
        raise DataError(
            f"{source} has no answer within the limit of {encoding.max_length} tokens. Raise "
            "max_length (--max-length)"
        )
    truncated = sum(one.truncated for one in splits.values())
    dropped = sum(one.dropped for one in splits.values())
    split_off = "valid" not in splits and validation_share > 0
    if split_off:
        named["valid"] = named["train"]
        splits["train"], splits["valid"] = _split_by_hash(splits["train"], validation_share)
    train, valid, test = (splits.get(name, _NO_ROWS) for name in ("train", "valid", "test"))
    return SFTData(
        train=train.demonstrations,
        valid=valid.demonstrations,
        test=test.demonstrations,
        truncated=truncated,
        dropped=dropped,
        max_length=encoding.max_length,
        split_off=split_off,
        valid_rows=[named["valid"][place][1] for place in valid.places],
    )


def load_examples(folder: str | Path, name: str) -> list[DataRow]:
    """Return the rows of NAME.jsonl in a folder, or the lines of NAME.txt as texts."""
    return [row for _, row in _require_part(Path(folder), name)]


def choose_by_hash(demonstrations: Sequence[Demonstration], share: float) -> list[bool]:
    """Return for each demonstration whether it is one of about `share` of them.

    Hashes decide, so neither order nor seed matters, and equal demonstrations stay together.
    """
    digests = [demonstration_digest(one) for one in demonstrations]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise DataError(
            f"the data has {len(distinct)} distinct row; expected at least 2, to split off one for "
            "validation. Add rows, add a validation part, or train without validation "
            "(validation_share 0, --validation-share 0)"
        )
    chosen = set(distinct[: min(ceil(share * len(distinct)), len(distinct) - 1)])
    return [digest in chosen for digest in digests]


def _split_by_hash(rows: EncodedRows, share: float) -> tuple[EncodedRows, EncodedRows]:
    chosen = choose_by_hash(rows.demonstrations, share)
    return rows.select([not one for one in chosen]), rows.select(chosen)


def demonstration_digest(demonstration: Demonstration) -> bytes:
    """Return a hash of the tokens and the mask."""
    content = np.array([demonstration.tokens, demonstration.mask], np.int32).tobytes()
    return blake2b(content, digest_size=16).digest()


def _read_splits(source: str | Path) -> dict[str, _LocatedRows]:
    folder, address = Path(source), DataAddress.parse(source)
    if folder.suffix == ".txt":
        return {"train": _read_texts(folder)}
    if (
        address.on_hub
        or address.parts
        or is_saved_folder(address.place)
        or _has_public_layout(folder)
    ):
        return _published_splits(address)
    if not folder.is_dir():
        return {"train": load_rows_with_locations(source)}
    optional = {name: _read_part(folder, name) for name in ("valid", "test")}
    present = {name: rows for name, rows in optional.items() if rows is not None}
    if "valid" not in present:
        _check_validation_name(folder)
    return {"train": _require_part(folder, "train"), **present}


def _check_validation_name(folder: Path) -> None:
    """Raise if a validation part has a name that would not be read."""
    names = [f"{name}{suffix}" for name in _OTHER_NAMES for suffix in (".jsonl", ".txt")]
    if found := [name for name in names if (folder / name).is_file()]:
        ours = f"valid{Path(found[0]).suffix}"
        raise DataError(
            f"{folder / found[0]} would not be read. Rename the file to {ours} if it is the "
            "validation data, or move the file elsewhere"
        )


def _has_public_layout(folder: Path) -> bool:
    """Return whether a folder is laid out as a data set of the hub is."""
    ours = any((folder / f"train{suffix}").exists() for suffix in (".jsonl", ".txt"))
    signs = ("README.md", "data", "*.parquet", "*/*.parquet", "*.jsonl.gz")
    return not ours and any(any(folder.glob(sign)) for sign in signs)


def _published_splits(address: DataAddress) -> dict[str, _LocatedRows]:
    """Return the split that the address names as "train", or all splits.

    The split "validation" becomes "valid".
    """
    addresses = split_addresses(address)
    if len(addresses) == 1:
        return {"train": load_rows_with_locations(*addresses.values())}
    if "train" not in addresses:
        raise DataError(
            f"{address} has the splits {list(addresses)}; expected one named 'train'. Name the "
            f"split to learn from, such as {next(iter(addresses.values()))}"
        )
    known = {"train": "train", "validation": "valid", "valid": "valid", "test": "test"}
    return {
        known[name]: load_rows_with_locations(one)
        for name, one in addresses.items()
        if name in known
    }


def _require_part(folder: Path, name: str) -> _LocatedRows:
    if (found := _read_part(folder, name)) is None:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        shown = ", ".join(names[:_NAMES_SHOWN]) or "nothing"
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        raise DataError(
            f"{folder} has neither {name}.jsonl nor {name}.txt, but {shown}{more}; "
            "expected one of the two, with a row or a text in each line. To read a single file, "
            "give its path"
        )
    return found


def _read_part(folder: Path, name: str) -> _LocatedRows | None:
    rows, texts = folder / f"{name}.jsonl", folder / f"{name}.txt"
    if rows.is_file() and texts.is_file():
        raise DataError(
            f"{folder} has {rows.name} and {texts.name}, and libraries differ in which one they "
            "read. Keep one of them in the folder, or give the path of the file"
        )
    if rows.is_file():
        return load_rows_with_locations(rows)
    return _read_texts(texts) if texts.is_file() else None


def _read_texts(path: Path) -> _LocatedRows:
    lines = enumerate(read_text(path).split("\n"), start=1)
    rows = [(f"{path}, line {n}", {"text": s}) for n, line in lines if (s := line.strip("\r"))]
    if not rows:
        raise DataError(f"{path} has no lines of text")
    return list(rows)
