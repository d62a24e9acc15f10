"""The prompt and the completion of a row whose columns have other names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from textpolicy.environments.columns import ColumnNames, check_columns, with_columns
from textpolicy.environments.data_files import DataRow
from textpolicy.environments.template import Template, fill_template
from textpolicy.errors import DataError

_OPTIONS = {"prompt": "--prompt '{question}'", "completion": "--gold-column answer"}


@dataclass(frozen=True, kw_only=True)
class RowParts:
    """Where the parts of a demonstration are in a row.

    `prompt` is a template over the columns, and `gold_column` the column of the completion. Without
    both, the row's own layout says what is learned.
    """

    columns: ColumnNames = field(default_factory=dict[str, Any])
    prompt: Template | None = None
    gold_column: str | None = None

    def __post_init__(self) -> None:
        check_columns(self.columns)

    def name(self, row: Mapping[str, Any], where: str) -> DataRow:
        """Return the row with all its columns, and its parts under the names that SFT reads."""
        row = with_columns(row, self.columns, where)
        if self.gold_column is not None:
            row = with_columns(row, {"completion": self.gold_column}, where)
        if self.prompt is not None:
            try:
                row = {**row, "prompt": fill_template(self.prompt, row)}
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        return row

    def learned(self, named: DataRow, where: str) -> DataRow:
        """Return the parts of a named row that are learned: the two parts alone, if one is given.

        A row of several layouts would otherwise be read by another one of them.
        """
        if self.prompt is None and self.gold_column is None:
            return named
        for part, option in _OPTIONS.items():
            if part not in named:
                raise DataError(
                    f"{where}: the row has no column {part!r}. Its columns are {list(named)}. Say "
                    f"which columns make the {part}, such as {option}"
                )
        return {part: named[part] for part in _OPTIONS}
