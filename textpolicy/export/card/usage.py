"""The lines that use an export and train on from it, in a model card."""

import shlex
from collections.abc import Iterator, Sequence

from textpolicy.export.card.facts import CardFacts
from textpolicy.export.markdown import code, code_block
from textpolicy.export.run_facts import RunFacts, public_name

_LONGEST_LINE = 1000
_TINY = "python -c 'import textpolicy; print(textpolicy.tiny_model())'"
_CONTINUED = {
    "task.env": "--env",
    "task.data": "--data",
    "task.eval_data": "--eval-data",
    "task.reward": "--reward",
    "sampling.max_tokens": "--max-tokens",
    "data.source": "--data",
    "data.eval_data": "--eval-data",
    "algorithm.name": "--algorithm",
}


def usage_parts(card: CardFacts, commands: Sequence[str]) -> Iterator[str]:
    """Yield the part with the command lines."""
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


def _continuing(card: CardFacts) -> str | None:
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
