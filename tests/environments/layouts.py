"""Data sets in the layouts of the hub, made by hand in a folder."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]
CONFIGS = {"main": ("train", "test"), "long": ("train", "test")}


def sums(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{n}+{n}=", "answer": f"{n}+{n}\n#### {2 * n}"}
        for n in range(first, first + count)
    ]


def write_parquet(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_card(folder: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """Write a README.md that names the files of each split of each configuration."""
    lines = ["---", "configs:"]
    for config, splits in files.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*lines, "---", "# Sums", ""]))


def write_sums(folder: Path) -> Path:
    """Write two configurations with 40 rows to train on and 10 to measure on."""
    for number, (config, splits) in enumerate(CONFIGS.items()):
        for split in splits:
            rows = sums(100 * number + 50 * (split == "test"), 10 if split == "test" else 40)
            write_parquet(folder / config / f"{split}-00000-of-00001.parquet", rows)
    paths = {c: {split: f"{c}/{split}-*" for split in splits} for c, splits in CONFIGS.items()}
    write_card(folder, paths)
    return folder


MATH = [
    {
        "problem": f"What is $\\frac{{{n}}}{{4}} + \\frac{{{n}}}{{4}}$?",
        "solution": f"Both are equal, so it is $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
        "answer": f"\\frac{{{n}}}{{2}}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": f"test/prealgebra/{n}.json",
    }
    for n in range(1, 41)
]
COUNTDOWN = [
    {"target": a * b - c, "nums": [a, b, c]} for a in (7, 8, 9) for b in (11, 13) for c in (2, 3, 4)
] + [{"target": (a - 3) * 5 + 2, "nums": [a, 3, 5, 2]} for a in range(20, 40)]
_NO_ARGUMENTS = {"keywords": None, "num_words": None, "relation": None}
INSTRUCTIONS = [
    {
        "key": 1000 + n,
        "prompt": f"Name {n} things in fewer than {n} words, without commas. Mention a kite.",
        "instruction_id_list": [
            "punctuation:no_comma",
            "length_constraints:number_words",
            "keywords:existence",
        ],
        "kwargs": [
            _NO_ARGUMENTS,
            _NO_ARGUMENTS | {"num_words": n, "relation": "less than"},
            _NO_ARGUMENTS | {"keywords": ["kite"]},
        ],
    }
    for n in range(5, 45)
]
SUITES = {"math500": MATH, "countdown34": COUNTDOWN, "ifeval": INSTRUCTIONS}
"""Rows in the layouts of public suites, by the name of their environment."""
