"""What was trained, how and on what, in a model card."""

from collections.abc import Iterator, Mapping
from typing import Any

from textpolicy.adapters.files.inspection import AdapterSummary
from textpolicy.backend import versions
from textpolicy.export.card.facts import CardFacts
from textpolicy.export.markdown import code
from textpolicy.export.run_facts import public_name

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


def summary_of(card: CardFacts) -> str:
    """Return the first sentence of a card."""
    kinds = " and ".join(sorted({_KINDS[module.kind] for module in card.adapter.modules}))
    what = f"{kinds} adapter of" if card.facts.is_adapter else f"{kinds} adapter, merged into"
    way = "supervised training" if card.run and card.run.supervised else "reinforcement learning"
    how = f", trained by {way} with TextPolicy" if card.run else ""
    return f"{what} {code(card.base_name)}{how}. Exported by TextPolicy as {card.format}."


def setup_rows(card: CardFacts) -> Iterator[tuple[str, str]]:
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
