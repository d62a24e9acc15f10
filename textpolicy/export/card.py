"""The model card of an export: a README.md with the front matter of the hub, and a picture.

Everything in it is read from the files of the run, of the adapter and of the base. What they do not
say is left out. Prompts and completions are never shown, and of local paths only the last name.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from textpolicy.adapters.files.inspection import AdapterSummary, inspect_adapter
from textpolicy.adapters.fuse import FuseReport
from textpolicy.backend import versions
from textpolicy.export.base_model import hub_id, licence_of
from textpolicy.export.curve_picture import draw_curves
from textpolicy.export.format_facts import FORMAT_FACTS, FormatFacts
from textpolicy.export.markdown import code, code_block, markdown_table, plain
from textpolicy.export.proof import MEASURABLE_EFFECT, Proof
from textpolicy.export.run_facts import RunFacts, public_name, read_run_facts
from textpolicy.export.source import Source
from textpolicy.file_writing import atomic_replace

CARD, PICTURE = "README.md", "curve.png"
_LONGEST_LINE = 1000
_TINY = "python -c 'import textpolicy; print(textpolicy.tiny_model())'"
_NAME = re.compile(r"[a-z0-9_-]{1,40}")
_SHOWN_SETTINGS = {
    "algorithm.name": "algorithm",
    "task.env": "environment",
    "task.data": "data",
    "data.source": "data",
    "task.reward": "reward",
    "rollout.groups_per_step": "groups a step",
    "rollout.group_size": "completions a group",
    "sampling.temperature": "sampling temperature",
    "trainer.batch_size": "rows a batch",
    "trainer.lr": "learning rate",
    "algorithm.beta": "weight of the KL term",
    "run.seed": "seed",
}
_KINDS = {"lora": "LoRA", "dora": "DoRA"}
_CONTINUED = {
    "task.env": "--env",
    "task.data": "--data",
    "task.reward": "--reward",
    "data.source": "--data",
    "algorithm.name": "--algorithm",
}


@dataclass(frozen=True, kw_only=True)
class _Card:
    """What all parts of a card are made from."""

    name: str
    format: str
    source: Source
    adapter: AdapterSummary
    run: RunFacts | None
    base: str | None

    @property
    def facts(self) -> FormatFacts:
        return FORMAT_FACTS[self.format]

    @property
    def was_chosen_by_score(self) -> bool:
        """Whether the run kept this adapter because its held-out score was the best."""
        directory, run = self.source.directory, self.run
        if directory is None or run is None or self.source.adapter != directory.best:
            return False
        return run.supervised or run.setting("evaluation.every") is not None

    @property
    def base_name(self) -> str:
        return self.base or self.source.model_name


def write_card(
    folder: Path,
    *,
    name: str,
    format: str,
    source: Source,
    proofs: Sequence[Proof],
    commands: Sequence[str],
    survival: FuseReport | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the card of the export in `folder`, and the picture of the curve. Return the card.

    `name` is what the folder will be called, and `commands` are the lines that use it by this name.
    """
    adapter = inspect_adapter(source.adapter)
    card = _Card(
        name=name,
        format=format,
        source=source,
        adapter=adapter,
        run=read_run_facts(source.directory, adapter.version) if source.directory else None,
        base=hub_id(source.model, source.checkpoint),
    )
    parts = [
        f"---\n{_front_matter(card)}\n---",
        f"# {code(card.name)}",
        _summary(card),
        markdown_table(list(_training_rows(card))),
        *_result(card, folder),
        *_proof(proofs, survival, notes),
        *_use(card, commands),
    ]
    target = folder / CARD
    with atomic_replace(target) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return target


def _front_matter(card: _Card) -> str:
    """Return the YAML of the front matter. Every value is of a form that was checked."""
    run, facts = card.run, card.facts
    tags = ["textpolicy", *facts.tags]
    if run:
        algorithm = str(run.setting("algorithm.name") or "").lower()
        tags.append("sft" if run.supervised else "reinforcement-learning")
        # An algorithm of a file is not a name that others search for.
        tags += [algorithm] if _NAME.fullmatch(algorithm) else []
    licence: dict[str, Any] = {
        **licence_of(card.source.checkpoint, card.source.architecture()),
    }
    data = ModelCardData(
        **licence,
        base_model=card.base,
        base_model_relation=_relation(card),
        library_name=facts.loaded_by,
        pipeline_tag="text-generation",
        datasets=[run.dataset] if run and run.dataset else None,
        tags=list(dict.fromkeys(tags)),
    )
    return data.to_yaml().rstrip("\n")


def _relation(card: _Card) -> str | None:
    # "merge" is the hub's word for a mix of several models.
    return None if card.base is None else "adapter" if card.facts.is_adapter else "finetune"


def _summary(card: _Card) -> str:
    kinds = " and ".join(sorted({_KINDS[module.kind] for module in card.adapter.modules}))
    what = f"{kinds} adapter of" if card.facts.is_adapter else f"{kinds} adapter, merged into"
    way = "supervised training" if card.run and card.run.supervised else "reinforcement learning"
    how = f", trained by {way} with TextPolicy" if card.run else ""
    return f"{what} {code(card.base_name)}{how}. Exported by TextPolicy as {card.format}."


def _training_rows(card: _Card) -> Iterator[tuple[str, str]]:
    """Yield what was trained, how and on what."""
    yield "base", code(card.base_name)
    if card.adapter.quantization:
        yield "quantization of the base", code(_pairs(card.adapter.quantization))
    yield from _adapter_rows(card.adapter)
    run = card.run
    if run is None:
        return
    for key, title in _SHOWN_SETTINGS.items():
        if (value := run.setting(key)) is not None:
            yield title, code(public_name(value))
    if run.setting("task.env") and not run.setting("task.reward"):
        yield "reward", "that of the environment"
    yield "steps" if not run.supervised else "updates", f"{run.steps:,}"
    if run.alarms:
        yield "alarms of the run", code(", ".join(run.alarms))
    if run.versions:
        yield "versions in training", code(_pairs(run.versions))
    yield "versions at export", code(_pairs(versions()))


def _adapter_rows(adapter: AdapterSummary) -> Iterator[tuple[str, str]]:
    modules = adapter.modules
    names = dict.fromkeys(module.path.rpartition(".")[2] for module in modules)
    yield "adapted modules", f"{len(modules)}: {code(', '.join(names))}"
    for title, values in (
        ("rank", {str(module.rank) for module in modules}),
        ("scale", {f"{module.scale:g}" for module in modules}),
    ):
        yield title, code(", ".join(sorted(values, key=float)))
    yield "trained parameters", f"{adapter.parameters:,}"
    if adapter.version >= 0:
        yield "version of the adapter", f"{adapter.version}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _result(card: _Card, folder: Path) -> Iterator[str]:
    """Yield the part about scores and the curve, which is drawn as a picture."""
    run = card.run
    if run is None or not (run.curves or run.before or run.after):
        return
    yield "## Result"
    measure = "validation loss" if run.supervised else "greedy reward on held-out tasks"
    rows: list[tuple[str, str]] = []
    if run.before:
        started = run.setting("adapter.start") is not None
        rows.append(
            (f"{measure}, {'before this run' if started else 'of the base'}", f"{run.before}")
        )
    if run.after:
        same = run.after.version == card.adapter.version
        whose = "of this adapter" if same else f"of version {run.after.version} of the adapter"
        rows.append((f"{measure}, {whose}", f"{run.after}"))
    if rows:
        yield markdown_table(rows)
    if run.after and run.after.standard_error is not None:
        yield f"The number after ± is the standard error over {_task_count(run)} tasks."
    if run.after and card.was_chosen_by_score:
        yield "The adapter was chosen by this score, so the score is a little too good."
    if run.curves:
        (folder / PICTURE).write_bytes(draw_curves(list(run.curves.values())))
        yield f"![curve of the run]({PICTURE})"
        yield f"{_caption(run)}."


def _task_count(run: RunFacts) -> str:
    count = run.setting("evaluation.count")
    return f"at most {count}" if isinstance(count, int) else "the"


def _caption(run: RunFacts) -> str:
    names = {
        "reward": "mean reward of the sampled completions",
        "eval/reward": "greedy reward on held-out tasks",
        "loss": "training loss",
        "validation/loss": "validation loss",
    }
    shown = [
        f"{names[name]} ({color})"
        for name, color in zip(run.curves, ("blue", "orange"), strict=False)
    ]
    text = " and ".join(shown)
    return f"{text[0].upper()}{text[1:]}, by step"


def _proof(
    proofs: Sequence[Proof], survival: FuseReport | None, notes: Sequence[str]
) -> Iterator[str]:
    """Yield the part that compares the files with the adapter as it was trained."""
    yield "## Proof of the export"
    yield (
        "The files were opened again after they were written, and compared with the base and the "
        "adapter as they were trained."
    )
    for proof in proofs:
        yield markdown_table(list(_proof_rows(proof)))
    if not any(_is_measurable(proof) for proof in proofs):
        yield "The adapter changes nothing that can be measured: it computes what the base does."
    if survival:
        yield (
            f"Rounding to {survival.worst.dtype} left {survival.survival:.2%} of the update, and "
            f"the norm of its error is {survival.noise:.2%} of the norm of the update."
        )
    yield from map(plain, notes)


def _proof_rows(proof: Proof) -> Iterator[tuple[str, str]]:
    yield "opened by", code(proof.opened_by)
    yield "compared on", f"{proof.tokens:,} tokens of {proof.prompts} prompts"
    difference = f"{proof.largest_difference:.1e} (allowed: {proof.tolerance:.1e})"
    yield "largest difference of log-probabilities", difference
    yield "largest change of log-probabilities by the adapter", f"{proof.adapter_effect:.1e}"
    if _is_measurable(proof):
        yield "share of that change that was kept", f"{proof.kept:.2%}"
    yield "equal greedy tokens", f"{proof.equal_greedy:.1%}"
    if proof.from_merged is not None:
        yield "largest difference from the rounded weights in memory", f"{proof.from_merged:.1e}"
    if proof.from_trained is not None:
        text = "largest difference from the quantized model in training"
        yield text, f"{proof.from_trained:.1e}"


def _is_measurable(proof: Proof) -> bool:
    return proof.adapter_effect > MEASURABLE_EFFECT


def _use(card: _Card, commands: Sequence[str]) -> Iterator[str]:
    yield "## Use"
    yield f"In the folder that holds {code(card.name)}:"
    # A base in a folder of this machine is another folder elsewhere.
    here, base = str(card.source.checkpoint), card.base_name
    yield code_block([command.replace(here, base) for command in commands])
    if any(here in command for command in commands):
        where = f", which `{_TINY}` prints" if card.source.model == "tiny" else ""
        yield f"{code(base)} stands for the folder of the base model{where}."
    if line := _continuing(card):
        yield "To continue training from here:"
        yield code_block([line])


def _continuing(card: _Card) -> str | None:
    """Return the command that trains on from the export with the task of its run, or None."""
    run, flag = card.run, card.facts.continued_by
    if run is None or flag is None:
        return None
    words = ["textpolicy", "sft" if run.supervised else "train"]
    for key, flag_of_task in _CONTINUED.items():
        if (value := run.setting(key)) is not None:
            words += [flag_of_task, public_name(value)]
    if card.facts.is_adapter:
        words += ["--model", card.base_name, *_quantize_flags(run)]
    path = f"{card.name}/{card.facts.file}" if card.facts.file else card.name
    line = shlex.join([*words, flag, path])
    return line if len(line) <= _LONGEST_LINE else None


def _quantize_flags(run: RunFacts) -> list[str]:
    """Return the flags that quantize the base as the run did."""
    keys = ("quantize", "quantize_mode", "quantize_group")
    given = [(key, run.setting(f"model.{key}")) for key in keys]
    flags = [
        (f"--{key.replace('_', '-')}", str(value)) for key, value in given if value is not None
    ]
    return [word for pair in flags for word in pair]
