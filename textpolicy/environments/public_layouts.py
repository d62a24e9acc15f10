"""Data sets in the layouts of the hub, there or in a local folder, read by the `datasets` library.

The library picks a reader by the endings of the files. Only readers of plain tables are allowed,
and the files of a local folder must be inside the folder, whatever its README.md says.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from textpolicy.activity import doing
from textpolicy.environments.data_address import DataAddress
from textpolicy.environments.faults import outcome_of
from textpolicy.errors import DataError, UnreadableError
from textpolicy.untrusted.files import read_utf8, shown_path

_READERS = ("parquet", "json", "csv", "arrow", "text")
_DEFAULT_CONFIG = "default"
_CARDS = ("README.md", ".huggingface.yaml")
# The part of a card about files, up to the next key that is not indented, and an alias in it.
_CONFIGS = re.compile(r"\bconfigs\b.*?(?=^[^\s#-]|\Z)", re.MULTILINE | re.DOTALL)
_ALIAS = re.compile(r"[:,\[{-]\s+\*|[\[{,]\*")
# How the library marks the folder of a data set that it has saved.
_SAVED = ("dataset_dict.json", "dataset_info.json")


def open_split(
    address: DataAddress, default_split: str | None, *, stream: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of one split with their locations.

    The split is the one of the address, or else `default_split` if it exists, or the only one.
    Rows of the hub are kept in the library's cache unless `stream`.
    """
    library = _Library(address)
    if is_saved_folder(address.place):
        data, name = library.saved_split(default_split)
    elif address.place.endswith(".parquet") and not address.on_hub:
        files = str(Path(address.place).expanduser().absolute())
        data = library.call(
            library.datasets.load_dataset,
            "parquet",
            data_files=files,
            split="train",
            streaming=True,
        )
        name = str(address)
    else:
        config, split = library.find_split(default_split)
        data = library.split(config, split, stream=stream)
        name = address.with_parts(*([] if config == _DEFAULT_CONFIG else [config]), split)
    for number, row in enumerate(library.rows_of(data), start=1):
        yield f"{name}, row {number}", row


def split_addresses(address: DataAddress) -> dict[str, str]:
    """Return the address of the named split, or of every split of the configuration, by split."""
    library = _Library(address)
    if is_saved_folder(address.place):
        names, before = library.saved_split_names(), ()
        asked = address.parts[0] if address.parts else None
    else:
        config, names, asked = library.find_splits()
        before = () if config == _DEFAULT_CONFIG else (config,)
    if asked is not None or not names:
        return {asked or "train": str(address)}
    return {name: address.with_parts(*before, name) for name in names}


def is_saved_folder(place: str) -> bool:
    """Return whether the `datasets` library has saved this folder."""
    folder = Path(place).expanduser()
    return any((folder / name).is_file() for name in _SAVED)


def _check_cards(folder: Path) -> None:
    """Raise `DataError` if the files that a card names may be on another machine.

    The library would look for them before it tells which files it has found. Escapes of YAML could
    hide an address.
    """
    for path in (folder / name for name in _CARDS):
        if not path.is_file():
            continue
        try:
            text = read_utf8(path)
        except UnreadableError as error:
            raise DataError(f"{error}. Correct the file, or remove it") from error
        found = _CONFIGS.search(_front_matter(text) if path.suffix == ".md" else text)
        if found and ("://" in found[0] or "\\" in found[0] or _ALIAS.search(found[0])):
            raise DataError(
                f"the configs of {shown_path(path)} name files by an address, or have a backslash "
                "or an alias of YAML; expected names of files in the folder. Copy the files into "
                "the folder, and name them there"
            )


def _front_matter(card: str) -> str:
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|\Z)", card, re.DOTALL)
    return found[1] if found else ""


class _Library:
    """The functions of the `datasets` library for one address; their errors name the address."""

    def __init__(self, address: DataAddress) -> None:
        try:
            self.datasets: Any = import_module("datasets")
        except ImportError as error:
            raise DataError(
                f"reading {str(address)!r} needs the datasets library: pip install "
                "'textpolicy[datasets]'"
            ) from error
        self._address = address
        self._place = address.place
        if not address.on_hub:
            self._place = str(Path(address.place).expanduser().absolute())
            _check_cards(Path(self._place))
        elif os.path.exists(address.place):
            raise DataError(
                f"{address} is on the hub, but the datasets library would read the folder "
                f"{address.place!r} of the working directory. Start in another directory, or give "
                f"the folder as --data ./{address.place}"
            )
        self._options = {"revision": address.revision} if address.on_hub else {}

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what a function of the library returns. Raise `DataError` for any error of it."""
        work = "downloading" if self._address.on_hub else "reading"
        with doing(f"{work} {self._address}"):
            return self._checked(lambda: function(*arguments, **options))

    def rows_of(self, data: Any) -> Iterator[Mapping[str, Any]]:
        rows = iter(data)
        while (row := self._checked(lambda: next(rows, None))) is not None:
            yield row

    def saved_split_names(self) -> list[str]:
        data = self.call(self.datasets.load_from_disk, self._place)
        return list(data) if isinstance(data, Mapping) else []

    def saved_split(self, default_split: str | None) -> tuple[Any, str]:
        """Return one split of a saved folder and its address."""
        data = self.call(self.datasets.load_from_disk, self._place)
        parts = self._address.parts
        if not isinstance(data, Mapping):
            if parts:
                raise DataError(
                    f"{self._address.place!r} is a saved data set without splits, but the address "
                    f"names {':'.join(parts)}. Leave out the names"
                )
            return data, str(self._address)
        if len(parts) > 1:
            raise DataError(
                f"{self._address.place!r} is a saved data set, which has splits only, but the "
                f"address names {':'.join(parts)}. Its splits are {sorted(data)}"
            )
        split = self._choose_split(list(data), parts[0] if parts else None, default_split, ())
        return data[split], self._address.with_parts(split)

    def find_split(self, default_split: str | None) -> tuple[str, str]:
        """Return the configuration and the split that the address means."""
        config, splits, asked = self.find_splits()
        return config, self._choose_split(splits, asked, default_split, (config,))

    def find_splits(self) -> tuple[str, list[str], str | None]:
        """Return the configuration, its splits, and the split that the address names, if any."""
        parts, configs = self._address.parts, self._configs()
        default = configs[0] if len(configs) == 1 else self._default_config()
        if len(parts) == 1 and parts[0] not in configs and default is not None:
            return default, self.splits_of(default), parts[0]
        config = self._choose_config(configs, parts[0] if parts else default)
        splits = self.splits_of(config)
        if len(parts) == 1 and config == default and parts[0] in splits:
            raise DataError(
                f"{str(self._address)!r} is ambiguous: {parts[0]!r} is a configuration and a "
                f"split. Write {self._address.with_parts(config, parts[0])}"
            )
        return config, splits, parts[1] if len(parts) > 1 else None

    def splits_of(self, config: str) -> list[str]:
        names = self.call(
            self.datasets.get_dataset_split_names, self._place, config, **self._options
        )
        return [str(name) for name in names]

    def split(self, config: str, split: str, *, stream: bool) -> Any:
        """Return the rows of a split, after a look at the reader and the files of the library."""
        builder = self.call(
            self.datasets.load_dataset_builder, self._place, config, **self._options
        )
        self._check_builder(builder)
        # Rows of local files would fill the cache with a copy of the files.
        streaming = stream or not self._address.on_hub
        return self.call(
            self.datasets.load_dataset,
            self._place,
            config,
            split=split,
            streaming=streaming,
            **self._options,
        )

    def _configs(self) -> list[str]:
        return list(self.call(self.datasets.get_dataset_config_names, self._place, **self._options))

    def _choose_config(self, configs: Sequence[str], asked: str | None) -> str:
        if asked is not None and asked in configs:
            return asked
        problem = f"has no configuration {asked!r}" if asked else "has several configurations"
        raise DataError(self._refusal(problem, "configurations", configs, asked, ()))

    def _default_config(self) -> str | None:
        return self.call(
            self.datasets.get_dataset_default_config_name, self._place, **self._options
        )

    def _choose_split(
        self,
        splits: Sequence[str],
        asked: str | None,
        default: str | None,
        before: tuple[str, ...],
    ) -> str:
        if asked is None and (default in splits or len(splits) == 1):
            return str(default) if default in splits else splits[0]
        if asked in splits:
            return str(asked)
        problem = f"has no split {asked or default!r}" if asked or default else "has several splits"
        before = () if before == (_DEFAULT_CONFIG,) else before
        raise DataError(self._refusal(problem, "splits", splits, asked, before))

    def _refusal(
        self,
        problem: str,
        what: str,
        known: Sequence[str],
        asked: str | None,
        before: tuple[str, ...],
    ) -> str:
        near = get_close_matches(asked or "", known, n=1) or list(known[:1])
        example = f" Write {self._address.with_parts(*before, *near)}" if near else ""
        place = self._address.with_parts(*before)
        return f"{place!r} {problem}; its {what} are {list(known)}.{example}"

    def _check_builder(self, builder: Any) -> None:
        reader = type(builder).__module__.rpartition(".")[2]
        if reader not in _READERS:
            raise DataError(
                f"{self._address} would be read by the reader {reader!r} of the datasets library; "
                f"allowed are {', '.join(_READERS)}. Save its rows as .parquet or .jsonl"
            )
        if not self._address.on_hub:
            folder = Path(self._place).resolve()
            # In the cache of the hub's client, files of a snapshot are links to a folder beside it.
            blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
            files = [file for some in (builder.config.data_files or {}).values() for file in some]
            for file in files:
                path = Path(file).resolve()
                if "://" in file or not any(map(path.is_relative_to, [folder, *blobs])):
                    raise DataError(
                        f"the README.md of {self._address.place} names {file!r}, which is outside "
                        "of the folder. Copy the file into the folder, or correct README.md"
                    )

    def _checked(self, call: Callable[[], Any]) -> Any:
        value, error = outcome_of(call)
        if error is not None:
            advice = ". Check the name, the connection and your token" * self._address.on_hub
            raise DataError(
                f"the datasets library cannot read {str(self._address)!r}: "
                f"{error.rstrip('.')}{advice}"
            )
        return value
