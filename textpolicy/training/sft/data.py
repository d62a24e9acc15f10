"""Training, validation and test data from a folder, a file or a data set."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from pathlib import Path

import numpy as np

from textpolicy.environments.data_files import DataRow, load_rows_with_locations, read_text
from textpolicy.errors import DataError
from textpolicy.training.sft.demonstrations import Demonstration
from textpolicy.training.sft.encoding import Encoding

PlacedRows = list[tuple[str, DataRow]]
_SHOWN = 5
_OTHER_NAMES = ("validation", "val", "dev")


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """The three parts, and what a person should know of how they were made."""

    train: list[Demonstration]
    valid: list[Demonstration]
    test: list[Demonstration]
    truncated: int = 0
    dropped: int = 0
    max_length: int | None = None
    split_off: bool = False
    """Whether the validation part was taken from the training part, which came without one."""

    def __str__(self) -> str:
        parts = f"{len(self.train)} demonstrations to train on, {len(self.valid)} to validate"
        parts += " (taken from them)" if self.split_off else ""
        parts += f", {len(self.test)} to test" if self.test else ""
        limit = f"the limit of {self.max_length} tokens"
        cut = f"\n{self.truncated} are cut at {limit}" if self.truncated else ""
        lost = f"\n{self.dropped} have no answer within {limit}: left out" if self.dropped else ""
        return parts + cut + lost


def load_data(source: str | Path, encoding: Encoding, *, validation_share: float = 0.1) -> SFTData:
    """The demonstrations in `source`: a folder with train, and perhaps valid and test, files.

    Each is NAME.jsonl or else NAME.txt, a text a line. A single file (.jsonl, .txt, .csv or
    .parquet), a folder saved by `datasets` or "hf:NAME" is training data too. Where no validation
    data is, `validation_share` of the different rows is taken, whatever their order; 0 takes none.
    """
    if not 0 <= validation_share < 1:
        raise DataError(f"validation_share is {validation_share}; expected 0 or more, below 1")
    splits = {name: encoding.encode(rows) for name, rows in _read_splits(source).items()}
    train = splits["train"].demonstrations
    if not train:
        raise DataError(f"{source}: no answer is within the limit of {encoding.max_length} tokens")
    valid = splits["valid"].demonstrations if "valid" in splits else []
    split_off = "valid" not in splits and validation_share > 0
    if split_off:
        train, valid = split_by_hash(train, validation_share)
    return SFTData(
        train=train,
        valid=valid,
        test=splits["test"].demonstrations if "test" in splits else [],
        truncated=sum(one.truncated for one in splits.values()),
        dropped=sum(one.dropped for one in splits.values()),
        max_length=encoding.max_length,
        split_off=split_off,
    )


def load_examples(folder: str | Path, name: str) -> list[DataRow]:
    """The rows of one part of a folder: NAME.jsonl or else NAME.txt, a text a line."""
    return [row for _, row in _needed_part(Path(folder), name)]


def split_by_hash(
    demonstrations: Sequence[Demonstration], share: float
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Two parts that share no demonstration, the second of about `share`, chosen by hash.

    Neither the order of rows nor any seed matters, and equal rows stay together.
    """
    digests = [demonstration_digest(one) for one in demonstrations]
    different = sorted(set(digests))
    if len(different) < 2:
        raise DataError(
            f"the data has {len(different)} different row: at least 2 are needed to take one for "
            "validation. Add rows, give a validation part, or do without: validation_share 0, "
            "--validation-share 0"
        )
    chosen = set(different[: min(ceil(share * len(different)), len(different) - 1)])
    pairs = list(zip(demonstrations, digests, strict=True))
    return [d for d, key in pairs if key not in chosen], [d for d, key in pairs if key in chosen]


def demonstration_digest(demonstration: Demonstration) -> bytes:
    """A name for what a demonstration teaches."""
    content = np.array([demonstration.tokens, demonstration.mask], np.int32).tobytes()
    return blake2b(content, digest_size=16).digest()


def _read_splits(source: str | Path) -> dict[str, PlacedRows]:
    folder = Path(source)
    if folder.suffix == ".txt":
        return {"train": _texts(folder)}
    if not folder.is_dir():
        return {"train": load_rows_with_locations(source)}
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder)
    if (folder / "dataset_info.json").is_file():
        return {"train": load_rows_with_locations(source)}
    others = {name: _part(folder, name) for name in ("valid", "test")}
    present = {name: rows for name, rows in others.items() if rows is not None}
    if "valid" not in present:
        _check_names(folder)
    return {"train": _needed_part(folder, "train"), **present}


def _check_names(folder: Path) -> None:
    """Refuse a validation part under another name, which would be passed over."""
    names = [f"{name}{suffix}" for name in _OTHER_NAMES for suffix in (".jsonl", ".txt")]
    if found := [name for name in names if (folder / name).is_file()]:
        ours = f"valid{Path(found[0]).suffix}"
        raise DataError(
            f"{folder / found[0]} would not be read; call it {ours} if it is what to validate on, "
            "or put it elsewhere"
        )


def _saved_splits(folder: Path) -> dict[str, PlacedRows]:
    """The splits of a saved data set; what others call validation is valid."""
    names = json.loads(read_text(folder / "dataset_dict.json"))["splits"]
    found = {name: load_rows_with_locations(folder, split=name) for name in names}
    if "validation" in found:
        found["valid"] = found.pop("validation")
    if "train" not in found:
        raise DataError(f"{folder} has the splits {names}; expected one named 'train'")
    return found


def _needed_part(folder: Path, name: str) -> PlacedRows:
    if (found := _part(folder, name)) is None:
        raise DataError(
            f"{folder} holds neither {name}.jsonl nor {name}.txt, but {_content(folder)}; expected "
            "one of them, a row or a text a line. A single file is read by its own name"
        )
    return found


def _content(folder: Path) -> str:
    """The first names in a folder, in words."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"


def _part(folder: Path, name: str) -> PlacedRows | None:
    if (folder / f"{name}.jsonl").is_file():
        return load_rows_with_locations(folder / f"{name}.jsonl")
    path = folder / f"{name}.txt"
    return _texts(path) if path.is_file() else None


def _texts(path: Path) -> PlacedRows:
    lines = enumerate(read_text(path).split("\n"), start=1)
    rows = [(f"{path}, line {n}", {"text": s}) for n, line in lines if (s := line.strip("\r"))]
    if not rows:
        raise DataError(f"{path} has no lines of text")
    return list(rows)
