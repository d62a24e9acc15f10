"""The options that measuring scripts have in common, and what a script does with its record."""

import argparse
import json
from pathlib import Path
from typing import Any

from textpolicy import fast_cpu


class MeasurementParser(argparse.ArgumentParser):
    """A parser with `--runs`, `--threads`, `--json` and `--output`."""

    def __init__(self, about: str | None, *, runs: int, threads: int | None = 1) -> None:
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument(
            "--runs", type=int, default=runs, help=f"measurements of each (default: {runs})"
        )
        self.add_argument(
            "--threads", type=int, default=threads, help=f"of the BLAS (default: {threads})"
        )
        self.add_argument("--json", action="store_true", help="print JSON instead of lines")
        self.add_argument(
            "--output", type=Path, metavar="FILE", help="write the object to a file too"
        )

    def options(self) -> argparse.Namespace:
        """Return the options of the command, and let the products have so many threads."""
        options = self.parse_args()
        if options.runs < 1:
            self.error(f"--runs is {options.runs}; expected at least 1")
        if fast_cpu.enable().threads:
            fast_cpu.set_threads(options.threads)
        return options


def output_record(record: dict[str, Any], lines: list[str], options: argparse.Namespace) -> None:
    """Write a record to the file that was named, and print it as JSON or as these lines."""
    text = json.dumps(record, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    print(text if options.json else "\n".join(lines))
