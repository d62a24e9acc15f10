"""Compare what other engines compute with exported models and adapters with what TextPolicy does.

    python benchmarks/outside.py --model tiny build/smollm2-135m \\
        --python-transformers /path/to/its/bin/python --python-vllm /path/to/its/bin/python

Each model gets random adapters that move its log-probabilities far. Each adapter is exported in
every format that an engine loads, and each engine reads the exports in a process of its own. The
script compares the log-probabilities of the whole vocabulary after chat prompts and greedy answers.
It also compares the token ids that the engine's own tokenizer makes of the prompts.

A row fails if the difference is above its bound. The rows "base, not adapted" are the control: they
take the engine's base model for the adapted model, as if the engine had ignored the adapter, and
fail if the comparison does not notice. An engine that is not installed is skipped, with the line
that installs it. The exit code is 1 if a row fails, or if nothing was compared.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from engines.question import Question
from engines.running import ENGINES, Answer, Engine, ask, is_installed
from setting import setting

from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule
from textpolicy.errors import ExportError
from textpolicy.export import export_adapter
from textpolicy.export.gguf import write_gguf
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import find_model, read_architecture_file
from textpolicy.generation.prompts import encode_prompt

TEXTS = ["12+30=", "Write one sentence about the sea.", "Grüße!\nList three colours:  red,"]
ANSWER_TOKENS = 6
CONTROL = "base, not adapted"
EMBEDDED = "tiny"
# A model of 30 layers adds up more numbers in other orders than the embedded model of 2 layers.
EMBEDDED_BOUND, BOUND = 1e-4, 5e-4
SIZE_OF_B = {EMBEDDED: 0.02}
ADAPTERS = {
    "lora": AdapterConfig(rank=8, scale=2.0),
    "ranks": AdapterConfig(
        rules=[
            LoRARule(module_path=r".*\.(q_proj|down_proj)", rank=4, alpha=8.0),
            LoRARule(module_path=r".*\.(v_proj|gate_proj)", rank=16, alpha=16.0, rslora=True),
            LoRARule(module_path=r".*\.up_proj", rank=3, scale=1.3),
        ]
    ),
    "dora": AdapterConfig(kind="dora", rank=8, scale=2.0),
}
# These engines load merged DoRA only.
REFUSED = {("dora", "vllm"), ("dora", "gguf-lora")}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table. `effect` is how far the adapter moves our own log-probabilities."""

    model: str
    adapter: str
    engine: str
    what: str
    difference: float
    effect: float
    bound: float
    same_prompts: bool

    @property
    def ok(self) -> bool:
        if self.what == CONTROL:
            return self.difference > self.bound
        # A comparison with NaN is False.
        return self.same_prompts and self.difference <= self.bound


class Subject:
    """A model and random adapters for it, with the log-probabilities that TextPolicy computes."""

    def __init__(self, model: str, kinds: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.model, self.kinds, self.folder = model, kinds, folder
        self.name = model if model == EMBEDDED else Path(model).resolve().name
        self.bound = EMBEDDED_BOUND if model == EMBEDDED else BOUND
        loaded, tokenizer = load_model(model)
        self.prompts = [encode_prompt(tokenizer, text) for text in TEXTS]
        answers = [greedy_answer(loaded, ids) for ids in self.prompts]
        pairs = zip(self.prompts, answers, strict=True)
        self.contexts = [*self.prompts, *(ids + answer for ids, answer in pairs)]
        self.rows = {"base": rows_of(loaded, self.contexts)}
        for kind in kinds:
            container = AdapterContainer.from_model(loaded, ADAPTERS[kind])
            randomize(container, SIZE_OF_B.get(model, 0.01))
            container.publish(self.adapter(kind))
            self.rows[kind] = rows_of(loaded, self.contexts)
            loaded = container.unload()

    @property
    def vocabulary(self) -> int:
        return self.rows["base"].shape[1]

    def adapter(self, kind: str) -> Path:
        """Return the path of the adapter file of this kind."""
        return self.folder / f"{kind}.safetensors"

    def effect(self, kind: str) -> float:
        return difference(self.rows[kind], self.rows["base"])


def randomize(container: AdapterContainer, size: float) -> None:
    """Draw every B, and change the magnitudes of DoRA by 3%, so that each adapter has an effect."""
    keys = iter(mx.random.split(mx.random.key(0), 2 * len(container.parameters())))

    def draw(name: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape, key=next(keys))
        end = name.rpartition(".")[2]
        return {"lora_b": size * noise, "m": array * (1 + 0.03 * noise)}.get(end, array)

    container.swap({name: draw(name, array) for name, array in container.parameters().items()})


def rows_of(model: nn.Module, contexts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the log-probabilities of the whole vocabulary after each context."""
    logits = [cast(Any, model)(mx.array([list(ids)]))[0, -1] for ids in contexts]
    return np.stack([np.array(row - mx.logsumexp(row)) for row in logits])


def greedy_answer(model: nn.Module, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(ANSWER_TOKENS):
        ids.append(int(rows_of(model, [ids])[0].argmax()))
    return ids[len(prompt) :]


def difference(rows: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(rows.astype(np.float64) - others).max())


class Exports:
    """The exports of one subject, each written when an engine needs it first."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.refused: list[dict[str, str]] = []
        self._paths: dict[tuple[str, str], Path | None] = {}

    def path(self, kind: str, to: str) -> Path | None:
        """Return what an engine loads, or None if the format cannot hold this kind of adapter."""
        if (kind, to) not in self._paths:
            self._paths[kind, to] = self._write(kind, to)
        return self._paths[kind, to]

    def base(self, to: str) -> Path:
        """Return the base model as an engine loads it."""
        folder = find_model(self.subject.model)
        path = self.subject.folder / "base.gguf"
        if to != "gguf":
            return folder
        if not path.exists():
            model, tokenizer = load_model(folder, dtype=mx.float32)
            write_gguf(path, model, tokenizer, read_architecture_file(folder))
        return path

    def _write(self, kind: str, to: str) -> Path | None:
        subject = self.subject
        output = subject.folder / f"{kind}-{to}"
        dtype = "float32" if to in ("hf", "mlx", "gguf") else None
        try:
            made = export_adapter(
                subject.adapter(kind), to, output, model=subject.model, dtype=dtype
            )
        except ExportError as error:
            if (kind, to) not in REFUSED:
                raise
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            self.refused.append(
                {"model": subject.name, "adapter": kind, "format": to, "reason": reason}
            )
            return None
        files = list(made.folder.glob("*.gguf"))
        return files[0] if files else made.folder


def questions(subject: Subject, exports: Exports, engine: Engine) -> Iterator[Question]:
    """Yield a question about the base with all adapters, and one about each merged model."""
    adapters = {kind: exports.path(kind, engine.adapter) for kind in subject.kinds}
    merged = {kind: exports.path(kind, engine.merged) for kind in subject.kinds}
    cases = {f"{kind} adapter": str(path) for kind, path in adapters.items() if path}
    models = {exports.base(engine.merged): {"base": None, **cases}}
    models |= {path: {f"{kind} merged": None} for kind, path in merged.items() if path}
    for model, asked in models.items():
        yield Question(
            model=str(model),
            cases=asked,
            texts=TEXTS,
            contexts=subject.contexts,
            vocabulary=subject.vocabulary,
        )


def compare(subject: Subject, engine: Engine, answer: Answer) -> Iterator[Comparison]:
    """Yield a row for each case, and the control for each adapter if the base was asked for."""
    for case, rows in answer.rows.items():
        kind, _, what = case.partition(" ")
        asked = [(kind, what or "base", rows)]
        if kind == "base":
            asked += [(other, CONTROL, rows) for other in subject.kinds]
        for trained, named, found in asked:
            yield Comparison(
                model=subject.name,
                adapter="-" if trained == "base" else trained,
                engine=engine.name,
                what=named,
                difference=difference(found, subject.rows[trained]),
                effect=subject.effect(trained),
                bound=subject.bound,
                same_prompts=answer.prompts == subject.prompts,
            )


def print_table(rows: Sequence[Comparison]) -> None:
    heads = ("engine", "model", "adapter", "what", "difference", "effect", "bound", "ok")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        sign = ">" if row.what == CONTROL else "<="
        numbers = (f"{row.difference:.1e}", f"{row.effect:.2g}", f"{sign} {row.bound:.0e}")
        ok = "yes" if row.ok else "NO" if row.same_prompts else "NO: other token ids"
        lines.append((row.engine, row.model, row.adapter, row.what, *numbers, ok))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [engine.name for engine in ENGINES]
    text = "names or folders (default: %(default)s)"
    parser.add_argument("--model", nargs="+", default=[EMBEDDED], help=text)
    parser.add_argument("--engines", nargs="+", choices=names, default=names)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    for name in ("transformers", "vllm"):
        text = "default: the Python of this script"
        parser.add_argument(f"--python-{name}", metavar="PATH", default=sys.executable, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file too")
    return parser.parse_args()


def measure(
    models: Sequence[str], adapters: Sequence[str], python_of: dict[str, str], folder: Path
) -> tuple[list[Comparison], dict[str, Any]]:
    """Return all rows, and for the record the versions of the engines and what was refused."""
    rows: list[Comparison] = []
    versions: dict[str, dict[str, str]] = {}
    refused: list[dict[str, str]] = []
    for number, model in enumerate(models):
        subject = Subject(model, adapters, folder / str(number))
        exports = Exports(subject)
        for engine in (one for one in ENGINES if one.name in python_of):
            for question in questions(subject, exports, engine):
                print(f"asking {engine.name} about {subject.name} ...", file=sys.stderr)
                answer = ask(engine, python_of[engine.name], question)
                versions[engine.name] = answer.versions
                rows += compare(subject, engine, answer)
        refused += exports.refused
    return rows, {"engines": versions, "refused": refused}


def print_notes(record: dict[str, Any]) -> None:
    for name, found in record["engines"].items():
        print(f"{name}:", ", ".join(f"{package} {number}" for package, number in found.items()))
    for one in record["refused"]:
        print("refused: {model}, {adapter} as {format}: {reason}".format(**one))
    for name, install in record["skipped"].items():
        print(f"skipped: {name} is not installed. Install it by: {install}")


def main() -> None:
    options = read_options()
    given = {"transformers": options.python_transformers, "vllm": options.python_vllm}
    pythons = {name: given.get(name, sys.executable) for name in options.engines}
    chosen = [engine for engine in ENGINES if engine.name in pythons]
    absent = [engine for engine in chosen if not is_installed(engine, pythons[engine.name])]
    for engine in absent:
        del pythons[engine.name]
    with tempfile.TemporaryDirectory() as folder:
        rows, found = measure(options.model, options.adapters, pythons, Path(folder))
    record = {"setting": setting(), **found, "skipped": {one.name: one.install for one in absent}}
    record["results"] = [asdict(row) | {"ok": row.ok} for row in rows]
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        print_table(rows)
        print_notes(record)
    sys.exit(not rows or not all(row.ok for row in rows))


if __name__ == "__main__":
    main()
